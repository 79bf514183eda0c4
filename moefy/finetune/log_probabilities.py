"""Log-probabilities of a few tokens at each position, from logits that are kept as they are.

The logits of a batch are its largest tensor: V is 49,152 to 262,144. Autograd's `logsumexp` and
`gather` would keep them in float32, and make two gradients of that size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits that are in float32 at a time: as few as a processor's cache holds, and on a GPU as many
as keep it busy (not measured)."""


def log_probabilities(
    logits_NV: Tensor, row_T: Tensor, next_T: Tensor, ids_TP: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `next_T` (T,) and, at `temperature`, of `ids_TP` (T, P), float32.

    Position t has the logits of row `row_T[t]`; no row may be named twice. The backward pass
    overwrites the logits with their gradient, so that no second tensor of that size exists.
    """
    return _LogProbabilities.apply(logits_NV, row_T, next_T, ids_TP, temperature)  # pyright: ignore


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        row_T: Tensor,
        next_T: Tensor,
        ids_TP: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        one_T = logits_NV.new_empty(len(row_T), dtype=torch.float32)
        some_TP = one_T.new_empty(ids_TP.shape)
        log_z_2T = one_T.new_empty(2, len(row_T))
        for part in _parts(logits_NV, len(row_T)):
            logits_CV = logits_NV[row_T[part]].float()
            log_z_2T[:, part] = logits_CV.logsumexp(-1)
            if temperature != 1 and ids_TP.numel():
                log_z_2T[1, part] = (logits_CV / temperature).logsumexp(-1)
            one_T[part] = logits_CV.gather(1, next_T[part, None])[:, 0] - log_z_2T[0, part]
            some_CP = logits_CV.gather(1, ids_TP[part]) / temperature
            some_TP[part] = some_CP - log_z_2T[1, part, None]
        ctx.save_for_backward(logits_NV, row_T, next_T, ids_TP, log_z_2T)
        ctx.temperature = temperature
        return one_T, some_TP

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_NV, row_T, next_T, ids_TP, log_z_2T = ctx.saved_tensors
        one_T, some_TP = gradients
        # d log p(i) / d logit(j) = [i = j] - p(j)
        for part in _parts(logits_NV, len(row_T)):
            logits_CV = logits_NV[row_T[part]].float()
            of_one_C1, of_some_CP = one_T[part, None], some_TP[part] / ctx.temperature
            of_all_C1 = of_some_CP.sum(1, keepdim=True)
            at_one_CV = (logits_CV - log_z_2T[0, part, None]).exp_()
            if ctx.temperature == 1:
                gradient_CV = at_one_CV.mul_(-of_one_C1 - of_all_C1)
            else:
                soft_CV = logits_CV.div_(ctx.temperature).sub_(log_z_2T[1, part, None]).exp_()
                gradient_CV = at_one_CV.mul_(-of_one_C1).sub_(soft_CV.mul_(of_all_C1))
            gradient_CV.scatter_add_(1, next_T[part, None], of_one_C1)
            gradient_CV.scatter_add_(1, ids_TP[part], of_some_CP)
            logits_NV[row_T[part]] = gradient_CV.to(logits_NV.dtype)
        unused_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
        unused_N[row_T] = False
        logits_NV[unused_N] = 0
        return logits_NV, None, None, None, None


def chunk(logits_NV: Tensor) -> int:
    """Rows of the logits that are looked at together: `CHUNK` logits, or one row."""
    return max(1, CHUNK.get(logits_NV.device.type, CHUNK["cuda"]) // logits_NV.shape[-1])


def _parts(logits_NV: Tensor, num_rows: int) -> list[slice]:
    size = chunk(logits_NV)
    return [slice(first, first + size) for first in range(0, num_rows, size)]
