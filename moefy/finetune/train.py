"""Train a loaded model: the student's side of a fine-tune, without the files of a run."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.finetune import last_stage, losses
from moefy.finetune.anneal import Start, begin
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.collapse_guard import CollapseGuard, check_start
from moefy.finetune.heldout import measure
from moefy.finetune.lora import adapted
from moefy.finetune.optim import round_weights
from moefy.finetune.router_hooks import Routing
from moefy.finetune.teacher import Teacher
from moefy.finetune.trainer import Finetuner, Setup, rows
from moefy.progress import Watch
from moefy.text.tokens import Tokens

STRONGER = 4.0
"""Factor on the balance weight after a collapse. After a loss that rises, rates are halved."""

MEASUREMENTS = 4
"""On the validation text in a training, where the settings do not say how often."""

CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@dataclass(frozen=True)
class Student:
    """The model to train."""

    load: Callable[[], Any]
    """Gives it as it is before the training."""
    stored: torch.dtype | None = None
    """The dtype of the weights on disk: they are rounded to it before they are measured."""
    start: Start | None = None
    """Where an annealed training begins; None for the model as it is."""
    copies: bool = False
    """Whether its experts are copies of an FFN."""


@dataclass(frozen=True)
class Trained:
    """A trained model and the figures of its training."""

    model: Any
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    validation: dict[str, dict[str, Any]]
    routing: dict[str, list[dict[str, Any]]]
    guard: list[dict[str, Any]]
    rates: dict[str, float]
    """The learning rate of each kind of weights."""
    selected: dict[str, Any] | None = None
    """The step whose weights these are, by which figure, and its value there and at the end."""
    refit: dict[str, Any] | None = None
    """By which figure the refit after the training was judged, and whether it was kept."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called while training runs."""

    log: Callable[[dict[str, Any]], None] = lambda row: None
    """With a row of figures."""
    rewind: Callable[[int], None] = lambda step: None
    """With a step; the rows after it are void."""
    progress: Watch = lambda *_: None
    """With a stage, and how much of it is done."""


def device(settings: Settings) -> torch.device:
    """The device of the models."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def num_steps(settings: Settings, world: int) -> int:
    """Optimizer steps that make up the tokens asked for."""
    return math.ceil(settings.tokens / tokens_per_step(settings, world))


def num_last_steps(settings: Settings, world: int) -> int:
    """The steps of these that are the last stage's: at least one, if there is one, and not all."""
    steps = num_steps(settings, world)
    return min(steps - 1, max(1, round(settings.last_stage * steps))) if settings.last_stage else 0


def tokens_per_step(settings: Settings, world: int) -> int:
    """Tokens of all processes that a step sees."""
    return sequences_per_step(settings, world) * settings.sequence_length


def sequences_per_step(settings: Settings, world: int) -> int:
    """Sequences of all processes that a step sees.

    A step takes the same ones however they are dealt out to processes, batches and accumulation.
    """
    return settings.batch_size * settings.gradient_accumulation_steps * world


def train(
    student: Student,
    tokens: Tokens,
    settings: Settings,
    checkpoints: Checkpoints,
    *,
    teacher: Teacher = Teacher(),  # noqa: B008 - frozen
    callbacks: Callbacks = Callbacks(),  # noqa: B008 - frozen
    restarts: Sequence[dict[str, Any]] = (),
) -> Trained:
    """Train a model, from the last checkpoint if there is one.

    Where the guard stops the training, it restarts from the last good checkpoint, at most
    `guard_restarts` times, with stronger balancing or lower rates. `restarts` are the rows of those
    that it made before this training was stopped: they hold on.

    Raises:
        MoefyError: code 6 when it goes wrong again after the last time.
    """
    restarts = list(restarts)
    for row in restarts:
        settings, _ = _stronger(row["reason"], settings)
    before: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
    until, sequences = math.inf, rows(tokens.ids_BT, tokens.learned_BT)
    while True:
        model, routing = _opened(student, settings)
        validate = partial(measure, model, routing, tokens, teacher, settings)
        if before is None:
            callbacks.progress("measure", 0, 1)
            before = validate()
            check_start(before[0]["loss"])
        guard = CollapseGuard(settings, [layer["load_E"] for layer in before[1]])
        options = arguments(settings, checkpoints.home)
        annealing = None
        if student.start:
            num_steps = round(settings.anneal * options.max_steps)
            annealing = begin(student.start, model, num_steps)
            routing.gate = student.start.gate
        log = partial(_log, callbacks, options.max_steps)
        step = sequences_per_step(settings, options.world_size)
        num_rows = step * options.max_steps
        order = last_stage.order(tokens.rows, tokens.num_last, num_rows, settings.seed)
        trainer = Finetuner(
            Setup(
                settings,
                routing,
                guard,
                teacher,
                checkpoints,
                log,
                annealing,
                validate,
                tokens.num_last // step,
            ),
            model=model,
            args=options,
            train_dataset=Subset(sequences, order),
            eval_dataset=Subset(sequences, range(-tokens.num_heldout, 0)),
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = checkpoints.last(until)
        if checkpoint:
            callbacks.rewind(int(checkpoint.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if guard.failure is None:
            break
        if len(restarts) == settings.guard_restarts:
            raise MoefyError(
                f"step {guard.failure.step}: {guard.failure.reason}, after {len(restarts)} "
                "restarts; nothing was written; lower the learning rates or raise --balance-weight",
                code=6,
            )
        settings, change = _stronger(guard.failure.reason, settings)
        until = min(until, guard.failure.last_good_step)
        if trainer.is_world_process_zero():
            checkpoints.drop_after(until)
        trainer.accelerator.wait_for_everyone()
        back = checkpoints.last(until)
        action = f"back to {back.name if back else 'the start'}, {change}"
        row = {"step": guard.failure.step, "reason": guard.failure.reason, "action": action}
        restarts.append(row)
        callbacks.log({"step": guard.failure.step, "guard": row})
        callbacks.progress(f"guard: {guard.failure.reason}; {action}", 0, 1)
        del model, routing, validate, guard, annealing, trainer
        gc.collect()  # they hold each other, and the optimizer's moments
    selected = trainer.take_best()
    if selected:
        figures = "step {step} is the best, {by} {value:.4f}; {last:.4f} at the end"
        callbacks.progress(f"train: {figures.format_map(selected)}", 0, 1)
    if settings.train == "lora":
        model = model.merge_and_unload()
    if student.stored is not None:
        round_weights(model, student.stored)
    after = measure(model, routing, tokens, teacher, settings)
    steps = trainer.state.global_step
    return Trained(
        model,
        steps * tokens_per_step(settings, trainer.args.world_size),
        steps,
        trainer.last["seconds"],
        trainer.last["tokens_per_second"],
        {"before": before[0], "after": after[0]},
        {"before": before[1], "after": after[1]},
        restarts,
        trainer.rates,
        selected,
    )


def _opened(student: Student, settings: Settings) -> tuple[Any, Routing]:
    """A fresh model on its device, and the hooks on its routers."""
    model = student.load()
    if not settings.fsdp:  # then transformers has put each part where it belongs
        model = model.to(device(settings))
    if settings.train == "lora":
        model = adapted(model, settings.lora_rank)
    routing = Routing(model, settings, copies=student.copies)
    if settings.compile:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # all of transformers' layers are
                module.compile()
    return model, routing


def slower(settings: Settings, times: float) -> Settings:
    """The settings with all learning rates divided, those that are given and those by size."""
    names = ("learning_rate", "router_learning_rate", "rest_learning_rate", "rate_factor")
    rates = {name: rate for name in names if (rate := getattr(settings, name)) is not None}
    return dataclasses.replace(settings, **{name: rate / times for name, rate in rates.items()})


def _stronger(reason: str, settings: Settings) -> tuple[Settings, str]:
    """The settings after a restart, and what has changed in words."""
    if "loss" in reason:
        return slower(settings, 2), "learning rates halved"
    weight = settings.balance_weight * STRONGER or Settings.balance_weight
    balance = settings.balance if settings.balance in ("switch", "variation") else "switch"
    changed = dataclasses.replace(settings, balance=balance, balance_weight=weight)
    return changed, f"{balance} balancing at weight {weight:g}"


def _log(callbacks: Callbacks, num_steps: int, row: dict[str, Any]) -> None:
    callbacks.log(row)
    if "loss" in row:
        figures = f"loss {row['loss']:.3f}"
        if "load_cv" in row:
            figures += f", load CV {row['load_cv']:.2f}, {row['dead']} dead"
        figures += f", {row['tokens_per_second']:.0f} tokens/s"
        callbacks.progress(f"train: {figures}", row["step"], num_steps)


def arguments(settings: Settings, home: Path) -> TrainingArguments:
    """The settings as Trainer's arguments."""
    if settings.log_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(home.parent / f"{home.name}-logs"))
    total = num_steps(settings, int(os.environ.get("WORLD_SIZE", "1")))
    every = settings.measure_every
    every = max(1, total // MEASUREMENTS) if every is None else every
    distils = any(loss.name == "kl" for loss in losses.active(settings))
    return TrainingArguments(
        output_dir=str(home),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        # Trainer's `constant` has no warm-up.
        lr_scheduler_type=settings.schedule.replace("constant", "constant_with_warmup"),
        warmup_steps=round(settings.warmup_ratio * total),
        max_grad_norm=settings.max_grad_norm,
        **CHECKPOINTING if settings.gradient_checkpointing else {},
        seed=settings.seed,
        train_sampling_strategy="sequential",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        save_strategy="steps",
        save_only_model=True,  # `Checkpointed` adds what a resume needs
        save_steps=settings.save_every,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        metric_for_best_model=("kl" if distils else "loss") if every else None,
        greater_is_better=False,
        report_to=[settings.log_to] if settings.log_to else [],
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=settings.router_gradient == "none",
    )
