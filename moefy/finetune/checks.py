"""Checks before a fine-tune opens a model: of the machine, and of the run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from moefy.config.finetune import Settings
from moefy.convert.prepare import check_device
from moefy.errors import MoefyError
from moefy.files.safetensors_header import read_entries
from moefy.finetune import losses
from moefy.finetune.inputs import Run
from moefy.finetune.memory import eight_bits
from moefy.finetune.train import device
from moefy.models import families
from moefy.text import chat
from moefy.text.tokenizer import load_tokenizer

LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Values of `log_to`, and the packages of which each needs one."""


def check_machine(settings: Settings) -> None:
    """Check the settings against this machine, its packages and the number of processes.

    Raises:
        MoefyError: code 2 for settings that do not fit, 5 for a missing device, package or folder.
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
        name = packages[0]
        raise MoefyError(f"--log-to {name} needs a package: pip install {name}", code=5)
    if settings.optimizer == "adamw-8bit":
        if not eight_bits():
            raise MoefyError(
                "--optimizer adamw-8bit needs a package: pip install 'moefy[8bit]'", code=5
            )
    compiled = settings.compile or settings.optimizer == "adamw-8bit"
    on_cpu = device(settings).type == "cpu"
    if compiled and on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        what = "--compile" if settings.compile else "--optimizer adamw-8bit"
        raise MoefyError(
            f"{what} needs a C++ compiler for this CPU, and there is no g++; install it, or name "
            "another by CXX",
            code=5,
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.refit_after and world > 1:
        raise MoefyError(
            f"refit_after with {world} processes is not supported; expected one, or "
            "refit_after=false",
            code=4,
        )
    if settings.fsdp not in (0, world):
        running = "there is 1 process" if world == 1 else f"there are {world} processes"
        raise MoefyError(
            f"fsdp is {settings.fsdp}, and {running}; expected as many: "
            f"torchrun --nproc-per-node={settings.fsdp} -m moefy finetune",
            code=2,
        )
    if settings.teacher_cache:
        try:
            Path(settings.teacher_cache).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoefyError(
                f"--teacher-cache {settings.teacher_cache}: {error.strerror}; expected a folder",
                code=5,
            ) from None


def may_answer(run: Run, settings: Settings) -> bool:
    """Whether there may be a last stage: one is asked for, or left to a preset, and the model has
    a chat template that tells which tokens are answers."""
    return settings.last_stage != 0 and chat.tells_answers(load_tokenizer(run.folder))


def check_run(run: Run, settings: Settings) -> None:
    """Check the settings against the run.

    Raises:
        MoefyError: code 2.
    """
    experts = run.summary["shape"]["num_experts"]
    if not experts and settings.train == "router":
        raise MoefyError(
            "--train router: a static run has no routers; expected all, experts or lora", code=2
        )
    weights = [getattr(settings, loss.weight) for loss in losses.active(settings, routers=False)]
    if not experts and not any(weights):
        raise MoefyError(
            "router_ce alone: a static run has no routers; give kl, ce or hidden a weight", code=2
        )
    shape = run.summary["shape"]
    if settings.anneal and not experts:
        raise MoefyError("--anneal: a static run has no experts; expected 0", code=2)
    for key in ("anneal", "refit_after", "router_ce") if run.copies else ():
        if value := getattr(settings, key):
            raise MoefyError(
                f"{key} is {value}: the experts of {run.folder} are copies, which all compute the "
                "same at first; expected a run that divides its FFNs, or no such setting",
                code=2,
            )
    if settings.anneal and (
        shape["num_shared"] + experts * shape["expert_width"] > shape["num_neurons"]
    ):
        raise MoefyError(
            "--anneal: experts that overlap are more than the dense model when all are on; "
            "expected 0, or a run without --overlap",
            code=4,
        )
    dense = families.load(run.summary["family"])
    if settings.refit_after and (dense.join or dense.behind or dense.biased or not experts):
        raise MoefyError(
            f"refit_after: {run.summary['family']} has a norm behind its FFN or biases in it, or "
            "the run no experts; expected refit_after=false",
            code=4,
        )
    if (parallel := settings.expert_parallel) and (not experts or experts % parallel):
        raise MoefyError(
            f"expert_parallel is {settings.expert_parallel}, and there are {experts} experts; "
            "expected a number that divides them",
            code=2,
        )
    if settings.last_stage > 0 and not may_answer(run, settings):
        raise MoefyError(
            "--last-stage: the model has no chat template, or it does not tell which tokens are "
            "answers; expected 0",
            code=4,
        )
    family = families.load(run.summary["family"])
    table = run.prefix + (family.positions or "")
    if (entry := read_entries(run.folder).get(table)) is not None:
        positions = entry.shape[0] - family.first_position
        if settings.sequence_length > positions:
            raise MoefyError(
                f"sequences of {settings.sequence_length} tokens, but the model has positions for "
                f"{positions}; lower --sequence-length",
                code=2,
            )
