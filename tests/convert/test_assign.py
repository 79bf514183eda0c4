"""The balanced assignment is the optimum that scipy finds on the expanded square.

What a GPU computes is tried on tensors of the CPU, against the same optimum.
"""

import signal

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moefy.convert import assign, assign_on_device
from moefy.convert.assign import assign_balanced

KINDS = {
    "normal": lambda dice, size: dice.normal(size=size),
    "integer ties": lambda dice, size: dice.integers(0, 3, size).astype(float),
    "constant": lambda dice, size: np.full(size, 3.3),
    "negative": lambda dice, size: -10 - dice.random(size),
    "heavy tail": lambda dice, size: np.exp(8 * dice.normal(size=size)),
    "rows of all scales": lambda dice, size: (
        dice.normal(size=size) * 10.0 ** dice.choice([-20, 0, 20], (size[0], 1))
    ),
    "columns of all scales": lambda dice, size: (
        dice.normal(size=size) * 10.0 ** dice.choice([-20, 0, 20], (1, size[1]))
    ),
    "whole numbers of two scales": lambda dice, size: (
        2.0**40 * dice.integers(0, 3, size) * dice.integers(0, 2, (size[0], 1))
        + dice.integers(0, 5, size)
    ),
    "far from zero": lambda dice, size: 1e9 * dice.random((size[0], 1)) + dice.random(size),
    "tiny": lambda dice, size: 1e-20 * dice.normal(size=size),
    "huge": lambda dice, size: 1e20 * dice.normal(size=size),
    "duplicated rows": lambda dice, size: dice.normal(size=size)[
        dice.integers(0, -(-size[0] // 3), size[0])
    ],
    "equal columns": lambda dice, size: np.tile(dice.normal(size=(size[0], 1)), (1, size[1])),
    "one column best": lambda dice, size: dice.random(size) + 5 * (np.arange(size[1]) == 0),
    "float32": lambda dice, size: dice.gamma(0.1, size=size).astype(np.float32),
}


@pytest.fixture(autouse=True)
def end():
    """An assignment that goes round in circles fails, instead of never ending."""

    def stop(*_: object) -> None:
        raise RecursionError("the assignment does not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def least_loss(value_FE: np.ndarray, width: int) -> float:
    """What the optimum loses against every row in its best column."""
    square_FF = np.repeat(losses(value_FE), width, axis=1)
    return square_FF[linear_sum_assignment(square_FF)].sum()


def losses(value_FE: np.ndarray) -> np.ndarray:
    """What each row loses in each column; free of the rounding of large common values."""
    return value_FE.max(1, keepdims=True) - value_FE.astype(np.float64)


def loss(value_FE: np.ndarray, column_F: np.ndarray) -> float:
    return losses(value_FE)[np.arange(len(value_FE)), column_F].sum()


def assert_balanced(column_F: np.ndarray, num_columns: int, width: int) -> None:
    assert column_F.dtype == np.int64
    assert column_F.shape == (num_columns * width,)
    assert np.bincount(column_F, minlength=num_columns).tolist() == [width] * num_columns


def greedy(value_FE: np.ndarray, width: int) -> np.ndarray:
    """Each row in turn takes the best column that has room."""
    room_E = np.full(value_FE.shape[1], width)
    column_F = np.empty(len(value_FE), dtype=np.int64)
    for row, value_E in enumerate(value_FE):
        column_F[row] = np.where(room_E > 0, value_E, -np.inf).argmax()
        room_E[column_F[row]] -= 1
    return column_F


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_balanced_and_optimal(kind):
    for seed in range(20):
        dice = np.random.default_rng(seed)
        columns, width = (int(n) for n in dice.integers(1, 8, 2))
        value_FE = KINDS[kind](dice, (columns * width, columns))
        column_F = assign_balanced(value_FE, width)
        assert_balanced(column_F, columns, width)
        slack = 1e-9 * np.ptp(value_FE, axis=1).max()
        assert loss(value_FE, column_F) <= least_loss(value_FE, width) + slack, seed


@pytest.mark.parametrize("kind", ["normal", "integer ties", "negative", "one column best"])
def test_it_is_optimal_from_wherever_its_prices_start(monkeypatch, kind):
    # From good prices few rows are left to move; from bad ones whole columns are, along paths that
    # take earlier moves back.
    for seed in range(20):
        dice = np.random.default_rng(seed)
        columns, width = (int(n) for n in dice.integers(3, 8, 2))
        value_FE = KINDS[kind](dice, (columns * width, columns))
        start_E = dice.normal(size=columns) * (seed % 3)
        monkeypatch.setattr(assign, "_prices", lambda *_, start_E=start_E: start_E)
        column_F = assign_balanced(value_FE, width)
        assert_balanced(column_F, columns, width)
        assert loss(value_FE, column_F) == pytest.approx(least_loss(value_FE, width), abs=1e-9)


def test_rows_whose_scales_are_forty_orders_apart_end():
    # Prices of the order of the large rows round the small ones away; what is left of them must
    # not look like a gain that can be had again and again.
    for seed in range(60):
        dice = np.random.default_rng(1000 + seed)
        columns, width = (int(n) for n in dice.integers(3, 9, 2))
        for kind in ("rows of all scales", "whole numbers of two scales"):
            value_FE = KINDS[kind](dice, (columns * width, columns))
            assert_balanced(assign_balanced(value_FE, width), columns, width)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_all_values_does_not_matter(scale):
    value_FE = np.random.default_rng(5).normal(size=(60, 5))
    small = loss(value_FE, assign_balanced(scale * value_FE, 12))
    assert small == pytest.approx(least_loss(value_FE, 12), rel=1e-9)


def test_a_planted_optimum_is_found_where_greed_misses_it():
    # The first rows prefer column 0 by a little, the last ones by a lot.
    value_FE = np.array([[1.1, 1.0]] * 4 + [[10.0, 0.0]] * 4)
    assert assign_balanced(value_FE, 4).tolist() == [1] * 4 + [0] * 4
    assert greedy(value_FE, 4).tolist() == [0] * 4 + [1] * 4
    assert loss(value_FE, greedy(value_FE, 4)) > 10 * loss(value_FE, assign_balanced(value_FE, 4))


def test_greed_is_worse_on_most_random_values():
    worse = 0
    for seed in range(20):
        value_FE = np.random.default_rng(seed).normal(size=(24, 4))
        excess = loss(value_FE, greedy(value_FE, 6)) - least_loss(value_FE, 6)
        assert excess > -1e-9
        worse += excess > 1e-6
    assert worse >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_deterministic_and_leaves_its_input_alone(kind):
    value_FE = KINDS[kind](np.random.default_rng(3), (42, 7))
    before = value_FE.copy()
    first_F = assign_balanced(value_FE, 6)
    assert np.array_equal(first_F, assign_balanced(np.asfortranarray(value_FE), 6))
    assert np.array_equal(value_FE, before)


def test_one_column_takes_all_rows():
    assert assign_balanced(np.zeros((5, 1)), 5).tolist() == [0] * 5


def test_rows_of_another_number_than_columns_times_width_are_our_own_mistake():
    with pytest.raises(AssertionError):
        assign_balanced(np.zeros((5, 2)), 2)


def on_device(value_FE: np.ndarray, width: int) -> np.ndarray:
    return assign_on_device.assign_on_device(torch.as_tensor(value_FE), width).numpy()


def allowed(value_FE: np.ndarray) -> float:
    """A thousandth of what all rows could gain or lose."""
    return 1e-3 * np.ptp(value_FE.astype(np.float64), axis=1).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_it_is_balanced_and_nearly_optimal(kind):
    for seed in range(20):
        dice = np.random.default_rng(seed)
        columns, width = (int(n) for n in dice.integers(1, 8, 2))
        value_FE = KINDS[kind](dice, (columns * width, columns))
        column_F = on_device(value_FE, width)
        assert_balanced(column_F, columns, width)
        excess = loss(value_FE, column_F) - least_loss(value_FE, width)
        assert excess <= allowed(value_FE), seed
    before = value_FE.copy()
    assert np.array_equal(column_F, on_device(np.asfortranarray(value_FE), width))
    assert np.array_equal(column_F, on_device(value_FE, width))
    assert np.array_equal(value_FE, before)


@pytest.mark.parametrize("kind", ["heavy tail", "duplicated rows", "one column best"])
def test_on_a_device_many_rows_are_as_well_assigned_as_by_the_exact_one(kind):
    value_FE = KINDS[kind](np.random.default_rng(0), (2048, 16))
    exact, near = assign_balanced(value_FE, 128), on_device(value_FE, 128)
    assert_balanced(near, 16, 128)
    most = 1.001 * loss(value_FE, exact)
    assert loss(value_FE, near) <= most < loss(value_FE, greedy(value_FE, 128))


def test_on_a_device_equal_rows_need_more_than_prices(monkeypatch):
    """Prices cannot divide equal rows among columns; moves of single rows would take too many."""
    calls, path = [], assign_on_device.cheapest_path
    monkeypatch.setattr(
        assign_on_device, "cheapest_path", lambda *given: calls.append(1) or path(*given)
    )
    value_FE = np.tile(np.arange(8.0), (800, 1))
    assert_balanced(on_device(value_FE, 100), 8, 100)
    assert 0 < len(calls) < 50


def test_on_a_cpu_the_exact_one_is_taken():
    value_FE = KINDS["integer ties"](np.random.default_rng(1), (40, 5))
    column_F = assign_on_device.assign(torch.as_tensor(value_FE), 8)
    assert np.array_equal(column_F.numpy(), assign_balanced(value_FE, 8))
