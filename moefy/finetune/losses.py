"""What a fine-tune minimises: functions of tensors, each a mean over the tokens that count.

`mask_T` is true where a token counts; None stands for all. `V` is the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(
    logits_TV: Tensor, next_T: Tensor, mask_T: Tensor | None = None, log_z_T: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the tokens that follow, nats. `log_z_T` is logsumexp of the logits."""
    log_z_T = logits_TV.logsumexp(-1) if log_z_T is None else log_z_T
    return mean(log_z_T - logits_TV.gather(1, next_T[:, None])[:, 0], mask_T)


def distillation(
    logits_TV: Tensor,
    ids_TP: Tensor,
    log_p_TP: Tensor,
    mask_T: Tensor | None = None,
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
    return temperature**2 * mean(kl_T + rest_T.xlogy(rest_T) - rest_T * other_T.log(), mask_T)


TINY = 1e-6
"""Least probability that is given to all the tokens that the teacher did not name."""


def hidden_match(states_LTD: list[Tensor], teacher_LTD: list[Tensor], mask_T: Tensor | None = None):
    """Squared distance of the states behind every layer, relative to the teacher's square."""
    layers = []
    for state_TD, target_TD in zip(states_LTD, teacher_LTD, strict=True):
        wrong_T = (state_TD.float() - target_TD.float()).square().sum(-1)
        # Over the layer, not token by token: a few tokens have huge states.
        layers.append(mean(wrong_T, mask_T) / mean(target_TD.float().square().sum(-1), mask_T))
    return torch.stack(layers).mean()


def router_cross_entropy(
    logits_TE: Tensor, worth_TE: Tensor, k: int, mask_T: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the router's softmax to the `k` experts of most worth, 1 / k each, nats.

    Its least value is log k.
    """
    best_TK = worth_TE.topk(k, dim=-1).indices
    return mean(-logits_TE.log_softmax(-1).gather(1, best_TK).mean(-1), mask_T)


def switch(logits_TE: Tensor, load_E: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """The Switch auxiliary loss, E * sum over experts of load times mean probability.

    `load_E` are shares of all choices, summing to one, of all processes. 1 at balance, E if all
    tokens go to the same experts. (Classes of transformers that compute it count K there.)

    Source: Fedus et al., 2021, arXiv:2101.03961, equation 4.
    """
    return logits_TE.shape[1] * (load_E * mean(logits_TE.softmax(-1), mask_T)).sum()


def variation(
    logits_TE: Tensor, mean_E: Tensor | None = None, mask_T: Tensor | None = None
) -> Tensor:
    """Squared coefficient of variation of the experts' mean probability: 0 at balance.

    Softer than `switch`, for it looks at probabilities only. `mean_E` is the mean over all
    processes, where there are several: then the value is that of all, the gradient one's share.

    Source: Shazeer et al., 2017, arXiv:1701.06538, the importance loss.
    """
    share_E = mean(logits_TE.softmax(-1), mask_T)
    if mean_E is not None:
        share_E = mean_E + share_E - share_E.detach()
    return len(share_E) * share_E.square().sum() - 1


def router_z(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the router's logits, which keeps them small.

    Source: Zoph et al., 2022, arXiv:2202.08906, equation 5.
    """
    return mean(logits_TE.logsumexp(-1).square(), mask_T)


def load(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, float32 (E,); negative indices are no choice."""
    index_TK = index_TK if mask_T is None else index_TK[mask_T]
    return index_TK[index_TK >= 0].bincount(minlength=num_experts)[:num_experts].float()


def mean(value_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the tokens that count, which are the first axis."""
    return (value_T if mask_T is None else value_T[mask_T]).mean(0)
