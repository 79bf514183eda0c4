"""The Trainer of transformers with our losses, parts, checkpoints and figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import StackDataset
from transformers import Trainer, TrainerCallback

from moefy.config import course
from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.finetune import last_stage, losses
from moefy.finetune.anneal import Annealing
from moefy.finetune.best import Best
from moefy.finetune.checkpoints import Checkpointed, Checkpoints
from moefy.finetune.collapse_guard import CollapseGuard
from moefy.finetune.losses import Batch, Routed
from moefy.finetune.optim import adamw, groups, learning_rates
from moefy.finetune.router_hooks import Layer, RouterStatistics, Routing, over_layers, update_bias
from moefy.finetune.teacher import Teacher


def rows(ids_BT: Tensor, learned_BT: Tensor | None = None) -> StackDataset:
    """Packed sequences, each with its number, and which of its tokens are learned."""
    columns: dict[str, Any] = {"input_ids": ids_BT, "row": torch.arange(len(ids_BT))}
    if learned_BT is not None:
        columns["learned"] = learned_BT
    return StackDataset(**columns)


@dataclass(frozen=True)
class Setup:
    """What a training needs beside Trainer's own arguments."""

    settings: Settings
    routing: Routing
    guard: CollapseGuard
    teacher: Teacher
    checkpoints: Checkpoints
    log: Callable[[dict[str, Any]], None] = lambda row: None
    """Takes a row of figures."""
    annealing: Annealing | None = None
    measure: Callable[[], tuple[dict[str, Any], Any]] = lambda: ({}, [])
    """Gives the figures on the validation text, and those of each layer."""
    num_last_steps: int = 0
    """Of the last stage."""


class Finetuner(Best, Checkpointed, Trainer, TrainerCallback):
    """A Trainer that distils, balances the experts and logs what they do, step by step."""

    def __init__(self, setup: Setup, **arguments: Any) -> None:
        self.setup, self.settings, self.routing = setup, setup.settings, setup.routing
        self.checkpoints = setup.checkpoints
        self.losses = losses.active(setup.settings, routers=bool(setup.routing.layers))
        self.needs = {need for loss in self.losses for need in loss.needs}
        self.weights: dict[str, float] = {}
        """The weights of the losses at this step."""
        self._start_step()
        self.began = (time.perf_counter(), 0)
        self.last: dict[str, Any] = {"seconds": 0.0, "tokens_per_second": 0.0}
        """The row of the last step; zeros where a resumed training has no step left."""
        super().__init__(**arguments)
        s = setup.settings
        given = {
            "router": s.router_learning_rate,
            "experts": s.learning_rate,
            "rest": s.rest_learning_rate,
        }
        self.rates = learning_rates(self.model, s.train, given, self.routing.scale, s.rate_factor)
        """By kind of weights, of those that training starts from: a resume brings others."""
        self.first_of_last = self.args.max_steps - setup.num_last_steps
        self.loss_is_scaled_for_ga = False
        self.add_callback(self)
        self.add_callback(setup.guard)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of this attempt."""
        self.began = (time.perf_counter(), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the share of the training that is done, and the weights of the losses."""
        self.routing.progress = state.global_step / max(1, state.max_steps)
        weights = {
            loss.name: course.at(getattr(self.settings, loss.weight), self.routing.progress)
            for loss in self.losses
        }
        annealed, last = self._anneal(state.global_step), state.global_step == self.first_of_last
        if annealed or last or weights != self.weights:
            self.weights = weights
            self.setup.guard.begin_phase()

    def _anneal(self, step: int) -> bool:
        """Set the experts per token, and add to the refit; whether the model is another now."""
        annealing = self.setup.annealing
        if annealing is None:
            return False
        annealed = step < annealing.num_steps
        self.routing.experts_per_token = annealing.experts(step) if annealed else None
        if not (share := annealing.added(step)):
            return False
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # unwrapped
        pairs = getattr(optimizer, "pairs", ())
        annealing.add(share, {id(weight): copy for weight, copy in pairs})
        return True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the step."""
        self.step_done()

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a learning rate for each part."""
        if self.optimizer is None:
            s = self.settings
            parameters = groups(self.model, s.train, self.rates)
            options = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": s.weight_decay}
            self.optimizer = adamw(parameters, s.optimizer, **options)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """What is logged: that of the experts, where they are trained."""
        rates: Any = self.optimizer.param_groups
        return float(next((g["lr"] for g in rates if g["part"] == "experts"), rates[0]["lr"]))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the settings, and behind it that of the last stage."""
        num_last = self.setup.num_last_steps
        before = num_training_steps - num_last
        result: Any = super().create_scheduler(before, optimizer)
        if num_last:
            result.lr_lambdas = [
                last_stage.schedule(one, before, num_last) for one in result.lr_lambdas
            ]
        return result

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, with the routers' gradients in units of the unscaled rows."""
        # Not by a hook on them: FSDP2 sets gradients past it.
        for layer in self.routing.layers:
            for parameter, small in layer.learned:
                if small and parameter.grad is not None:
                    parameter.grad.mul_(self.routing.scale)
        return super()._clip_grad_norm(model)

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict[str, Any]], float | None]:
        """The batches of a step, and the tokens that one of them learns, on average over all
        processes; None where all learn as many."""
        batches, _ = super().get_batch_samples(*arguments)
        learned = [batch["learned"][:, 1:].sum() for batch in batches if "learned" in batch]
        if not learned:
            return batches, None
        mean = torch.stack(learned).float().mean().to(self.args.device)
        return batches, float(self._sum(mean)) / self.args.world_size

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the active losses; `num_items_in_batch` as `get_batch_samples` gives
        it."""
        states = {"output_hidden_states": True} if losses.STATES in self.needs else {}
        with self.routing.recording() as layers:
            out = model(input_ids=inputs["input_ids"], use_cache=False, **states)
        batch = replace(self._batch(out, inputs, layers), num_learned=num_items_in_batch)
        values = {loss.name: loss.value(batch) for loss in self.losses}
        if self.state.global_step == 0:
            self._check_balance(values.get("aux"))
        used = {name: weight for name, weight in self.weights.items() if weight}
        total = torch.stack([weight * values[name] for name, weight in used.items()]).sum()
        if self.args.world_size > 1 and not used.keys() & {"ce", "kl"}:
            total = total + 0 * out.logits[..., 0].sum()  # processes wait for every gradient
        for name, value in {"loss": total, **values}.items():
            # Not as a number yet: a GPU would be waited for.
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        self.num_batches += 1
        self.statistics.add(batch.layers)
        self.routing.clear()
        return total

    def _batch(self, out: Any, inputs: dict[str, Any], layers: list[Layer]) -> Batch:
        ids_BT, teacher = inputs["input_ids"], self.setup.teacher
        states: dict[str, Any] = {}
        if losses.STATES in self.needs and teacher.states:
            states["states_LTD"] = [state.flatten(0, 1) for state in out.hidden_states[1:]]
            states["teacher_LTD"] = teacher.states(ids_BT)
        return text_batch(
            out.logits,
            ids_BT,
            teacher.targets(inputs["row"], ids_BT) if teacher.targets else None,
            self.settings.temperature,
            inputs.get("learned"),
            layers=[self._routed(layer) for layer in layers],
            **states,
        )

    def _routed(self, layer: Layer) -> Routed:
        """The record of a layer, with the load of all processes."""
        z_TE, index_TK = layer.logits_TE, layer.index_TK
        assert z_TE is not None and index_TK is not None
        load_E = self._sum(losses.load(index_TK, layer.num_experts))
        mean_E = None
        if losses.MEAN in self.needs:
            mean_E = self._sum(z_TE.detach().softmax(-1).mean(0)) / self.args.world_size
        return Routed(z_TE, index_TK, load_E, mean_E, layer.energy_TE)

    def _check_balance(self, aux: Tensor | None) -> None:
        """Check that the balancing loss, if there is one, can balance the experts.

        Raises:
            MoefyError: code 6, when there is none, or it is not above zero.
        """
        settings = self.settings
        balances = settings.balance in ("switch", "variation") and settings.balance_weight > 0
        if not balances or not self.routing.layers:
            return
        # Zero is the least value of the variation: that of experts which are all active.
        if aux is None or not (aux > 0 or (aux == 0 and settings.balance == "variation")):
            value = "missing" if aux is None else f"{float(aux.detach()):g}"
            raise MoefyError(
                f"the {settings.balance} balancing loss of the first step is {value}; expected "
                "more than 0; nothing was written; choose another --balance, or none",
                code=6,
            )

    def _sum(self, value: Tensor) -> Any:
        """The sum over all processes."""
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _mean(self, figures: dict[str, float]) -> dict[str, float]:
        """The means over all processes, which thus have the same figures."""
        if self.args.world_size == 1:
            return figures
        values = self._sum(torch.tensor(list(figures.values()), device=self.args.device))
        return dict(zip(figures, (values / self.args.world_size).tolist(), strict=True))

    def _start_step(self) -> None:
        self.sums: dict[str, Any] = {}
        self.num_batches = 0
        self.statistics = RouterStatistics(self.settings.dead_below)

    def step_done(self) -> None:
        """Pass the step's figures to the guard, and update the selection biases."""
        self.last, loads = self._row(), self.statistics.loads
        self.setup.guard.observe(self.state.global_step, self.last["loss"], loads)
        if self.settings.balance == "bias":
            for layer, load_E in zip(self.routing.layers, loads, strict=True):
                update_bias(layer, load_E, self.settings.bias_rate, self.routing.scale)
        self._start_step()

    def _row(self) -> dict[str, Any]:
        """The figures of a step."""
        means = self._mean({n: float(value) / self.num_batches for n, value in self.sums.items()})
        began, first = self.began
        seconds, step = time.perf_counter() - began, self.state.global_step
        tokens = self.settings.sequence_length * self.get_total_train_batch_size(self.args)
        return {
            "step": step,
            "tokens": step * tokens,
            "seconds": round(seconds, 2),
            "lr": self._get_learning_rate(),
            **means,
            **self._changing(),
            **over_layers(self.statistics.layers()),
            "tokens_per_second": round((step - first) * tokens / max(seconds, 1e-9), 2),
        }

    def _changing(self) -> dict[str, float]:
        """The weights that have a course, and the experts per token where they fall."""
        k = self.routing.experts_per_token
        return ({"experts_per_token": k} if k else {}) | {
            f"{loss.name}_weight": self.weights[loss.name]
            for loss in self.losses
            if isinstance(getattr(self.settings, loss.weight), str)
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the step's figures, and give them to Trainer's own integrations."""
        if "loss" in logs:
            logs |= {k: v for k, v in self.last.items() if k not in ("step", "lr", "loss")}
            self.setup.log({**self.last, "gradient_norm": logs.get("grad_norm")})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **rest: Any) -> dict[str, float]:
        """Measure on the validation text, and say so, or Trainer measures the last step twice."""
        figures = self._mean(self.setup.measure()[0])  # or they would choose different steps
        self.setup.log({"step": self.state.global_step, "validation": figures})
        self.log(metrics := {f"eval_{name}": value for name, value in figures.items()})
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def text_batch(
    logits_BTV: Tensor,
    ids_BT: Tensor,
    targets_BTP: tuple[Tensor, Tensor] | None,
    temperature: float,
    learned_BT: Tensor | None = None,
    **more: Any,
) -> Batch:
    """What the losses look at, over all positions that have a next token, and one to learn."""
    next_BT = ids_BT.roll(-1, 1)
    learned_BT = torch.ones_like(ids_BT, dtype=torch.bool) if learned_BT is None else learned_BT
    learned_BT = learned_BT.roll(-1, 1).to(ids_BT.device)
    learned_BT[:, -1] = False
    row_T = learned_BT.flatten().nonzero()[:, 0]

    def of(rows_BT: Tensor) -> Tensor:
        return rows_BT.flatten(0, 1)[row_T]

    targets_TP = (of(targets_BTP[0]), of(targets_BTP[1])) if targets_BTP else None
    return Batch(logits_BTV.flatten(0, 1), row_T, of(next_BT), temperature, targets_TP, **more)
