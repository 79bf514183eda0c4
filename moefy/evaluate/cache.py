"""Stored measurements: the same content is measured once.

Each measurement is one file under `RUN/moefy/measured/`, named by the digest of its key. A key
holds digests of everything that the result depends on, and no paths or times: a stale result is
never taken for a fresh one. A damaged file counts as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moefy.environment import code
from moefy.files.publish import replacing, sha256

FORMAT = 1
"""Version of the stored values. It rises when a measurement changes its meaning."""

NOT_MEASURING = (
    "cli", "inspect", "finetune", "report", "pipeline.py", "progress.py",
    "runs/push.py", "runs/reproduce.py", "runs/verify.py",
)  # fmt: skip
"""Parts of the package that measure nothing: a change in them leaves the cache valid."""

VERSIONS = {
    "moefy": code(NOT_MEASURING),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
"""What every measurement depends on, besides weights and text."""


@dataclass(frozen=True)
class Cache:
    """The measurements of one run."""

    folder: Path
    common: Mapping[str, Any] = field(default_factory=dict)
    """A part of every key."""

    def once(self, kind: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The value under `key`, measured now if it is not there. Values are what JSON holds."""
        value = self.get(kind, key)
        return self.put(kind, key, measure()) if value is None else value

    def get(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """The value under `key`, or None."""
        try:
            return json.loads(self._file(kind, key).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, kind: str, key: Mapping[str, Any], value: Any) -> Any:
        """Store `value`, and return it as it will be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"kind": kind, "key": {**self.common, **key}, "value": value}
        text = json.dumps(entry, ensure_ascii=False)
        with replacing(self._file(kind, key), shared=True) as draft:
            draft.write_text(text, encoding="utf-8")
        return json.loads(text)["value"]

    def _file(self, kind: str, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest({'format': FORMAT, **self.common, **key})[:24]}.json"


def digest(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a checkpoint: its configuration and its weights.

    `known` holds digests of files that were read already, by name.
    """
    known = known or {}
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest({f.name: known.get(f.name) or sha256(f) for f in files if f.is_file()})


def tensors_digest(tensors: list[Tensor]) -> str:
    """SHA-256 of token ids, window by window."""
    whole = hashlib.sha256()
    for ids_T in tensors:
        whole.update(len(ids_T).to_bytes(8, "little"))
        whole.update(ids_T.cpu().numpy().astype("<i8").tobytes())
    return whole.hexdigest()
