"""What a fine-tune minimises: the table of losses, and the functions behind it.

A new loss is an entry of `LOSSES`, and a field for its weight in `config.finetune.Settings`. Every
loss is a mean over all tokens. `V` is the vocabulary, `P` the teacher's tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    @property
    def share_E(self) -> Tensor:
        """The load as shares of all choices."""
        return self.load_E / self.load_E.sum().clamp(1)


@dataclass(frozen=True)
class Batch:
    """All that a loss may look at."""

    logits_TV: Tensor
    """Of all positions that have a next token, float32."""
    log_z_T: Tensor
    """Their logsumexp."""
    next_T: Tensor
    temperature: float = 1.0
    teacher_TP: tuple[Tensor, Tensor] | None = None
    """Ids and log-probabilities of the teacher's likeliest tokens."""
    states_LTD: Sequence[Tensor] = ()
    teacher_LTD: Sequence[Tensor] = ()
    layers: Sequence[Routed] = ()


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


def next_token(logits_TV: Tensor, next_T: Tensor, log_z_T: Tensor | None = None) -> Tensor:
    """Cross-entropy of the tokens that follow, nats. `log_z_T` is logsumexp of the logits."""
    log_z_T = logits_TV.logsumexp(-1) if log_z_T is None else log_z_T
    return (log_z_T - logits_TV.gather(1, next_T[:, None])[:, 0]).mean(0)


def distillation(
    logits_TV: Tensor,
    ids_TP: Tensor,
    log_p_TP: Tensor,
    *,
    temperature: float = 1.0,
    log_z_T: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) in nats over the teacher's likeliest tokens and the rest as one.

    `ids_TP` are the teacher's P likeliest tokens, `log_p_TP` their log-probabilities at
    `temperature`, minus infinity where a place is not used. With P = V this is the whole KL, with
    fewer a lower bound on it. `log_z_T` is logsumexp of `logits_TV / temperature`. Times the
    squared temperature, so that gradients are as large as at 1.

    Source: Hinton et al., 2015, arXiv:1503.02531, for the temperature.
    """
    if log_z_T is None:
        log_z_T = (logits_TV / temperature).logsumexp(-1)
    log_q_TP = logits_TV.gather(1, ids_TP) / temperature - log_z_T[:, None]
    p_TP, used_TP = log_p_TP.exp(), log_p_TP.isfinite()
    kl_T = torch.where(used_TP, p_TP * (log_p_TP - log_q_TP), 0).sum(-1)
    rest_T = (1 - p_TP.sum(-1)).clamp(0)
    other_T = (1 - torch.where(used_TP, log_q_TP, -torch.inf).exp().sum(-1)).clamp(TINY)
    return temperature**2 * (kl_T + rest_T.xlogy(rest_T) - rest_T * other_T.log()).mean(0)


def hidden_match(states_LTD: Sequence[Tensor], teacher_LTD: Sequence[Tensor]) -> Tensor:
    """Squared distance of the states behind every layer, relative to the teacher's square."""
    layers = []
    for state_TD, target_TD in zip(states_LTD, teacher_LTD, strict=True):
        error_T = (state_TD.float() - target_TD.float()).square().sum(-1)
        # Over the layer, not token by token: a few tokens have huge states.
        layers.append(error_T.mean(0) / target_TD.float().square().sum(-1).mean(0))
    return torch.stack(layers).mean()


def router_cross_entropy(logits_TE: Tensor, energy_TE: Tensor | None, k: int) -> Tensor:
    """Cross-entropy of the router's softmax to the `k` experts of most energy, 1 / k each, nats.

    Its least value is log k.
    """
    assert energy_TE is not None
    best_TK = energy_TE.topk(k, dim=-1).indices
    return -logits_TE.log_softmax(-1).gather(1, best_TK).mean(-1).mean(0)


def switch(logits_TE: Tensor, load_E: Tensor) -> Tensor:
    """The Switch auxiliary loss, E * sum over experts of load times mean probability.

    `load_E` are shares of all choices, summing to one, of all processes. 1 at balance, E if all
    tokens go to the same experts. (Classes of transformers that compute it count K there.)

    Source: Fedus et al., 2021, arXiv:2101.03961, equation 4.
    """
    return logits_TE.shape[1] * (load_E * logits_TE.softmax(-1).mean(0)).sum()


def variation(logits_TE: Tensor, mean_E: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' mean probability: 0 at balance.

    Softer than `switch`, for it looks at probabilities only. `mean_E` is the mean over all
    processes, where there are several: then the value is that of all, the gradient one's share.

    Source: Shazeer et al., 2017, arXiv:1701.06538, the importance loss.
    """
    share_E = logits_TE.softmax(-1).mean(0)
    if mean_E is not None:
        share_E = mean_E + share_E - share_E.detach()
    return len(share_E) * share_E.square().sum() - 1


def router_z(logits_TE: Tensor) -> Tensor:
    """Mean squared logsumexp of the router's logits, which keeps them small.

    Source: Zoph et al., 2022, arXiv:2202.08906, equation 5.
    """
    return logits_TE.logsumexp(-1).square().mean(0)


def load(index_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, float32 (E,); negative indices are no choice."""
    return index_TK[index_TK >= 0].bincount(minlength=num_experts)[:num_experts].float()


def _ce(batch: Batch) -> Tensor:
    return next_token(batch.logits_TV, batch.next_T, batch.log_z_T)


def _kl(batch: Batch) -> Tensor:
    assert batch.teacher_TP is not None
    return distillation(
        batch.logits_TV,
        *batch.teacher_TP,
        temperature=batch.temperature,
        log_z_T=batch.log_z_T if batch.temperature == 1 else None,
    )


def _per_layer(loss: Callable[[Routed], Tensor]) -> Callable[[Batch], Tensor]:
    """The mean over the MoE layers of a loss of one router."""
    return lambda batch: torch.stack([loss(layer) for layer in batch.layers]).mean()


LOSSES = (
    Loss("ce", "ce", _ce, free=True),
    Loss("kl", "kl", _kl, (TEACHER,)),
    Loss("hidden", "hidden", lambda b: hidden_match(b.states_LTD, b.teacher_LTD), (STATES,)),
    Loss(
        "aux",
        "balance_weight",
        _per_layer(lambda r: switch(r.logits_TE, r.share_E)),
        (ROUTERS,),
        balance="switch",
        free=True,
    ),
    Loss(
        "aux",
        "balance_weight",
        _per_layer(lambda r: variation(r.logits_TE, r.mean_E)),
        (ROUTERS, MEAN),
        balance="variation",
        free=True,
    ),
    Loss("z", "router_z", _per_layer(lambda r: router_z(r.logits_TE)), (ROUTERS,)),
    Loss(
        "router_ce",
        "router_ce",
        _per_layer(lambda r: router_cross_entropy(r.logits_TE, r.energy_TE, r.index_TK.shape[1])),
        (ROUTERS, ENERGY),
    ),
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
