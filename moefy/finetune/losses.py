"""What a fine-tune minimises: the table of losses, and the functions behind it.

A new loss is an entry of `LOSSES`, and a field for its weight in `config.finetune.Settings`. Losses
of the text are means over the tokens that are learned, those of routers over all. `V` is the
vocabulary, `P` the teacher's tokens that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.finetune.log_probabilities import log_probabilities

TEACHER, STATES = "the teacher's tokens", "hidden states of student and teacher"
ROUTERS, MEAN, ENERGY = "routers", "mean probabilities of all processes", "experts' energies"
"""What a loss may need beside the text. The trainer computes nothing that no loss needs."""

TINY = 1e-6
"""Least probability that is given to all the tokens that the teacher did not name."""


@dataclass(frozen=True)
class Routed:
    """What one MoE layer's router did."""

    logits_TE: Tensor
    index_TK: Tensor
    """The chosen experts; -1 for a choice that was dropped."""
    load_E: Tensor
    """How often each expert was chosen, in all processes."""
    mean_E: Tensor | None = None
    """Mean probability of each expert, in all processes."""
    energy_TE: Tensor | None = None
    """Squared norm of each expert's output."""


@dataclass(frozen=True)
class Batch:
    """All that a loss may look at."""

    logits_NV: Tensor
    """As the model gives them. The backward pass overwrites them."""
    row_T: Tensor
    """The row of each position that has a next token to learn."""
    next_T: Tensor
    temperature: float = 1.0
    teacher_TP: tuple[Tensor, Tensor] | None = None
    """Ids of the teacher's P likeliest tokens, and their log-probabilities at `temperature`; minus
    infinity in unused places."""
    states_LTD: Sequence[Tensor] = ()
    teacher_LTD: Sequence[Tensor] = ()
    layers: Sequence[Routed] = ()
    num_learned: float | None = None
    """Tokens to learn in a batch of this step, on average; None for as many as are in this one."""

    @functools.cached_property
    def log_p(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next tokens, and at `temperature` of the teacher's."""
        next_T = self.next_T
        ids_TP = self.teacher_TP[0] if self.teacher_TP else next_T.new_empty(len(next_T), 0)
        return log_probabilities(self.logits_NV, self.row_T, next_T, ids_TP, self.temperature)

    def over_tokens(self, value_T: Tensor) -> Tensor:
        """The mean, so that the mean over the batches of a step is that over its tokens.

        0 for a batch in which nothing is to be learned.
        """
        count = len(value_T) if self.num_learned is None else self.num_learned
        return value_T.sum(0) / max(1, count)


@dataclass(frozen=True)
class Loss:
    """One loss: its curve, its weight, and what it needs."""

    name: str
    """Of its curve in the log."""
    weight: str
    """The field of `Settings` that holds its weight."""
    value: Callable[[Batch], Tensor]
    needs: tuple[str, ...] = ()
    balance: str = ""
    """The value of `Settings.balance` that switches it on; empty for any value."""
    free: bool = False
    """It costs next to nothing, and its curve is logged at weight 0 as well."""


def next_token(batch: Batch) -> Tensor:
    """Cross-entropy of the tokens that follow, nats."""
    return batch.over_tokens(-batch.log_p[0])


def distillation(batch: Batch) -> Tensor:
    """KL(teacher || student) in nats over the teacher's likeliest tokens and the rest as one.

    With P = V this is the whole KL, with fewer tokens a lower bound on it. It is multiplied by the
    squared temperature, so that gradients are as large as at 1.

    Source: Hinton et al., 2015, arXiv:1503.02531, for the temperature.
    """
    assert batch.teacher_TP is not None
    log_p_TP, log_q_TP = batch.teacher_TP[1], batch.log_p[1]
    p_TP, used_TP = log_p_TP.exp(), log_p_TP.isfinite()
    kl_T = torch.where(used_TP, p_TP * (log_p_TP - log_q_TP), 0).sum(-1)
    rest_T = (1 - p_TP.sum(-1)).clamp(0)
    other_T = (1 - torch.where(used_TP, log_q_TP, -torch.inf).exp().sum(-1)).clamp(TINY)
    kl_T = kl_T + rest_T.xlogy(rest_T) - rest_T * other_T.log()
    return batch.temperature**2 * batch.over_tokens(kl_T)


def hidden_match(batch: Batch) -> Tensor:
    """Squared distance of the states behind every layer, relative to the teacher's square."""
    layers = []
    for state_TD, target_TD in zip(batch.states_LTD, batch.teacher_LTD, strict=True):
        error_T = (state_TD.float() - target_TD.float()).square().sum(-1)
        # Over the layer, not token by token: a few tokens have huge states.
        layers.append(error_T.mean(0) / target_TD.float().square().sum(-1).mean(0))
    return torch.stack(layers).mean()


def router_cross_entropy(layer: Routed) -> Tensor:
    """Cross-entropy of the router's softmax to the K experts of most energy, 1 / K each, nats.

    Its least value is log K.
    """
    assert layer.energy_TE is not None
    best_TK = layer.energy_TE.topk(layer.index_TK.shape[1], dim=-1).indices
    return -layer.logits_TE.log_softmax(-1).gather(1, best_TK).mean(-1).mean(0)


def switch(layer: Routed) -> Tensor:
    """The Switch auxiliary loss, E * sum over experts of share of the load times mean probability.

    1 at balance, E if all tokens go to the same experts. (Classes of transformers that compute it
    count K there.)

    Source: Fedus et al., 2021, arXiv:2101.03961, equation 4.
    """
    share_E = layer.load_E / layer.load_E.sum().clamp(1)
    return len(share_E) * (share_E * layer.logits_TE.softmax(-1).mean(0)).sum()


def variation(layer: Routed) -> Tensor:
    """Squared coefficient of variation of the experts' mean probability: 0 at balance.

    Softer than `switch`, for it only uses probabilities. With `mean_E` the value is that of all
    processes, and the gradient the part of this one.

    Source: Shazeer et al., 2017, arXiv:1701.06538, the importance loss.
    """
    share_E = layer.logits_TE.softmax(-1).mean(0)
    if layer.mean_E is not None:
        share_E = layer.mean_E + share_E - share_E.detach()
    return len(share_E) * share_E.square().sum() - 1


def router_z(layer: Routed) -> Tensor:
    """Mean squared logsumexp of the router's logits, which keeps them small.

    Source: Zoph et al., 2022, arXiv:2202.08906, equation 5.
    """
    return layer.logits_TE.logsumexp(-1).square().mean(0)


def load(index_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, float32 (E,); negative indices are no choice."""
    used_TK = (index_TK >= 0).float()  # no selection and no bincount: a GPU would be waited for
    load_E = used_TK.new_zeros(num_experts)
    return load_E.index_add_(0, index_TK.clamp(0).flatten(), used_TK.flatten())


def _mean(loss: Callable[[Routed], Tensor]) -> Callable[[Batch], Tensor]:
    """The mean over the MoE layers of a loss of one router."""
    return lambda batch: torch.stack([loss(layer) for layer in batch.layers]).mean()


AUX = ("aux", "balance_weight")
LOSSES = (
    Loss("ce", "ce", next_token, free=True),
    Loss("kl", "kl", distillation, (TEACHER,)),
    Loss("hidden", "hidden", hidden_match, (STATES,)),
    Loss(*AUX, _mean(switch), (ROUTERS,), balance="switch", free=True),
    Loss(*AUX, _mean(variation), (ROUTERS, MEAN), balance="variation", free=True),
    Loss("z", "router_z", _mean(router_z), (ROUTERS,)),
    Loss("router_ce", "router_ce", _mean(router_cross_entropy), (ROUTERS, ENERGY)),
)
"""All losses. The log has their curves in this order."""


def active(settings: Any, *, routers: bool = True) -> list[Loss]:
    """The losses that the settings ask for; without `routers` those that need none."""
    return [
        loss
        for loss in LOSSES
        if (loss.free or getattr(settings, loss.weight))
        and loss.balance in ("", settings.balance)
        and (routers or ROUTERS not in loss.needs)
    ]


def needs(settings: Any) -> set[str]:
    """What the active losses need."""
    return {need for loss in active(settings) for need in loss.needs}


def distils(settings: Any) -> bool:
    """Whether an active loss needs the teacher."""
    return bool(needs(settings) & {TEACHER, STATES})
