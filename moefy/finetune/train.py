"""Train a loaded model: the student's side of a fine-tune, without files of a run."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.finetune import losses
from moefy.finetune.checkpoints import last_good
from moefy.finetune.collapse_guard import Guard, Trip, check_start
from moefy.finetune.lora import adapted, merged
from moefy.finetune.optim import round_weights
from moefy.finetune.router_noise import Explore
from moefy.finetune.routing import Routing, figures
from moefy.finetune.trainer import Finetuner, Rows, Targets

STRONGER = 4.0
"""What the weight of the balance is multiplied by after a collapse; rates are halved after a loss
that rises."""

CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@dataclass(frozen=True)
class Text:
    """Packed sequences: those to train on, then those to measure on; numbered throughout."""

    ids_BT: Tensor
    num_heldout: int
    sha256: str

    @property
    def train_BT(self) -> Tensor:
        """What is trained on."""
        return self.ids_BT[: -self.num_heldout]


@dataclass(frozen=True)
class Tuned:
    """A trained model and what is told of the training."""

    model: Any
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    validation: dict[str, dict[str, Any]]
    routing: dict[str, list[dict[str, Any]]]
    guard: list[dict[str, Any]]


@dataclass(frozen=True)
class Watchers:
    """Who is told what happens."""

    row: Callable[[dict[str, Any]], None] = lambda row: None
    """Takes a row of figures."""
    rewind: Callable[[int], None] = lambda step: None
    """Told that rows after a step are void."""
    watch: Callable[[str, int, int], None] = lambda *_: None


def device(settings: Settings) -> torch.device:
    """Where models are put."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def num_steps(settings: Settings, world: int) -> int:
    """Optimizer steps that make up the tokens asked for."""
    return math.ceil(settings.tokens / tokens_per_step(settings, world))


def tokens_per_step(settings: Settings, world: int) -> int:
    """Tokens of all processes that a step sees."""
    rows = settings.batch_size * settings.accumulate * world
    return rows * settings.sequence_length


def tune(
    load: Callable[[], Any],
    text: Text,
    settings: Settings,
    home: Path,
    *,
    targets: Targets | None = None,
    states: Callable[[Tensor], list[Tensor]] | None = None,
    identity: Mapping[str, Any] | None = None,
    stored: torch.dtype | None = None,
    watchers: Watchers = Watchers(),  # noqa: B008 - frozen
) -> Tuned:
    """Train what `load` gives, from the last checkpoint in `home` if there is one.

    `stored` is the dtype that the weights will be written in, to which they are rounded before they
    are measured.

    Where the guard stops the training, it goes back to the last good checkpoint, at most
    `guard_restarts` times, with stronger balancing or lower rates.

    Raises:
        MoefyError: code 6 when it goes wrong again after the last time.
    """
    identity = dict(identity or {})
    told: list[dict[str, Any]] = []
    weight, before = settings.balance_weight, None
    until: int | None = None
    while True:
        checkpoint = last_good(home, identity, until)
        model = load()
        if not settings.fsdp:  # then transformers has put each part where it belongs
            model = model.to(device(settings))
        if settings.train == "lora":
            model = adapted(model, settings.lora_rank)
        explore = Explore(
            settings.noise,
            settings.expert_dropout,
            settings.capacity,
            settings.warm_start,
            settings.explore_until,
        )
        routing = Routing(model, soft=settings.soft, explore=explore, worth=settings.router_ce > 0)
        measured = partial(measure, model, routing, text, targets, settings)
        if before is None:
            watchers.watch("measure", 0, 1)
            before = measured()
            check_start(before[0]["loss"])
        guard = Guard(
            settings.guard_steps,
            settings.dead_below,
            settings.guard_loss,
            [layer["dead"] for layer in before[1]],
            enabled=settings.guard_restarts > 0,
        )
        trainer = _trainer(model, text, settings, home, routing, guard, targets, states, watchers)
        trainer.balance_weight, trainer.identity = weight, identity
        trainer.measure = lambda measured=measured: measured()[0]
        if checkpoint:
            watchers.rewind(int(checkpoint.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if guard.trip is None:
            break
        if len(told) == settings.guard_restarts:
            raise MoefyError(
                f"step {guard.trip.step}: {guard.trip.reason}, after {len(told)} restarts; nothing "
                "was written; lower the learning rates or raise --balance-weight",
                code=6,
            )
        settings, weight, action = _stronger(guard.trip, settings, weight)
        until = guard.trip.good_until if until is None else min(until, guard.trip.good_until)
        back = last_good(home, identity, until)
        action = f"back to {back.name if back else 'the start'}, {action}"
        told.append({"step": guard.trip.step, "reason": guard.trip.reason, "action": action})
        watchers.row({"step": guard.trip.step, "guard": told[-1]})
        watchers.watch(f"guard: {guard.trip.reason}; {action}", 0, 1)
    model = merged(model)
    if stored is not None:
        round_weights(model, stored)
    after = measure(model, routing, text, targets, settings)
    done = trainer.state.global_step
    return Tuned(
        model,
        done,
        done * tokens_per_step(settings, trainer.args.world_size),
        trainer.last["seconds"],
        trainer.last["tokens_per_second"],
        {"before": before[0], "after": after[0]},
        {"before": before[1], "after": after[1]},
        told,
    )


def _stronger(trip: Trip, settings: Settings, weight: float) -> tuple[Settings, float, str]:
    """What is changed before the training goes on from a good checkpoint."""
    if "loss" in trip.reason:
        lower = {
            name: getattr(settings, name) / 2
            for name in ("learning_rate", "router_learning_rate", "rest_learning_rate")
        }
        return dataclasses.replace(settings, **lower), weight, "learning rates halved"
    stronger = weight * STRONGER or Settings.balance_weight
    balance = settings.balance if settings.balance in ("switch", "variation") else "switch"
    changed = dataclasses.replace(settings, balance=balance)
    return changed, stronger, f"{balance} balancing at weight {stronger:g}"


def _trainer(
    model: Any,
    text: Text,
    settings: Settings,
    home: Path,
    routing: Routing,
    guard: Guard,
    targets: Targets | None,
    states: Any,
    watchers: Watchers,
) -> Finetuner:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    total = num_steps(settings, world)

    def tell(row: dict[str, Any]) -> None:
        watchers.row(row)
        if "loss" in row:
            about = f"loss {row['loss']:.3f}"
            if "load_cv" in row:
                about += f", load CV {row['load_cv']:.2f}, {row['dead']} dead"
            rate = f"{row['tokens_per_second']:.0f} tokens/s"
            watchers.watch(f"train: {about}, {rate}", row["step"], total)

    if settings.log_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(home.parent / f"{home.name}-logs"))
    arguments = TrainingArguments(
        output_dir=str(home),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * total),
        max_grad_norm=settings.clip,
        **CHECKPOINTING if settings.gradient_checkpointing else {},
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        # Trainer cannot save the optimizer of a model that is shared among processes.
        save_strategy="no" if settings.fsdp else "steps",
        save_steps=settings.save_every,
        eval_strategy="steps" if settings.measure_every else "no",
        eval_steps=settings.measure_every or None,
        report_to=[settings.log_to] if settings.log_to else [],
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=settings.soft == "none",
    )
    trainer = Finetuner(
        model=model,
        args=arguments,
        train_dataset=Rows(text.train_BT),
        eval_dataset=Rows(text.ids_BT[-text.num_heldout :]),
        routing=routing,
        settings=settings,
        guard=guard,
        targets=targets,
        states=states,
        tell=tell if arguments.process_index == 0 else lambda row: None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(
    model: Any, routing: Routing, text: Text, targets: Targets | None, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss and KL on the text that is not trained on, and what the routers do there."""
    was_training = model.training
    model.eval()
    sums, loads, entropies = {"loss": 0.0}, [], []
    first, batch = len(text.train_BT), settings.batch_size
    count = 0
    for at in range(first, len(text.ids_BT), batch):
        ids_BT = text.ids_BT[at : at + batch].to(model.device)
        with torch.no_grad(), routing.recording() as layers:
            logits_TV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        log_z_T = logits_TV.float().logsumexp(-1)
        next_T = ids_BT[:, 1:].flatten()
        rows = len(ids_BT)
        sums["loss"] += rows * float(losses.next_token(logits_TV, next_T, log_z_T=log_z_T))
        if targets is not None:
            row_B = torch.arange(at, at + rows)
            ids_TP, log_p_TP = (t[:, :-1].flatten(0, 1) for t in targets(row_B, ids_BT))
            kl = losses.distillation(
                logits_TV.float(), ids_TP, log_p_TP, temperature=settings.temperature
            )
            sums["kl"] = sums.get("kl", 0.0) + rows * float(kl)
        for number, layer in enumerate(layers):
            assert layer.logits_TE is not None and layer.index_TK is not None
            load_E = losses.load(layer.index_TK, layer.num_experts)
            log_p_TE = layer.logits_TE.log_softmax(-1)
            entropy = rows * float(-(log_p_TE.exp() * log_p_TE).sum(-1).mean())
            if number == len(loads):
                loads.append(load_E)
                entropies.append(entropy)
            else:
                loads[number] = loads[number] + load_E
                entropies[number] += entropy
        routing.forget()
        count += rows
    model.train(was_training)
    told = [
        {"layer": n, **figures(load_E, entropy / count, settings.dead_below)}
        for n, (load_E, entropy) in enumerate(zip(loads, entropies, strict=True))
    ]
    found = {name: value / count for name, value in sums.items()}
    if told:
        found["load_cv"] = sum(t["load_cv"] for t in told) / len(told)
        found["entropy"] = sum(t["entropy"] for t in told) / len(told)
        found["dead"] = sum(t["dead"] for t in told)
    return found, told
