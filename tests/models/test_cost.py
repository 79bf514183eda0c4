"""What the cost model counts, and that an engine is charged for what it charges for."""

import pytest

from moefy.models.cost import COSTS, Cost, Layer, counts, ideal
from moefy.types import Shape


def test_counts_by_hand():
    layer, shape = Layer(10, 40, 400), Shape(40, 8, 4, 8, 1)
    assert counts(layer, None, 3) == (1600, 4800, 0, 0, 0, 1, 0)
    reads, products, routed, touched, rows, *rest = counts(layer, shape, 2)
    assert touched == pytest.approx(4 * (1 - 0.75**2))
    assert reads == pytest.approx(400 + 40 + 30 * (8 + 8 * touched))
    assert products == 2 * (400 + 40 + 30 * 16)
    assert routed == 2 * 30 * 8
    assert (rows, rest) == (20, [1, 1])
    assert ideal(layer, shape) == pytest.approx(1600 / (440 + 480))


def test_a_layer_costs_what_its_constants_say():
    layer, shape = Layer(10, 40, 400), Shape(40, 8, 4, 8, 1)
    only_products = Cost(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    dense, moe = (only_products.seconds(layer, one, 7) for one in (None, shape))
    assert dense / moe == pytest.approx(ideal(layer, shape))
    only_blocks = Cost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0)
    assert only_blocks.seconds(layer, None, 7) == 0.0
    assert only_blocks.seconds(layer, shape, 7) == pytest.approx(5e-9)


@pytest.mark.parametrize("engine", COSTS)
def test_narrower_experts_never_cost_less(engine):
    layer = Layer(4096, 11008, 67_108_864)
    shapes = [Shape(11008, 3840, 7168 // n, n, 1664 // n) for n in (32, 64, 128, 832)]
    for tokens in (1, 8, 512):
        seconds = [COSTS[engine].seconds(layer, shape, tokens) for shape in shapes]
        if tokens != 8:  # at batch 8, narrow ones leave more weights unread
            assert seconds == sorted(seconds, reverse=True)
