"""Seconds and bytes of a training step, measured on the first layers of student and teacher."""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PrinterCallback, TrainerCallback

from moefy.config.finetune import Settings
from moefy.files.safetensors_header import read_entries
from moefy.finetune.anneal import Annealing, Start
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.collapse_guard import CollapseGuard
from moefy.finetune.inputs import ComputeDtypes, Run
from moefy.finetune.lora import adapted
from moefy.finetune.router_hooks import Routing
from moefy.finetune.teacher import Teacher, live
from moefy.finetune.train import arguments, device
from moefy.finetune.trainer import Finetuner, Setup, rows
from moefy.models.load import open_model, plain_config, runnable, some_layers

STEPS = 4
"""Steps of a probe: the first warms up and counts, the fastest of the others is taken."""

MORE = 3
"""Layers of the larger probe beside those of the smaller, at least: of one layer more the time is
lost in noise, which a model of 30 layers multiplies by 29."""

TRIED = 200_000_000
"""Weights that the larger probe may hold with more layers than those. Layers of a model that is
smaller are all tried: each was measured to take longer the more there are."""


@dataclass(frozen=True)
class Cost:
    """What a model takes."""

    compute_seconds: float = 0.0
    """For a token: forward and back, or forward alone for a teacher."""
    update_seconds: float = 0.0
    """For a step of the optimizer."""
    saved_bytes: float = 0.0
    """For a token: what is held for the way back."""
    num_trained: float = 0.0

    def extended(self, larger: Cost, layers: float) -> Cost:
        """The cost of a model that has `layers` times as many layers more as `larger` has."""
        return Cost(
            **{
                name: small + layers * max(0.0, large - small)
                for (name, small), large in zip(
                    vars(self).items(), vars(larger).values(), strict=True
                )
            }
        )


@dataclass(frozen=True)
class Probe:
    """The costs of student and teacher, all layers together."""

    student: Cost
    layer_bytes: float
    """What one layer of the student holds for the way back of a token."""
    teacher: Cost


def probe(
    run: Run,
    teacher: Path | None,
    settings: Settings,
    dtypes: ComputeDtypes,
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Train the first layers of a run for a moment, once with more of them, and count.

    What a layer more takes is taken for every other layer. The first ones go up to the first layer
    that was converted; there are three more with the others, or as many as have `TRIED` weights in
    all. A CPU trains on one sequence at a time, a GPU on a batch. Checkpointing of gradients is
    off, for it hides what a layer holds.
    """
    converted = [layer["layer"] for layer in run.summary["layers"]]
    total = plain_config(run.folder).get_text_config().num_hidden_layers
    first = min(total, min(converted, default=0) + 1)
    weights = sum(entry.num_elements for entry in read_entries(run.folder).values())
    most = min(total, max(first + MORE, total * TRIED // weights))
    with torch.random.fork_rng():  # Trainer seeds it
        # The larger one first: what a process does only once would make the smaller one too slow,
        # and a layer too fast.
        larger, smaller = (_student(run, settings, dtypes, count, clock) for count in (most, first))
    asked = Cost()
    if teacher:
        asked = _teacher(teacher, settings, dtypes.teacher.dtype, most, clock)
    gc.collect()  # a trainer and its callbacks hold each other
    whole = smaller.extended(larger, (total - first) / max(1, most - first))
    layer_bytes = max(0.0, larger.saved_bytes - smaller.saved_bytes) / max(1, most - first)
    return Probe(whole, layer_bytes, asked)


def _student(
    run: Run, settings: Settings, dtypes: ComputeDtypes, layers: int, clock: Callable[[], float]
) -> Cost:
    """The cost of the student's first layers."""
    config = some_layers(plain_config(run.folder), range(layers))
    model, _ = open_model(run.folder, config=config, dtype=dtypes.student.dtype)
    model = runnable(model).to(device(settings))
    if settings.train == "lora":
        model = adapted(model, settings.lora_rank)
    size = settings.batch_size if device(settings).type == "cuda" else 1
    num_rows = STEPS * size * int(os.environ.get("WORLD_SIZE", "1"))
    quick = dataclasses.replace(
        settings,
        batch_size=size,
        gradient_accumulation_steps=1,
        tokens=num_rows * settings.sequence_length,
        fsdp=0,
        expert_parallel=0,
        log_to="",
        measure_every=0,
        guard_restarts=0,
        gradient_checkpointing=False,
        compile=False,
        # No rate changes the time.
        learning_rate=0.0,
        router_learning_rate=0.0,
        rest_learning_rate=0.0,
    )
    ids_BT = _ids(run.vocab_size, num_rows, settings.sequence_length)
    tokens_TP = min(settings.top_tokens, run.vocab_size)
    targets = (
        torch.randint(run.vocab_size, (size, settings.sequence_length, tokens_TP)),
        torch.full((size, settings.sequence_length, tokens_TP), 1 / tokens_TP).log(),
    )
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(quick, Path(folder)).set_save("no")
        guard = CollapseGuard(quick)
        known = Teacher(
            lambda row_B, ids_BT: (targets[0].to(ids_BT.device), targets[1].to(ids_BT.device))
        )
        setup = Setup(
            quick,
            Routing(model, quick, copies=run.copies),
            guard,
            known,
            Checkpoints(Path(folder)),
            annealing=_all_on(run) if settings.anneal else None,
        )
        trainer = Finetuner(setup, model=model, args=options, train_dataset=rows(ids_BT))
        watch = Stopwatch(model, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        with saved_tensors_hooks(watch.saved, lambda tensor: tensor):
            trainer.train()
    tokens = size * settings.sequence_length
    return Cost(
        min(watch.compute[1:]) / tokens,
        min(watch.update[1:]),
        watch.num_bytes / tokens,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _all_on(run: Run) -> Annealing:
    """All experts in the first step, whose bytes count, and then as many as the run has."""
    shape = run.summary["shape"]
    start = Start(lambda model: {}, shape["num_experts"], shape["experts_per_token"], 1.0)
    return Annealing(start, 1)


class Stopwatch(TrainerCallback):
    """Seconds of each step, and the bytes that the first holds for its way back."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.compute: list[float] = []
        self.update: list[float] = []
        self._clock, self._began = clock, 0.0
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._sizes: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held, weights left out."""
        return sum(self._sizes.values())

    def saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, once for all that share its memory."""
        storage = tensor.untyped_storage()
        if not self.compute and storage.data_ptr() not in self._known:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forward and back are done."""
        self.compute.append(self._now() - self._began)
        self._began = self._now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weights are updated."""
        self.update.append(self._now() - self._began)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock()


def _teacher(
    folder: Path, settings: Settings, dtype: torch.dtype, most: int, clock: Callable[[], float]
) -> Cost:
    """The cost of asking the dense model, by its first `most` layers."""
    config = plain_config(folder)
    total = config.get_text_config().num_hidden_layers
    vocab_size = config.get_text_config().vocab_size
    size = settings.batch_size if device(settings).type == "cuda" else 1
    ids_BT = _ids(vocab_size, size, settings.sequence_length)
    costs = []
    for layers in (most, 1):
        model, _ = open_model(folder, config=some_layers(config, range(layers)), dtype=dtype)
        targets = live(model.eval().to(device(settings)), settings)
        seconds = []
        for _ in range(STEPS):
            began = clock()
            targets(torch.arange(size), ids_BT)[0].sum().item()  # waits for a GPU
            seconds.append(clock() - began)
        costs.append(Cost(min(seconds[1:]) / ids_BT.numel()))
    larger, smaller = costs
    return smaller.extended(larger, (total - 1) / max(1, most - 1))


def _ids(vocab_size: int, num: int, length: int) -> Tensor:
    return torch.randint(vocab_size, (num, length), generator=torch.Generator().manual_seed(0))
