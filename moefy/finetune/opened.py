"""The run that is to be fine-tuned, its text and its teacher: all that can be refused at once."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moefy import data, families, runs
from moefy.errors import MoefyError
from moefy.finetune.routing import layers
from moefy.finetune.settings import Settings
from moefy.finetune.tune import Text, device, num_steps, tokens_per_step
from moefy.headers import read_config, read_entries
from moefy.job import Watch, check_device
from moefy.publish import sha256
from moefy.recipe import Recipe
from moefy.self_text import sample
from moefy.tokenizer import load_tokenizer


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
        prefix = "dense." if self.summary["target"] == "moefy" else ""
        return prefix + families.load(self.summary["family"]).layer

    @property
    def vocab_size(self) -> int:
        """Embedding rows."""
        inner = self.config.get("dense", self.config)
        return int(inner["vocab_size"])


LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Packages, one of which a value of `log_to` needs."""


def check_machine(settings: Settings) -> None:
    """Refuse what this machine, its packages or the number of processes cannot do.

    Raises:
        MoefyError: code 2 for what was asked wrongly, 5 for what is not there.
    """
    check_device(settings.device)
    if ":" in settings.device:
        _, _, number = settings.device.partition(":")
        raise MoefyError(
            f"--device is {settings.device!r}; expected auto, cpu or cuda, and the GPU by "
            f"CUDA_VISIBLE_DEVICES={number}",
            code=2,
        )
    packages = LOGGERS.get(settings.log_to, ())
    if packages and not any(map(importlib.util.find_spec, packages)):
        named = packages[0]
        raise MoefyError(f"--log-to {named}: no such package; pip install {named}", code=5)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.fsdp not in (0, world):
        raise MoefyError(
            f"fsdp is {settings.fsdp}, and {world} processes run; start as many: torchrun "
            f"--nproc-per-node={settings.fsdp} -m moefy finetune ...",
            code=2,
        )


def open_run(folder: Path) -> Opened:
    """Read what is known of the run in `folder`, without a weight.

    Raises:
        MoefyError: code 3, when it is no whole run of ours; 4, for a model that predicts no next
            token.
    """
    summary = runs.open_run(folder)
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


def load_student(opened: Opened, settings: Settings) -> Any:
    """The model of the run, ready to be trained.

    Raises:
        MoefyError: code 3, when keys are missing or left over; 6, when not all of its routers are
            where they are looked for.
    """
    dtype = "auto" if settings.dtype == "as-stored" else getattr(torch, settings.dtype)
    shared = {}
    if settings.fsdp:
        shared["distributed_config"] = DistributedConfig(
            fsdp_size=settings.fsdp, ep_size=settings.expert_parallel or None
        )
    found: Any = AutoModelForCausalLM.from_pretrained(
        opened.folder, dtype=dtype, local_files_only=True, output_loading_info=True, **shared
    )
    model, info = found
    if wrong := {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}:
        raise MoefyError(f"{opened.folder} does not load cleanly: {wrong}")
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
    return folder, dense.digests


def _vocabulary(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab()


def load_teacher(folder: Path, settings: Settings) -> Any:
    """The dense model, to be asked only."""
    dtype = "auto" if settings.dtype == "as-stored" else getattr(torch, settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.requires_grad_(False)
    return model.eval().to(device(settings))


def read_text(opened: Opened, settings: Settings, world: int, watch: Watch) -> tuple[Text, Any]:
    """The tokens to train and to measure on, and what is known of them.

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
        folder, _ = teacher_folder(opened, settings)
        writer = load_teacher(folder, settings)

        def tick(done: int, of: int) -> None:
            watch("write text", done, of)

        tokens = sample(writer, tokenizer, progress=tick, **shape)
    elif settings.text_field == data.IDS:
        tokens = data.load_ids(settings.data, vocab_size=opened.vocab_size, **shape)
    else:
        watch("read text", 0, 1)
        tokens = data.load(
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
