"""Checkpoints of a fine-tune: each is complete, appears whole, and is resumed by its own run only.

Trainer's own checkpoints lose a MoE model's experts on resume, for their names on disk are not
those in memory. Trainer also writes them in place, and resumes those of any other run.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from moefy.environment import differences
from moefy.errors import MoefyError
from moefy.files.publish import file_digests, read_sealed, sync, sync_tree, write_sealed

WHOLE = "whole.json"
"""The record of `Checkpoints.seal`, written last."""

WEIGHTS = "trained.safetensors"
PREFIX = "checkpoint-"
NUM_KEPT = 2


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with gradients, selection biases, and buffers."""
    parameters = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or name.endswith("correction_bias")
    }
    return {**parameters, **{n: b for n, b in model.named_buffers() if "inv_freq" not in n}}


class Checkpointed:
    """A Trainer's methods for checkpoints, as `Finetuner` needs them."""

    accelerator: Any
    args: Any
    model: Any
    state: Any
    checkpoints: Checkpoints
    _staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or self.args.output_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write into a hidden folder, then rename that to a checkpoint."""
        home = Path(self.args.output_dir)
        name = f"{PREFIX}{self.state.global_step}"
        staging = home / ".part"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.checkpoints.seal(staging / name)
            shutil.rmtree(home / name, ignore_errors=True)
            (staging / name).rename(home / name)
            sync(home)
            self.checkpoints.prune()
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, under the names and in the layout that it has in memory."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: t.contiguous().cpu() for name, t in trained(self.model).items()}
            save_file(tensors, folder / WEIGHTS)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in load_file(Path(folder) / WEIGHTS).items():
                own[name].copy_(tensor)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one fine-tune, in one folder."""

    home: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides the weights: a checkpoint with another identity is not resumed."""

    def seal(self, folder: Path) -> None:
        """Make a checkpoint count: flush its files to disk, then record their digests."""
        sync_tree(folder)
        files = file_digests(folder)
        write_sealed(folder / WHOLE, {"identity": dict(self.identity), "files": files})

    def prune(self) -> None:
        """Remove all but the last checkpoints, and the best ones that these know of."""
        *others, _ = there = steps(self.home)
        kept = {*there[-NUM_KEPT:]}
        kept |= {_best(self.home / f"{PREFIX}{step}") for step in kept}
        for step in {*others} - kept:
            shutil.rmtree(self.home / f"{PREFIX}{step}")

    def drop_after(self, until: float) -> None:
        """Remove the checkpoints of steps after `until`."""
        for step in steps(self.home):
            if step > until:
                shutil.rmtree(self.home / f"{PREFIX}{step}")

    def last(self, until: float = math.inf) -> Path | None:
        """This fine-tune's last whole checkpoint of a step not after `until`; None without one."""
        for step, folder, record in self._records():
            if step <= until and not differences(record["identity"], self.identity):
                if record["files"] == file_digests(folder, without=(WHOLE,)):
                    return folder
        return None

    def differences(self) -> list[str]:
        """What differs from the identity of the checkpoints in the folder, a line each."""
        for _, _, record in self._records():
            if lines := differences(record["identity"], self.identity):
                return lines
        return []

    def _records(self) -> Iterator[tuple[int, Path, dict[str, Any]]]:
        """Steps, folders and records of the checkpoints that are whole, the last one first."""
        for step in reversed(steps(self.home)):
            folder, record = self.home / f"{PREFIX}{step}", None
            with contextlib.suppress(MoefyError):
                record = read_sealed(folder / WHOLE)
            if record:
                yield step, folder, record


def _best(folder: Path) -> int | None:
    """The step of least validation loss so far, as a checkpoint has recorded it."""
    with contextlib.suppress(OSError, ValueError):
        return TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).best_global_step


def steps(home: Path) -> list[int]:
    """The steps of the checkpoints that are there, in order."""
    names = [folder.name.removeprefix(PREFIX) for folder in home.glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())
