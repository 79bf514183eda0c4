"""Every shape adds up and is near what was asked; what cannot be is refused in one line."""

import itertools

import pytest

from moefy.errors import MoefyError
from moefy.models.shape import (
    PREFERRED_EXPERTS,
    alignment,
    any_shared,
    legal,
    no_shared,
    one_shared,
    pruned,
    shared_multiple,
    solve,
)
from moefy.types import Shape

SIZES = [1536, 5632, 11008, 14336]
FRACTIONS = [0.25, 0.5, 0.7, 0.9]
ALLOWED = {
    any_shared: lambda shared, width: shared > 0,
    no_shared: lambda shared, width: shared == 0,
    shared_multiple: lambda shared, width: shared > 0 and shared % width == 0,
    one_shared: lambda shared, width: shared == width,
}


def refusal(num_neurons: int, **options) -> str:
    """The one line that refuses `options`."""
    with pytest.raises(MoefyError) as caught:
        solve(num_neurons, **options)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_sound(shape: Shape, num_neurons: int, active: float, fits) -> None:
    routed = shape.num_experts * shape.expert_width
    assert shape.num_neurons == num_neurons == shape.num_shared + routed
    assert 1 <= shape.experts_per_token <= shape.num_experts
    assert shape.num_experts >= 2 and shape.expert_width >= 1
    assert ALLOWED[fits](shape.num_shared, shape.expert_width) and shape.num_shared >= 0
    running = shape.num_shared + shape.experts_per_token * shape.expert_width
    assert shape.num_active == running
    assert shape.active_fraction == pytest.approx(running / num_neurons)
    assert abs(running / num_neurons - active) <= 0.01 + 1e-12


def possible(num_neurons: int, count: int, active: float, fits) -> list[Shape]:
    """All shapes with `count` experts near `active` that leave the router a choice, by trial."""
    step = 8 if num_neurons >= 256 else 1
    found = []
    for width in range(step, num_neurons + 1, step):
        shared = num_neurons - count * width
        if shared < 0 or not ALLOWED[fits](shared, width):
            continue
        found += [
            Shape(num_neurons, shared, count, width, k)
            for k in range(1, count)
            if abs(shared + k * width - active * num_neurons) <= 0.01 * num_neurons
        ]
    return found


@pytest.mark.parametrize("num_neurons", SIZES)
@pytest.mark.parametrize("active", FRACTIONS)
@pytest.mark.parametrize("fits", ALLOWED)
def test_what_is_chosen_adds_up(num_neurons, active, fits):
    others = [
        other for count in PREFERRED_EXPERTS for other in possible(num_neurons, count, active, fits)
    ]
    if not others:  # 11,008 = 2^8 x 43: no preferred count divides it to run 70 % unshared
        refusal(num_neurons, active=active, fits=fits)
        return
    shape = solve(num_neurons, active=active, fits=fits)
    assert_sound(shape, num_neurons, active, fits)
    assert shape.expert_width % 8 == 0
    assert shape in others
    if any(other.expert_width % 32 == 0 for other in others):
        assert shape.expert_width % 32 == 0
    if any(
        other.expert_width % 32 == 0 and other.num_experts == 8 and other.experts_per_token >= 2
        for other in others
    ):
        assert (shape.num_experts, shape.experts_per_token >= 2) == (8, True)


@pytest.mark.parametrize("num_neurons", [*SIZES, 96, 97])
@pytest.mark.parametrize("count", [2, 7, 8, 16, 64])
@pytest.mark.parametrize("fits", ALLOWED)
def test_an_expert_count_is_refused_only_where_no_shape_has_it(num_neurons, count, fits):
    for active in FRACTIONS:
        options = {"active": active, "experts": count, "fits": fits}
        if possible(num_neurons, count, active, fits):
            shape = solve(num_neurons, **options)
            assert_sound(shape, num_neurons, active, fits)
            assert shape.num_experts == count
        else:
            refusal(num_neurons, **options)


@pytest.mark.parametrize("num_neurons", SIZES)
@pytest.mark.parametrize(("experts", "per_token", "shared"), [(8, 2, 0.3), (16, 4, 1 / 3)])
def test_explicit_choices_are_honoured(num_neurons, experts, per_token, shared):
    active = shared + (1 - shared) * per_token / experts
    shape = solve(
        num_neurons, active=active, experts=experts, experts_per_token=per_token, shared=shared
    )
    assert_sound(shape, num_neurons, active, any_shared)
    assert (shape.num_experts, shape.experts_per_token) == (experts, per_token)
    assert abs(shape.num_shared / num_neurons - shared) <= 0.01


@pytest.mark.parametrize("num_neurons", SIZES)
def test_all_experts_active_is_the_dense_layer(num_neurons):
    shape = solve(num_neurons, active=1, experts=8, experts_per_token=8)
    assert_sound(shape, num_neurons, 1, any_shared)
    assert shape.num_active == num_neurons


@pytest.mark.parametrize("fits", ALLOWED)
@pytest.mark.parametrize("more", [{}, {"experts": 6}, {"experts": 6, "experts_per_token": 6}])
def test_all_neurons_alone_ask_for_all_experts(more, fits):
    for num_neurons in (96, 256, 1536, 11008, 27648):
        if not any(legal(num_neurons, more.get("experts", count), fits) for count in (8, 4, 7, 6)):
            continue
        shape = solve(num_neurons, active=1.0, fits=fits, **more)
        assert_sound(shape, num_neurons, 1.0, fits)
        assert shape.experts_per_token == shape.num_experts
        assert more.get("experts") in (None, shape.num_experts)


def test_all_neurons_with_a_share_that_is_always_on():
    assert solve(256, active=1.0, experts=6, shared=0.25) == Shape(256, 64, 6, 32, 6)
    assert solve(1536, active=1.0) == Shape(1536, 512, 8, 128, 8)


def test_all_experts_are_on_below_one_only_where_nothing_else_answers():
    assert solve(1536, active=0.99).experts_per_token < solve(1536, active=0.99).num_experts
    assert solve(256, active=0.995, experts=6, shared=0.25) == Shape(256, 64, 6, 32, 6)


@pytest.mark.parametrize("num_neurons", [96, 256, 1536])
def test_nothing_is_refused_that_a_legal_shape_answers(num_neurons):
    """So what a refusal calls nearest is never what was asked for."""
    shapes = {n: legal(num_neurons, n, any_shared) for n in (2, 6, 8)}
    for active, experts, k, shared in itertools.product(
        [0.3, 0.5, 0.75, 0.97, 0.995, 1.0], shapes, [None, 1, 2, 6], [None, 0.0, 0.25, 0.5]
    ):
        if k and k > experts:
            continue
        answers = [
            shape
            for shape in shapes[experts]
            if abs(shape.active_fraction - active) <= 0.01
            and k in (None, shape.experts_per_token)
            and (shared is None or abs(shape.num_shared / num_neurons - shared) <= 0.01)
        ]
        options = {"experts": experts, "experts_per_token": k, "shared": shared}
        if answers:
            assert solve(num_neurons, active=active, **options) in answers
        else:
            refusal(num_neurons, active=active, **options)


@pytest.mark.parametrize(
    ("num_neurons", "active", "fits", "wanted"),
    [
        (7681, 0.25, any_shared, (1025, 8, 832, 1)),  # not 1 neuron beside 8 of 960
        (28672, 0.25, any_shared, (4096, 8, 3072, 1)),  # as 14,336 has it, not 256 shared
        (8192, 0.5, shared_multiple, (1024, 7, 1024, 3)),  # not 1 of 64 experts: 0.8 % routed
        (16384, 0.5, shared_multiple, (2048, 7, 2048, 3)),
        (10752, 0.25, shared_multiple, (1344, 7, 1344, 1)),
        (1536, 0.5, any_shared, (512, 8, 128, 2)),
        (1536, 0.75, any_shared, (1024, 8, 64, 2)),
        (1536, 0.25, any_shared, (192, 7, 192, 1)),
        (11008, 0.25, any_shared, (1536, 8, 1184, 1)),
    ],
)
def test_enough_is_routed_and_enough_is_shared(num_neurons, active, fits, wanted):
    assert solve(num_neurons, active=active, fits=fits) == Shape(num_neurons, *wanted)


@pytest.mark.parametrize("fits", [any_shared, shared_multiple])
@pytest.mark.parametrize("active", FRACTIONS)
def test_widths_that_models_have_are_never_split_lopsided(active, fits):
    for num_neurons in range(1536, 28673, 1792):
        shape = solve(num_neurons, active=active, fits=fits)
        running, routed = shape.num_active, shape.num_active - shape.num_shared
        assert shape.num_shared >= 0.1 * running, shape
        assert routed >= 0.1 * min(running, num_neurons - running), shape


def test_a_small_layer_has_widths_of_any_size():
    assert {shape.expert_width for shape in legal(96, 8, any_shared)} == set(range(1, 12))
    assert {shape.expert_width for shape in legal(256, 8, any_shared)} == {8, 16, 24}
    assert {shape.expert_width for shape in legal(256, 8, no_shared)} == {32}


def test_alignment_is_the_largest_listed_power_of_two():
    for width in range(1, 300):
        powers = [unit for unit in (8, 16, 32, 64, 128) if width % unit == 0]
        assert alignment(width) == max(powers, default=1)


def test_the_static_control_keeps_as_many_neurons_as_run():
    shape = solve(1536)
    kept = pruned(shape)
    assert kept.num_active == kept.num_shared == shape.num_active
    assert (kept.num_neurons, kept.num_experts) == (1536, 0)


@pytest.mark.parametrize(
    ("options", "legal_values"),
    [
        ({"active": 0}, "above 0, up to 1"),
        ({"active": -0.5}, "above 0, up to 1"),
        ({"active": 1.01}, "above 0, up to 1"),
        ({"active": float("nan")}, "above 0, up to 1"),
        ({"shared": 1.0}, "from 0 to below 1"),
        ({"shared": -0.1}, "from 0 to below 1"),
        ({"shared": 1.5}, "from 0 to below 1"),
        ({"experts": 1}, "2 to 1536"),
        ({"experts": 0}, "2 to 1536"),
        ({"experts": 1537}, "2 to 1536"),
        ({"experts": 4, "experts_per_token": 5}, "at most 4"),
    ],
)
def test_what_no_layer_can_have_is_refused(options, legal_values):
    assert legal_values in refusal(1536, **options)


def test_a_count_that_does_not_divide_is_refused_with_counts_that_do():
    message = refusal(11008, experts=9, fits=no_shared)
    named = message.rpartition(":")[2].replace("...", "").split(",")
    counts = [int(word) for word in named if word.strip()]
    assert counts
    for count in counts:
        assert 11008 % (8 * count) == 0
        assert legal(11008, count, no_shared)


def test_an_active_fraction_out_of_reach_is_refused_with_the_nearest_shapes():
    message = refusal(1536, active=0.4, experts=8, experts_per_token=2, fits=no_shared)
    assert "--active 0.4 with --experts 8, --top-k 2" in message
    nearest = Shape(1536, 0, 8, 192, 3)
    assert f"nearest: {nearest}" in message
    assert "multiples of 32: 192" in message


def test_choices_that_contradict_each_other_are_refused():
    # A quarter shared and half of the rest active is 62.5 %, not 30 %.
    message = refusal(1536, active=0.3, experts=8, experts_per_token=4, shared=0.25)
    assert "--shared-fraction 0.25" in message and "nearest: " in message


def test_every_refusal_names_what_it_was_given():
    for active, experts in itertools.product([0.03, 0.11], [2, 3]):
        message = refusal(96, active=active, experts=experts, fits=no_shared)
        assert f"--active {active:g}" in message and f"--experts {experts}" in message


# Experts that overlap


@pytest.mark.parametrize("num_neurons", [96, 1536, 11008])
@pytest.mark.parametrize("total", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("active", [0.25, 0.5, 0.75])
def test_overlapping_experts_keep_both_budgets(num_neurons, active, total):
    shape = solve(num_neurons, active=active, total=total)
    assert shape.active_fraction == pytest.approx(active, abs=0.01)
    assert num_neurons < shape.num_stored <= total * num_neurons
    assert shape.num_experts >= 8
    assert shape.experts_per_token == 1
    assert shape.num_shared + shape.expert_width <= num_neurons
    assert num_neurons == 96 or shape.expert_width % 32 == 0


@pytest.mark.parametrize(
    ("active", "total", "wanted"),
    [
        (1 / 6, 4.0, (32, 24, 224)),
        (0.25, 4.0, (32, 16, 352)),
        (0.25, 2.0, (32, 8, 352)),
        (0.5, 4.0, (32, 8, 736)),
        (0.5, 2.25, (384, 8, 384)),
        (0.1, 8.0, (24, 32, 128)),
    ],
)
def test_more_than_eight_overlap_where_memory_is_left_at_their_widest(active, total, wanted):
    shape = solve(1536, active=active, total=total)
    assert shape == Shape(1536, *wanted, 1)
    four_more = 4 * shape.expert_width
    assert shape.num_stored + four_more > total * 1536 or shape.num_experts in (8, 32)


def test_as_many_overlap_as_are_asked_for():
    assert solve(1536, active=1 / 6, total=4.0, experts=8) == Shape(1536, 32, 8, 224, 1)


def test_a_class_without_shared_experts_overlaps_too():
    shape = solve(1536, active=0.5, total=4.0, fits=no_shared)
    assert shape == Shape(1536, 0, 8, 768, 1)


def test_too_little_to_overlap_is_refused():
    with pytest.raises(MoefyError, match="--overlap 1.001"):
        solve(96, active=0.5, total=1.001)
