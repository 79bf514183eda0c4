"""The shape that is chosen is legal, fast enough by the model's own word, and the best such one."""

import pytest

from moefy.models import choice
from moefy.models.choice import (
    LOWER,
    SLACK,
    choose,
    expected_loss,
    over_ideal,
    relative_time,
)
from moefy.models.cost import COSTS, Cost, Layer
from moefy.models.shape import any_shared, no_shared, one_shared, shared_multiple
from moefy.types import Shape

SIZES = {
    "135M": Layer(576, 1536, 884_736),
    "0.5B": Layer(896, 4864, 1_835_008),
    "1.5B": Layer(1536, 8960, 5_505_024),
    "7B": Layer(4096, 11008, 67_108_864),
    "8B": Layer(4096, 14336, 41_943_040),
}
FITS = [any_shared, no_shared, shared_multiple, one_shared]


@pytest.mark.parametrize("named", [*([engine] for engine in COSTS), []], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("active", [0.25, 0.5, 0.75])
def test_what_is_chosen_is_within_the_slack_and_nothing_faster_loses_less(named, size, active):
    layer, engines = SIZES[size], named or [choice.DEFAULT_ENGINE]
    found = choose(layer, active, any_shared, named)
    assert found is not None
    shape = found.shape
    assert layer.num_neurons == shape.num_shared + shape.num_experts * shape.expert_width
    assert active - LOWER <= shape.active_fraction <= active + 1e-9
    assert found.time == pytest.approx(relative_time(layer, shape, engines))
    usual, unusual = (
        [*choice.candidates(layer.num_neurons, active, any_shared, counts)]
        for counts in (choice.COUNTS, choice.OTHER_COUNTS)
    )
    others = [other for other in usual if choice._suits(other, engines)]
    others = others or [other for other in unusual if choice._suits(other, engines)]
    others = others or usual or unusual
    assert shape in others
    times = {other: over_ideal(layer, other, engines) for other in others}
    fastest = min(times.values())
    assert over_ideal(layer, shape, engines) <= SLACK * fastest
    allowed = [other for other in others if times[other] <= SLACK * fastest]
    assert expected_loss(shape) <= min(map(expected_loss, allowed)) + 1e-4


@pytest.mark.parametrize("fits", FITS)
@pytest.mark.parametrize("num_neurons", [1536, 2048, 4864, 8960, 11008, 14336, 28672])
def test_what_is_chosen_is_what_the_class_holds(fits, num_neurons):
    found = choose(Layer(1024, num_neurons, 10**6), 0.5, fits, [])
    if found is not None:
        assert fits(found.shape) and found.shape.num_neurons == num_neurons


def test_an_engine_that_punishes_narrow_experts_gets_wider_ones(monkeypatch):
    layer, chosen = SIZES["7B"], []
    for row in (0.0, 3.0, 15.0):
        monkeypatch.setitem(COSTS, "vLLM", Cost(0.02, 0.03, 0.0, 0.0, row, 0.0, 0.0))
        found = choose(layer, 0.5, any_shared, ["vLLM"])
        assert found is not None
        chosen.append(found.shape)
    narrow, medium, wide = chosen
    assert narrow.expert_width < medium.expert_width < wide.expert_width
    # The one that was best where narrow experts cost nothing is too slow now.
    assert over_ideal(layer, narrow, ["vLLM"]) > SLACK * over_ideal(layer, wide, ["vLLM"])
    assert expected_loss(narrow) < expected_loss(wide)


def test_a_wider_ffn_gets_as_wide_experts_or_wider():
    found = [
        choose(Layer(1024, 1536 * n, 10**6), 0.5, any_shared, ["llama.cpp"]) for n in (1, 4, 16)
    ]
    widths = [choice.shape.expert_width for choice in found if choice]
    assert len(widths) == 3 and widths == sorted(widths) and widths[0] < widths[-1]


def test_several_engines_share_one_shape():
    layer = SIZES["0.5B"]
    both = choose(layer, 0.5, any_shared, ["transformers", "llama.cpp"])
    assert both is not None and both.engines == ("transformers", "llama.cpp")
    alone = [relative_time(layer, both.shape, [engine]) for engine in both.engines]
    assert both.time == pytest.approx(sum(alone) / 2)


def test_small_and_whole_ffns_are_left_to_others():
    assert choose(Layer(32, 96, 10**4), 0.5, any_shared, []) is None
    assert choose(SIZES["135M"], 1.0, any_shared, []) is None


def test_loss_falls_with_choice_and_with_active_neurons():
    shapes = [Shape(1536, 512, n, 1024 // n, n // 4) for n in (8, 16, 32, 64)]
    losses = [expected_loss(shape) for shape in shapes]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    more = [Shape(1536, 512, 8, 128, k) for k in (2, 3, 4)]
    assert expected_loss(more[0]) > expected_loss(more[1]) > expected_loss(more[2])
