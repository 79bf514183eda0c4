"""The Trainer of transformers with our losses, parts, checkpoints and figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.finetune import losses
from moefy.finetune.checkpoints import Checkpointed
from moefy.finetune.collapse_guard import Guard
from moefy.finetune.optim import MasterAdamW, groups
from moefy.finetune.routing import Layer, Routing, even_out, figures
from moefy.models.targets.target import ROUTER_SCALE

Targets = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
BALANCED = {"switch": losses.switch, "variation": losses.variation}


class Rows(Dataset):
    """Packed sequences, each with its number."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def __len__(self) -> int:
        return len(self.ids_BT)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_BT[row], "row": torch.tensor(row)}


class Finetuner(Checkpointed, Trainer):
    """A Trainer that distils, balances and tells what the experts do.

    `targets` gives what the teacher expects of some rows; `states` the teacher's hidden states.
    """

    def __init__(
        self,
        *args: Any,
        routing: Routing,
        settings: Settings,
        guard: Guard,
        targets: Targets | None = None,
        states: Callable[[Tensor], list[Tensor]] | None = None,
        tell: Callable[[dict[str, Any]], None] = lambda row: None,
        measure: Callable[[], dict[str, Any]] = dict,
        balance_weight: float | None = None,
        **rest: Any,
    ) -> None:
        self.routing, self.settings, self.guard = routing, settings, guard
        self.targets, self.states, self.tell, self.measure = targets, states, tell, measure
        self.balance_weight = settings.balance_weight if balance_weight is None else balance_weight
        self.sums: dict[str, float] = {}
        self.loads: list[Tensor] = []
        self.entropies: list[float] = []
        self.began = (time.perf_counter(), 0)
        # Of the last step; where a resume finds none left to do, of none.
        self.last: dict[str, Any] = {"seconds": 0.0, "tokens_per_second": 0.0}
        super().__init__(*args, **rest)
        self.loss_is_scaled_for_ga = False
        self.add_callback(_Progress(self))
        self.add_callback(guard)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a learning rate for each part."""
        if self.optimizer is None:
            s = self.settings
            rates = {
                "router": s.router_learning_rate,
                "experts": s.learning_rate,
                "rest": s.rest_learning_rate,
            }
            made = groups(self.model, s.train, rates)
            options = {"lr": s.learning_rate, "betas": (0.9, 0.95), "weight_decay": s.weight_decay}
            whole = all(p.dtype == torch.float32 for group in made for p in group["params"])
            kind = torch.optim.AdamW if whole else MasterAdamW
            self.optimizer = kind(made, fused=True, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, the routers' gradients being those of the rows as meant: 2^10 times as small."""
        # Not by a hook on the rows: FSDP2 sets gradients past it.
        for layer in self.routing.layers:
            if layer.rows.grad is not None:
                layer.rows.grad.mul_(ROUTER_SCALE)
        return super()._clip_grad_norm(model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the losses that are switched on."""
        ids_BT = inputs["input_ids"]
        more = {"output_hidden_states": True} if self.settings.hidden else {}
        with self.routing.recording() as layers:
            out = model(input_ids=ids_BT, use_cache=False, **more)
        found = self._text_losses(out, ids_BT, inputs["row"])
        found |= self._router_losses(layers)
        if self.state.global_step == 0:
            self._check_balance(found.get("aux"))
        s = self.settings
        weights = {
            "kl": s.kl,
            "ce": s.ce,
            "hidden": s.hidden,
            "aux": self.balance_weight,
            "z": s.router_z,
            "router_ce": s.router_ce,
        }
        total = torch.stack([weights[n] * value for n, value in found.items() if weights[n]]).sum()
        self._note(total, found, layers)
        self.routing.forget()
        return (total, out) if return_outputs else total

    def _check_balance(self, aux: Tensor | None) -> None:
        """Refuse to train where the loss that is to keep the experts balanced has no say.

        Raises:
            MoefyError: code 6, when there is none, or it is not above zero.
        """
        asked = self.settings.balance in BALANCED and self.balance_weight > 0
        if not asked or not self.routing.layers:
            return
        # Zero is the least value of the variation, and what it is where all experts run.
        if aux is None or not (aux > 0 or (aux == 0 and self.settings.balance == "variation")):
            value = "missing" if aux is None else f"{float(aux.detach()):g}"
            raise MoefyError(
                f"the {self.settings.balance} balancing loss of the first step is {value}; "
                "expected more than 0; nothing was written; choose another --balance, or none",
                code=6,
            )

    def _text_losses(self, out: Any, ids_BT: Tensor, row_B: Tensor) -> dict[str, Tensor]:
        """Of the logits and hidden states, over all places that have a next token."""
        logits_TV = out.logits[:, :-1].flatten(0, 1).float()
        log_z_T = logits_TV.logsumexp(-1)
        found = {"ce": losses.next_token(logits_TV, ids_BT[:, 1:].flatten(), log_z_T=log_z_T)}
        if self.targets is not None:
            temperature = self.settings.temperature
            ids_TP, log_p_TP = (t[:, :-1].flatten(0, 1) for t in self.targets(row_B, ids_BT))
            found["kl"] = losses.distillation(
                logits_TV,
                ids_TP,
                log_p_TP,
                temperature=temperature,
                log_z_T=log_z_T if temperature == 1 else None,
            )
        if self.states is not None:
            own = [state.flatten(0, 1) for state in out.hidden_states[1:]]
            found["hidden"] = losses.hidden_match(own, self.states(ids_BT))
        return found

    def _router_losses(self, layers: list[Layer]) -> dict[str, Tensor]:
        """Means over the MoE layers; the load is that of all processes."""
        if not layers:
            return {}
        balance = BALANCED.get(self.settings.balance)
        rows: dict[str, list[Tensor]] = {"aux": [], "z": [], "router_ce": []}
        self.step_loads = []
        for layer in layers:
            z_TE, index_TK = layer.logits_TE, layer.index_TK
            assert z_TE is not None and index_TK is not None
            load_E = self._all(losses.load(index_TK, layer.num_experts))
            self.step_loads.append(load_E)
            if balance is losses.switch:
                rows["aux"].append(losses.switch(z_TE, load_E / load_E.sum().clamp(1)))
            elif balance is losses.variation:
                mean_E = self._all(z_TE.detach().softmax(-1).mean(0)) / self.args.world_size
                rows["aux"].append(losses.variation(z_TE, mean_E))
            if self.settings.router_z:
                rows["z"].append(losses.router_z(z_TE))
            if self.settings.router_ce and layer.worth_TE is not None:
                k = index_TK.shape[1]
                rows["router_ce"].append(losses.router_cross_entropy(z_TE, layer.worth_TE, k))
        return {name: torch.stack(values).mean() for name, values in rows.items() if values}

    def _all(self, value: Tensor) -> Any:
        """The sum over all processes."""
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _note(self, total: Tensor, found: dict[str, Tensor], layers: list[Layer]) -> None:
        """Add to the sums that `log` tells the means of."""
        for name, value in {"loss": total, **found}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.sums["count"] = self.sums.get("count", 0) + 1
        if not layers:
            return
        if not self.loads:
            self.loads = [torch.zeros_like(load_E) for load_E in self.step_loads]
            self.entropies = [0.0] * len(layers)
        for number, layer in enumerate(layers):
            assert layer.logits_TE is not None
            self.loads[number] += self.step_loads[number]
            log_p_TE = layer.logits_TE.detach().log_softmax(-1)
            self.entropies[number] += float(-(log_p_TE.exp() * log_p_TE).sum(-1).mean())

    def step_done(self) -> None:
        """Feed the guard, and the selection biases."""
        count = max(1, self.sums.get("count", 1))
        loss = self.sums.get("loss", 0.0) / count
        if self.args.world_size > 1:
            loss = float(self._all(torch.tensor(loss, device=self.args.device)))
            loss /= self.args.world_size
        self.guard.saw(self.state.global_step, loss, self.loads)
        if self.settings.balance == "bias":
            for layer, load_E in zip(self.routing.layers, self.loads, strict=True):
                even_out(layer, load_E, self.settings.bias_rate)
        row = self._row(loss, count)
        self.sums, self.loads, self.entropies = {}, [], []
        self.last = row

    def _row(self, loss: float, count: float) -> dict[str, Any]:
        """What is told of a step."""
        made = {name: value / count for name, value in self.sums.items() if name != "count"}
        if self.args.world_size > 1:
            values = torch.tensor(list(made.values()), device=self.args.device)
            means = self._all(values) / self.args.world_size
            made = dict(zip(made, means.tolist(), strict=True))
        began, first = self.began
        seconds, step = time.perf_counter() - began, self.state.global_step
        tokens = self.settings.sequence_length * self.get_total_train_batch_size(self.args)
        row = {"step": step, "tokens": step * tokens, "seconds": round(seconds, 2)}
        row |= {"lr": self._get_learning_rate(), **made}
        if self.loads:
            told = [
                figures(load_E, entropy / count, self.settings.dead_below)
                for load_E, entropy in zip(self.loads, self.entropies, strict=True)
            ]
            row["load_cv"] = sum(t["load_cv"] for t in told) / len(told)
            row["entropy"] = sum(t["entropy"] for t in told) / len(told)
            row["dead"] = sum(t["dead"] for t in told)
        row["tokens_per_second"] = round((step - first) * tokens / max(seconds, 1e-9), 2)
        return row

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell Trainer's own integrations what is known of the step beside their usual figures."""
        if "loss" in logs:
            logs |= {k: v for k, v in self.last.items() if k not in ("step", "lr", "loss")}
            self.tell({**self.last, "gradient_norm": logs.get("grad_norm")})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **rest: Any) -> dict[str, float]:
        """Measure on the validation text."""
        found = self.measure()
        self.tell({"step": self.state.global_step, "validation": found})
        told = {f"eval_{name}": value for name, value in found.items()}
        self.log(told)
        return told


class _Progress(TrainerCallback):
    """Tells the hooks how far training is, and the trainer when a step is done."""

    def __init__(self, trainer: Finetuner) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.began = (time.perf_counter(), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.routing.progress = state.global_step / max(1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.step_done()
