"""The run that is to be fine-tuned, its text and its teacher: all that can be refused at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.distributed.configuration_utils import DistributedConfig

from moefy.compute import ComputeDtype, compute_dtype, name_of
from moefy.config.finetune import Settings
from moefy.config.recipe import Recipe
from moefy.convert.memory import available
from moefy.convert.prepare import Watch
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import read_config, read_entries
from moefy.files.shards import stored_dtype
from moefy.finetune.routing import layers
from moefy.finetune.train import Text, device, num_steps, tokens_per_step
from moefy.models import families
from moefy.models.opening import check_loaded, open_model, plain_config
from moefy.runs import folder as runs
from moefy.text import packing
from moefy.text.self_text import sample
from moefy.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Opened:
    """A finished run of ours."""

    folder: Path
    summary: dict[str, Any]
    """Its conversion report."""
    recipe: Recipe
    config: dict[str, Any]
    digests: dict[str, str]
    """Of the files that its weights are in."""

    @property
    def layer(self) -> str:
        """What the names of a layer's tensors begin with."""
        return self.prefix + families.load(self.summary["family"]).layer

    @property
    def prefix(self) -> str:
        """What the names of all tensors begin with, before the dense model's."""
        return "dense." if self.summary["target"] == "moefy" else ""

    @property
    def vocab_size(self) -> int:
        """Embedding rows."""
        inner = self.config.get("dense", self.config)
        return int(inner["vocab_size"])


def open_run(folder: Path) -> Opened:
    """Read what is known of the run in `folder`, without a weight.

    Raises:
        MoefyError: code 3, when it is no whole run of ours; 4, for a model that predicts no next
            token.
    """
    summary = runs.open_run(folder)
    runs.read_tuning(folder)  # for one that is broken
    family, target = summary["family"], summary["target"]
    config = read_config(folder)
    if config.get("model_type") != target:
        raise MoefyError(
            f"{folder} holds a {config.get('model_type')} model, and its report is of {target}; "
            "convert again"
        )
    if summary.get("task", "ForCausalLM") != "ForCausalLM":
        raise MoefyError(f"{family} predicts no next token, by which models are tuned here", code=4)
    digests = {f.name: sha256(f) for f in sorted({e.file for e in read_entries(folder).values()})}
    return Opened(folder, summary, runs.read_recipe(folder), config, digests)


@dataclass(frozen=True)
class Computing:
    """The dtypes that student and teacher are opened in."""

    student: ComputeDtype
    teacher: ComputeDtype
    stored: torch.dtype
    """Of the run's weights."""

    def summary(self) -> dict[str, Any]:
        """What the report holds of it."""
        notes = dict.fromkeys(note for note in (self.student.note, self.teacher.note) if note)
        return {
            "student": self.student.name,
            "teacher": self.teacher.name,
            "stored": name_of(self.stored),
            "notes": list(notes),
        }


def computing(opened: Opened, teacher: Path | None, settings: Settings) -> Computing:
    """The dtypes to compute in on this machine; `teacher` is its folder, None where there is none.

    Raises:
        MoefyError: code 5, where what was asked for takes more memory than there is.
    """
    place = device(settings)
    trained = settings.train not in ("router", "lora")
    # In float32: a weight, and of one that is trained its gradient and two averages of those.
    needed = _num_weights(opened.folder) * (16 if trained else 4)
    needed += _num_weights(teacher) * 4 if teacher else 0
    copies = 1 if settings.fsdp else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = available() // copies
    if place.type == "cuda":
        room = torch.cuda.get_device_properties(place).total_memory

    def chosen(stored: torch.dtype) -> ComputeDtype:
        asked = settings.compute_dtype
        return compute_dtype(asked, stored, place, float32_bytes=needed, room=room)

    stored = stored_dtype(opened.folder)
    student = chosen(stored)
    return Computing(student, chosen(stored_dtype(teacher)) if teacher else student, stored)


def _num_weights(folder: Path) -> int:
    return sum(entry.num_elements for entry in read_entries(folder).values())


def one_dtype(folder: Path) -> bool:
    """Whether all weights in a folder have the same dtype."""
    return len({entry.dtype for entry in read_entries(folder).values()}) == 1


def load_student(opened: Opened, settings: Settings, dtype: torch.dtype) -> Any:
    """The model of the run in `dtype`, ready to be trained.

    Raises:
        MoefyError: code 3, when keys are missing or left over; 6, when not all of its routers are
            where they are looked for.
    """
    shared = {}
    if settings.fsdp:
        shared["distributed_config"] = DistributedConfig(
            fsdp_size=settings.fsdp, ep_size=settings.expert_parallel or None
        )
    model, info = open_model(opened.folder, dtype=dtype, **shared)
    check_loaded(opened.folder, info)
    count = len(opened.summary["layers"]) if opened.summary["shape"]["num_experts"] else 0
    if len(found := layers(model)) != count:
        raise MoefyError(
            f"{len(found)} of {count} routers found in {type(model).__name__}; expected all, or "
            "experts go without balance; use the transformers that the run was made with",
            code=6,
        )
    return model


def teacher_folder(opened: Opened, settings: Settings) -> tuple[Path, dict[str, str]]:
    """Where the teacher lies, and the digests of its files.

    Raises:
        MoefyError: code 3, when it is not the model that was converted, or has another vocabulary.
    """
    recipe = opened.recipe
    given = settings.teacher is not None
    dense = runs.dense_model(opened.folder, opened.summary, recipe, settings.teacher, "--teacher")
    folder = dense.folder
    config = read_config(folder)
    size = int(config.get("vocab_size", opened.vocab_size))
    if size != opened.vocab_size:
        raise MoefyError(
            f"the teacher {folder} has {size:,} tokens, the run {opened.vocab_size:,}; expected a "
            "teacher of the same vocabulary"
        )
    if given and _vocabulary(folder) != _vocabulary(opened.folder):
        raise MoefyError(
            f"the tokenizer of the teacher {folder} is not that of {opened.folder}; expected a "
            "teacher of the same vocabulary"
        )
    if given and settings.hidden and (sizes := _sizes(folder)) != _sizes(opened.folder):
        raise MoefyError(
            f"hidden is not 0, and the teacher {folder} has {sizes[0]} layers of {sizes[1]}; "
            "expected one of the run's sizes, or --set hidden=0"
        )
    return folder, dense.digests


def _sizes(folder: Path) -> tuple[int, int]:
    """Number of layers and hidden size."""
    config = plain_config(folder).get_text_config()
    return config.num_hidden_layers, config.hidden_size


def _vocabulary(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab()


def load_teacher(folder: Path, settings: Settings, dtype: torch.dtype) -> Any:
    """The dense model in `dtype`, to be asked only."""
    model, info = open_model(folder, dtype=dtype)
    check_loaded(folder, info)
    model.requires_grad_(False)
    return model.eval().to(device(settings))


def read_text(
    opened: Opened, settings: Settings, world: int, writer: Callable[[], Any], watch: Watch
) -> tuple[Text, Any]:
    """The tokens to train and to measure on, and what is known of them. `writer` gives the model
    that writes them, if it must.

    Raises:
        MoefyError: code 3, for a text that is too short, or a tokenizer that does not match.
    """
    length = settings.sequence_length
    wanted = num_steps(settings, world) * tokens_per_step(settings, world)
    total = wanted + settings.validation_tokens // length * length
    share = settings.validation_tokens / total
    tokenizer = load_tokenizer(opened.folder)
    shape = {"num_tokens": total, "length": length, "seed": settings.seed, "heldout": share}
    if settings.data == "self":

        def tick(done: int, of: int) -> None:
            watch("write text", done, of)

        tokens = sample(writer(), tokenizer, progress=tick, **shape)
    elif settings.text_field == packing.IDS:
        tokens = packing.load_ids(settings.data, vocab_size=opened.vocab_size, **shape)
    else:
        watch("read text", 0, 1)
        tokens = packing.load(
            tokenizer,
            settings.data,
            text_field=settings.text_field,
            vocab_size=opened.vocab_size,
            **shape,
        )
    rows, step = len(tokens.ids_BT) - tokens.num_heldout, settings.batch_size * settings.accumulate
    if rows < step * world:
        raise MoefyError(
            f"{settings.data}: {rows} sequences of {length} tokens to train on, and a step takes "
            f"{step * world}; give more text, or lower --batch-size or --accumulate"
        )
    return Text(tokens.ids_BT, tokens.num_heldout, tokens.sha256), tokens
