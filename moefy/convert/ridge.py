"""Regularised least squares, the one closed form that routers and refits are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.types import PIECE, pieces

TINY = torch.finfo(torch.float32).tiny


def damping(gram_AA: Tensor, strength: float) -> float:
    """What `ridge` adds to the diagonal."""
    # Made contiguous: the order of the sum decides its last bit.
    return max(float(gram_AA.diagonal().contiguous().mean()) * strength, TINY)


def ridge(gram_AA: Tensor, cross_AB: Tensor, strength: float) -> Tensor:
    """Solve (G + strength * mean(diag G) * I) W = C for W, shape (A, B).

    With G = X'X and C = X'Y this is ridge regression of Y on X without intercept.
    """
    return solver(gram_AA, strength)(cross_AB)


def solver(gram_AA: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """What solves the equations of `ridge` for a C, by one factorisation for all.

    Of G only the lower triangle is read. It is damped in place and restored, because a copy of it
    may be the largest tensor there is. Falls back to float64 where float32 rounding has left G
    indefinite.
    """
    diagonal_A = gram_AA.diagonal().clone()
    gram_AA.diagonal().add_(damping(gram_AA, strength))
    factor_AA, failed = torch.linalg.cholesky_ex(gram_AA)
    if failed:
        factor_AA = gram_AA.double().tril_()
        factor_AA += factor_AA.tril(-1).T
        factor_AA, pivot_A = torch.linalg.lu_factor(factor_AA)
    gram_AA.diagonal().copy_(diagonal_A)

    def solve(cross_AB: Tensor) -> Tensor:
        if failed:
            return torch.linalg.lu_solve(factor_AA, pivot_A, cross_AB.double()).to(cross_AB.dtype)
        # As `cholesky_solve` does it, which copies the factor first.
        half_AB = torch.linalg.solve_triangular(factor_AA, cross_AB, upper=False)
        return torch.linalg.solve_triangular(factor_AA.mT, half_AB, upper=True)

    return solve


def scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The scores of all tokens, (T, E), where the weights are."""
    return torch.cat([x_CD @ weight_ED.T for x_CD in pieces(x_TD, weight_ED.device)])


def scorer(
    x_TD: Tensor, strength: float = 1e-2, gram_DD: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Prepare to fit linear routers on the FFN inputs `x_TD`; give a function that fits one.

    `gram_DD` is X'X in float64, where that is known. The function takes the experts' output
    energies (T, E) and returns router rows (E, D) that
    rank the experts of each token: ridge regression of the root energies, centred over the
    experts of each token (only their order matters). Rows are scaled together so that scores have
    unit variance over `x_TD`, and sum to zero.

    Source: closed-form routers as in HARC (arXiv 2606.03391); the root, rather than the log,
    because errors on experts that hardly fire should not count.
    """
    gram_DD = (x_TD.T @ x_TD).double() if gram_DD is None else gram_DD.clone()
    gram_DD.diagonal().add_(max(float(gram_DD.diagonal().mean()) * strength, TINY))
    factor_DD = torch.linalg.cholesky(gram_DD)

    def fit(energy_TE: Tensor) -> Tensor:
        root_TE = energy_TE.sqrt()
        root_TE = root_TE - root_TE.mean(1, keepdim=True)
        # A tenth of the time that x_TD.T takes.
        parts = zip(root_TE.split(PIECE), pieces(x_TD, root_TE.device), strict=True)
        first, *more = (root_CE.T @ x_CD for root_CE, x_CD in parts)
        cross_DE = sum(more, first.double()).T
        weight_DE = torch.cholesky_solve(cross_DE, factor_DD).float()
        return (weight_DE / scores(x_TD, weight_DE.T).std().clamp_min(TINY)).T.contiguous()

    return fit
