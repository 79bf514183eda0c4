"""The load is evened out at the least cost, by rows alone."""

import pytest
import torch
from planted import seeded

from moefy.convert.load_balance import SHARES, balance
from moefy.convert.routed_ffn import top_mask


def gram(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.double().T @ x_TD.double()


def skewed(seed: int = 0, experts: int = 8, size: int = 16):
    """Inputs with a mean, rows of which some are favoured by it, and what experts are worth."""
    x_TD = torch.randn(3000, size, generator=seeded(seed))
    mean_D = torch.randn(size, generator=seeded(seed + 1))
    weight_ED = torch.randn(experts, size, generator=seeded(seed + 2)) / size**0.5
    weight_ED += torch.linspace(-2.5, 2.5, experts)[:, None] * mean_D / mean_D.square().sum()
    x_TD = x_TD + mean_D
    worth_TE = (x_TD @ weight_ED.T).exp()
    return weight_ED, x_TD, worth_TE


def load_cv(weight_ED: torch.Tensor, x_TD: torch.Tensor, k: int) -> float:
    load_E = torch.bincount((x_TD @ weight_ED.T).topk(k).indices.flatten(), minlength=8).double()
    return float(load_E.std(correction=0) / load_E.mean())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_expert_has_much_more_than_another(k):
    weight_ED, x_TD, worth_TE = skewed()
    assert load_cv(weight_ED, x_TD, k) > 0.6
    rows_ED, curve = balance(weight_ED, x_TD, worth_TE, k, 0.3, gram(x_TD))
    assert load_cv(rows_ED, x_TD, k) <= 0.3
    assert load_cv(rows_ED, x_TD[::2], k) < 0.4
    assert [point["share"] for point in curve] == list(SHARES)
    assert curve[0]["worth"] == 1.0 and curve[0]["load_cv"] == pytest.approx(
        load_cv(weight_ED, x_TD, k)
    )
    # Balance costs, the more of it the more, and no more than choosing by lot would.
    worths = [point["worth"] for point in curve]
    assert worths[-1] < 1 and worths == sorted(worths, reverse=True)
    by_lot = top_mask(torch.rand(worth_TE.shape, generator=seeded(9)), k)
    assert (worth_TE * top_mask(x_TD @ rows_ED.T, k)).sum() > (worth_TE * by_lot).sum()


def test_rows_that_are_even_enough_stay_as_they_are():
    weight_ED, x_TD, worth_TE = skewed()
    rows_ED, _ = balance(weight_ED, x_TD, worth_TE, 2, 10.0, gram(x_TD))
    assert torch.equal(rows_ED, weight_ED)


def test_the_least_share_that_is_enough_is_taken():
    weight_ED, x_TD, worth_TE = skewed()
    _, curve = balance(weight_ED, x_TD, worth_TE, 2, 0.1, gram(x_TD))
    between = curve[2]["load_cv"] + 1e-6
    rows_ED, _ = balance(weight_ED, x_TD, worth_TE, 2, between, gram(x_TD))
    assert load_cv(rows_ED, x_TD, 2) <= between
    assert curve[1]["load_cv"] > between
