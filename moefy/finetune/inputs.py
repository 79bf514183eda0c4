"""The inputs of a fine-tune, checked before it starts: a run, its dtypes and its teacher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.distributed.configuration_utils import DistributedConfig

from moefy.compute_dtype import ComputeDtype, compute_dtype, name_of
from moefy.config.finetune import Settings
from moefy.config.recipe import Recipe
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import read_config, read_entries
from moefy.files.shards import stored_dtype
from moefy.finetune import losses
from moefy.finetune.router_hooks import moe_layers
from moefy.finetune.train import device
from moefy.memory import available, base_bytes, require
from moefy.models import families
from moefy.models.load import check_loaded, open_model, plain_config, runnable
from moefy.runs import folder as runs
from moefy.text import packing
from moefy.text.self_text import DOCUMENT, WriterSizes, sample
from moefy.text.tokenizer import load_tokenizer
from moefy.text.tokens import Tokens


@dataclass(frozen=True)
class Run:
    """A finished run of moefy."""

    folder: Path
    summary: dict[str, Any]
    """Its conversion report."""
    recipe: Recipe
    config: dict[str, Any]
    digests: dict[str, str]
    """SHA-256 of its weight files."""

    @property
    def layer(self) -> str:
        """The prefix of a layer's tensor names."""
        return self.prefix + families.load(self.summary["family"]).layer

    @property
    def prefix(self) -> str:
        """The prefix that the target adds to the dense model's tensor names."""
        return "dense." if self.summary["target"] == "moefy" else ""

    @property
    def copies(self) -> bool:
        """Whether its experts are copies of the dense FFN."""
        return self.summary["shape"].get("granularity", 0) > 0

    @property
    def vocab_size(self) -> int:
        """Number of embedding rows."""
        return int(self.config.get("dense", self.config)["vocab_size"])


def open_run(folder: Path) -> Run:
    """Read the records of the run in `folder`, but no weight.

    Raises:
        MoefyError: code 3, when it is no whole run of ours; 4, for a model that predicts no next
            token.
    """
    summary = runs.open_run(folder)
    runs.read_tuning(folder)  # raises if it is broken
    family, target = summary["family"], summary["target"]
    config = read_config(folder)
    if config.get("model_type") != target:
        raise MoefyError(
            f"{folder} holds a {config.get('model_type')} model, and its report is of {target}; "
            "convert again"
        )
    if summary.get("task", "ForCausalLM") != "ForCausalLM":
        raise MoefyError(f"{family} predicts no next token; expected a model that does", code=4)
    digests = {f.name: sha256(f) for f in sorted({e.file for e in read_entries(folder).values()})}
    return Run(folder, summary, runs.read_recipe(folder), config, digests)


@dataclass(frozen=True)
class ComputeDtypes:
    """The dtypes in which student and teacher compute."""

    student: ComputeDtype
    teacher: ComputeDtype
    stored: torch.dtype
    """Of the run's weights."""

    def summary(self) -> dict[str, Any]:
        """The entry `compute` of the report."""
        notes = dict.fromkeys(note for note in (self.student.note, self.teacher.note) if note)
        return {
            "student": self.student.name,
            "teacher": self.teacher.name,
            "stored": name_of(self.stored),
            "notes": list(notes),
        }


def compute_dtypes(run: Run, teacher: Path | None, settings: Settings) -> ComputeDtypes:
    """The dtypes to compute in on this machine; `teacher` is its folder, None without a teacher.

    Raises:
        MoefyError: code 5 when the requested dtype takes more memory than there is.
    """
    place = device(settings)
    trained = settings.train not in ("router", "lora")
    # In float32: a weight, and for a trained one its gradient and two moments.
    needed = num_weights(run.folder) * (16 if trained else 4)
    needed += num_weights(teacher) * 4 if teacher else 0
    copies = 1 if settings.fsdp else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = available() // copies
    if place.type == "cuda":
        room = torch.cuda.get_device_properties(place).total_memory

    choose = partial(
        compute_dtype, settings.compute_dtype, device=place, float32_bytes=needed, room=room
    )
    stored = stored_dtype(run.folder)
    student = choose(stored)
    return ComputeDtypes(student, choose(stored_dtype(teacher)) if teacher else student, stored)


def num_weights(folder: Path) -> int:
    """Number of weights in the files of a folder."""
    return sum(entry.num_elements for entry in read_entries(folder).values())


def one_dtype(folder: Path) -> bool:
    """Whether all weights in a folder have the same dtype."""
    return len({entry.dtype for entry in read_entries(folder).values()}) == 1


def load_student(run: Run, settings: Settings, dtype: torch.dtype) -> Any:
    """The model of the run in `dtype`.

    Raises:
        MoefyError: code 3 for missing or unexpected keys; 6 for a number of routers that is not
            the run's.
    """
    shared = {}
    if settings.fsdp:
        shared["distributed_config"] = DistributedConfig(
            fsdp_size=settings.fsdp, ep_size=settings.expert_parallel or None
        )
    model, info = open_model(run.folder, dtype=dtype, **shared)
    check_loaded(run.folder, info)
    count = len(run.summary["layers"]) if run.summary["shape"]["num_experts"] else 0
    if (num_found := len(moe_layers(model))) != count:
        raise MoefyError(
            f"{num_found} of {count} routers found in {type(model).__name__}; expected all, or "
            "experts go without balance; use the transformers that the run was made with",
            code=6,
        )
    return runnable(model)


def teacher_folder(run: Run, settings: Settings) -> tuple[Path, dict[str, str]]:
    """The folder of the teacher, and the digests of its files.

    Raises:
        MoefyError: code 3, when it is not the model that was converted, or has another vocabulary.
    """
    dense = runs.dense_model(run.folder, run.summary, run.recipe, settings.teacher, "--teacher")
    folder = dense.folder
    size = int(read_config(folder).get("vocab_size", run.vocab_size))
    if size != run.vocab_size:
        raise MoefyError(
            f"the teacher {folder} has {size:,} tokens, the run {run.vocab_size:,}; expected a "
            "teacher of the same vocabulary"
        )
    if settings.teacher is None:
        return folder, dense.digests
    if load_tokenizer(folder).get_vocab() != load_tokenizer(run.folder).get_vocab():
        raise MoefyError(
            f"the tokenizer of the teacher {folder} is not that of {run.folder}; expected a "
            "teacher of the same vocabulary"
        )
    if losses.STATES in losses.needs(settings):
        states_to_match(run, folder)
    return folder, dense.digests


def states_to_match(run: Run, teacher: Path) -> list[int]:
    """For each layer of the run, the layer of the teacher whose states it is to match.

    Raises:
        MoefyError: code 3, for a teacher of other sizes than the run or its dense model.
    """
    (own, hidden), (count, width) = _sizes(run.folder), _sizes(teacher)
    dropped = run.summary.get("dropped_layers", [])
    if width != hidden or count not in (own, own + len(dropped)):
        raise MoefyError(
            f"hidden is not 0, and the teacher {teacher} has {count} layers of {width}; expected "
            "one of the run's sizes, or --set hidden=0"
        )
    kept = [layer for layer in range(count) if count == own or layer not in dropped]
    return [*kept[:-1], count - 1]  # the last states are behind the final norm


def _sizes(folder: Path) -> tuple[int, int]:
    """Number of layers and hidden size."""
    config = plain_config(folder).get_text_config()
    return config.num_hidden_layers, config.hidden_size


def load_teacher(folder: Path, settings: Settings, dtype: torch.dtype) -> Any:
    """The dense model in `dtype`, without gradients."""
    model, info = open_model(folder, dtype=dtype)
    check_loaded(folder, info)
    model.requires_grad_(False)
    return model.eval().to(device(settings))


def write_text(
    folder: Path,
    settings: Settings,
    dtype: torch.dtype,
    amount: packing.Amount,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Tokens:
    """Text that the dense model in `folder` writes, as many documents at a time as fit in memory.

    Raises:
        MoefyError: code 5 when not even one fits.
    """
    what = "a model that writes its own training text"
    batch_size = batch_that_fits(folder, dtype, DOCUMENT, what, "give a --data FILE")
    model = load_teacher(folder, settings, dtype)
    tokenizer = load_tokenizer(folder)
    return sample(model, tokenizer, amount, batch_size=batch_size, progress=progress)


def batch_that_fits(folder: Path, dtype: torch.dtype, length: int, what: str, instead: str) -> int:
    """How many texts of `length` tokens the model in `folder` can write at a time in memory.

    Raises:
        MoefyError: code 5 when not even one fits; it says what takes that much, and what to do
            `instead`.
    """
    config = plain_config(folder).get_text_config()
    entries = read_entries(folder).values()
    sizes = WriterSizes(entries, config.to_dict(), config.num_hidden_layers, length)
    batch_size = sizes.batch_size(dtype.itemsize, available() - base_bytes(folder))
    require(sizes.num_bytes(dtype.itemsize, batch_size), what, instead)
    return batch_size
