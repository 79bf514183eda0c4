"""Checkpoints of a fine-tune: each is complete, appears whole, and is resumed by its own run only.

Trainer's own checkpoints lose a MoE model's experts on resume, for their names on disk are not
those in memory. Trainer also writes them in place, resumes those of any other run, and cannot write
a model that is shared among processes. Here `torch.distributed.checkpoint` writes all tensors by
name, each process its part, and any number of processes can read them.
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
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from moefy.distributed import ALONE, Group
from moefy.environment import differences
from moefy.errors import MoefyError
from moefy.files.publish import read_sealed, sha256, sync, sync_tree, write_sealed
from moefy.finetune.optim import state_tensors

WHOLE = "whole.json"
"""The record of `Checkpoints.seal`, written last."""

TENSORS = "tensors"
"""The folder of the tensors in a checkpoint."""

WEIGHT = "weight."
"""What the names of the model's tensors begin with, as those of the optimizer do not."""

PREFIX = "checkpoint-"
NUM_KEPT = 2


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with gradients, selection biases, and buffers."""
    _reshard(model)
    parameters = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or name.endswith("correction_bias")
    }
    return {**parameters, **{n: b for n, b in model.named_buffers() if "inv_freq" not in n}}


def _reshard(model: nn.Module) -> None:
    """Have each process hold its part alone: a forward pass leaves some weights gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors, each process its parts. All processes must call it.

    Raises:
        MoefyError: code 5, when one of them cannot write.
    """
    parts = {name: _one_block(tensor) for name, tensor in tensors.items()}
    try:
        save(parts, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise MoefyError(
            f"writing {folder} failed: {reason}; earlier checkpoints are whole: make room and run "
            "the same command again",
            code=5,
        ) from None


def load_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors with what other processes, more or fewer, may have written."""
    parts = {name: _one_block(tensor) for name, tensor in tensors.items()}
    load(parts, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
    for name, tensor in tensors.items():
        if (part := parts[name]) is not tensor:
            assert isinstance(tensor, DTensor) and isinstance(part, DTensor)
            tensor.copy_(part.redistribute(placements=tensor.placements))


def _one_block(tensor: Tensor) -> Tensor:
    """The tensor, but with one block of rows for each process.

    Where experts and their rows are shared by different processes, a process has rows from several
    places, and `torch.distributed.checkpoint` takes them for one block.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    dims = [getattr(placement, "dim", None) for placement in tensor.placements]
    blocks = tuple(
        placement if dim is None or size == 1 else Shard(dim)
        for placement, dim, size in zip(
            tensor.placements, dims, tensor.device_mesh.shape, strict=True
        )
    )
    return tensor if blocks == tensor.placements else tensor.redistribute(placements=blocks)


class Checkpointed:
    """A Trainer's methods for checkpoints, as `Finetuner` needs them."""

    accelerator: Any
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    checkpoints: Checkpoints
    _save_rng_state: Any
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
            (staging / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._staging = None
        self._save_rng_state(str(staging / name))
        if self.args.should_save and (best := self.state.best_model_checkpoint):
            # Where it will lie, as transformers looks for it on resume.
            self.state.best_model_checkpoint = str(home / Path(best).name)
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        if self.args.should_save and self.args.world_size > 1:  # for a resume on one process
            shutil.copyfile(staging / name / "rng_state_0.pth", staging / name / "rng_state.pth")
        self.accelerator.wait_for_everyone()
        self.checkpoints.seal(staging / name)
        if self.args.should_save:
            shutil.rmtree(home / name, ignore_errors=True)
            (staging / name).rename(home / name)
            sync(home)
            self.checkpoints.prune()
        self.accelerator.wait_for_everyone()

    def _states(self) -> dict[str, Tensor]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return state_tensors(optimizer, self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write all tensors, the optimizer's too: Trainer refuses those of a shared model."""
        weights = {f"{WEIGHT}{name}": tensor for name, tensor in trained(self.model).items()}
        folder = Path(output_dir or self.args.output_dir) / TENSORS
        save_tensors({**weights, **self._states()}, folder)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        _reshard(self.model)
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        stored = FileSystemReader(Path(folder) / TENSORS).read_metadata().state_dict_metadata
        names = [name for name in stored if name.startswith(WEIGHT)]
        weights = {name: own[name.removeprefix(WEIGHT)].detach() for name in names}
        load_tensors(weights, Path(folder) / TENSORS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the optimizer's tensors, and set the schedule to the step.

        It is a function of the step, so that it follows the rates of these settings, which the
        guard may have lowered.
        """
        if checkpoint is None:
            return
        load_tensors(self._states(), Path(checkpoint) / TENSORS)
        step, schedule = self.state.global_step, self.lr_scheduler
        schedule.last_epoch, schedule._step_count = step - 1, step + 1
        schedule.step()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one fine-tune, in one folder that all its processes share."""

    home: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides the weights: a checkpoint with another identity is not resumed."""
    group: Group = ALONE

    def seal(self, folder: Path) -> None:
        """Make a checkpoint count: flush its files to disk, then record their digests.

        All processes must call it.
        """
        files = self._digests(folder)
        if self.group.rank == 0:
            sync_tree(folder)
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
        """This fine-tune's last whole checkpoint of a step not after `until`; None without one.

        All processes must call it.
        """
        for step, folder, record in self.group.broadcast_object([*self._records()]):
            if step <= until and not differences(record["identity"], self.identity):
                if record["files"] == self._digests(folder):
                    return folder
        return None

    @property
    def stored(self) -> dict[str, Any]:
        """The identity of the last whole checkpoint in the folder; empty without one."""
        return next((record["identity"] for _, _, record in self._records()), {})

    def differences(self) -> list[str]:
        """What differs from the identity of the checkpoints in the folder, a line each."""
        for _, _, record in self._records():
            if lines := differences(record["identity"], self.identity):
                return lines
        return []

    def _digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of a checkpoint's files by name; each is read by one of the processes."""
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != WHOLE)
        names = self.group.broadcast_object(sorted(str(p.relative_to(folder)) for p in paths))
        own = {name: sha256(folder / name) for name in names[self.group.rank :: self.group.size]}
        parts = self.group.all_objects(own)
        return {name: digest for part in parts for name, digest in part.items()}

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
