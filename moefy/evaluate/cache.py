"""Measurements that are kept: what was measured once, of the same content, is not measured again.

Each is one file under `RUN/moefy/measured/`, named by the digest of its key. A key holds digests of
everything that the result depends on, never paths or times, so a stale result cannot be taken for
a fresh one; a damaged file counts as none.
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
"""Of the stored values; raised when what a measurement means has changed."""

NOT_MEASURING = (
    "cli", "inspect", "finetune", "report", "pipeline.py", "progress.py",
    "runs/push.py", "runs/reproduce.py", "runs/verify.py",
)  # fmt: skip
"""Parts of the package by which nothing is measured: a change of a page's drawing, say, leaves what
was measured as it was."""

VERSIONS = {
    "moefy": code(NOT_MEASURING),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
"""What a measurement may depend on besides weights and text."""


@dataclass(frozen=True)
class Cache:
    """The measurements of one run."""

    folder: Path
    common: Mapping[str, Any] = field(default_factory=dict)
    """A part of every key."""

    def once(self, kind: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The value under `key`, measured now if it is not there. Values are what JSON holds."""
        found = self.get(kind, key)
        return self.put(kind, key, measure()) if found is None else found

    def get(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """The value under `key`, or None."""
        try:
            return json.loads(self._file(kind, key).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, kind: str, key: Mapping[str, Any], value: Any) -> Any:
        """Keep `value`, and give it as it will be read."""
        file = self._file(kind, key)
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"kind": kind, "key": {**self.common, **key}, "value": value}
        text = json.dumps(whole, ensure_ascii=False)
        with replacing(file, shared=True) as draft:
            draft.write_text(text, encoding="utf-8")
        return json.loads(text)["value"]

    def _file(self, kind: str, key: Mapping[str, Any]) -> Path:
        whole = {"format": FORMAT, **self.common, **key}
        return self.folder / f"{kind}-{digest(whole)[:24]}.json"


def digest(value: Any) -> str:
    """SHA-256 of what JSON makes of `value`, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a checkpoint: its configuration, weights, and the norms of an oracle's routers.

    `known` are digests of files that were read already, by name.
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
