"""Checkpoints of a fine-tune: whole or not there, complete, and of one run only.

Trainer's own lose a MoE model's experts on resume (their names on disk are not those in memory),
are written in place, and are taken up whatever run they are of.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moefy.environment import differences
from moefy.errors import MoefyError
from moefy.files.publish import sha256, sync, write_json
from moefy.files.safetensors_header import some

WHOLE = "whole.json"
"""Written last: digests of the other files, and what the run is."""

WEIGHTS = "trained.safetensors"
PREFIX = "checkpoint-"
KEPT = 2


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that have gradients, and buffers."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if n.endswith("correction_bias")}
    return {**named, **fixed, **{n: b for n, b in model.named_buffers() if "inv_freq" not in n}}


class Checkpointed:
    """What `Finetuner` does about checkpoints instead of Trainer."""

    args: Any
    model: Any
    state: Any
    identity: Mapping[str, Any] = {}
    """What a checkpoint must be of to be taken up."""
    _staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or self.args.output_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write beside the others, then put the folder in its place whole."""
        home = Path(self.args.output_dir)
        name = f"{PREFIX}{self.state.global_step}"
        staging = home / ".part"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._wait()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._staging = None
        self._wait()
        if self.args.should_save:
            seal(staging / name, self.identity)
            shutil.rmtree(home / name, ignore_errors=True)
            (staging / name).rename(home / name)
            sync(home)
            for old in steps(home)[:-KEPT]:
                shutil.rmtree(home / f"{PREFIX}{old}")
        self._wait()

    def _wait(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What has been trained, in the names and layout that it has in memory."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            kept = {name: t.contiguous().cpu() for name, t in trained(self.model).items()}
            save_file(kept, folder / WEIGHTS)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        kept = load_file(Path(folder) / WEIGHTS)
        places = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in kept.items():
                places[name].copy_(tensor)


def seal(folder: Path, identity: Mapping[str, Any]) -> None:
    """Flush a checkpoint's files and write down their digests; it counts from here on."""
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    digests = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    write_json(folder / WHOLE, {"identity": dict(identity), "files": digests})
    sync(folder)


def steps(home: Path) -> list[int]:
    """The steps of the checkpoints that are there, in order."""
    names = [folder.name.removeprefix(PREFIX) for folder in home.glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def last_good(home: Path, identity: Mapping[str, Any], until: int | None = None) -> Path | None:
    """The last whole checkpoint, of a step not after `until`; None if there is none.

    Raises:
        MoefyError: code 7, when it is of another one, with what differs.
    """
    for step in reversed(steps(home)):
        folder = home / f"{PREFIX}{step}"
        if (until is None or step <= until) and _whole(folder, identity):
            return folder
    return None


def foreign(home: Path, identity: Mapping[str, Any]) -> list[str]:
    """What differs between the fine-tune that the checkpoints in `home` are of and this one, a line
    each."""
    for step in reversed(steps(home)):
        sealed = _sealed(home / f"{PREFIX}{step}")
        if sealed and (lines := differences(sealed["identity"], identity)):
            return lines
    return []


def _sealed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What `seal` wrote; None where it did not, or not whole."""
    try:
        value = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        return {key: dict(value[key]) for key in ("identity", "files")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(folder: Path, identity: Mapping[str, Any]) -> bool:
    if (sealed := _sealed(folder)) is None:
        return False
    if lines := differences(sealed["identity"], identity):
        raise MoefyError(f"{folder.parent} is of another fine-tune: {some(lines)}", code=7)
    files = sealed["files"]
    return all((folder / n).is_file() and sha256(folder / n) == d for n, d in files.items())
