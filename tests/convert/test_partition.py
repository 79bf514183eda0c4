"""Every way to split an FFN splits it; ours finds structure where there is some, and only there."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from planted import (
    NOT_ROUTED,
    best_captured,
    by_expert,
    captured,
    energies,
    mask_of,
    methods,
    observed,
    plant,
    random_ffn,
    recovered,
    seeded,
)

from moefy.convert.assign_on_device import assign_on_device
from moefy.convert.kmeans import kmeans_on_device
from moefy.convert.partition import alternating
from moefy.convert.router import linear
from moefy.types import FFN, Partition, Profile, Shape

SPLITS = methods("partition", "split")
CLOSED = linear.Options(steps=0)
SHAPES = [Shape(48, 8, 5, 8, 2), Shape(48, 0, 4, 12, 1), Shape(48, 47, 1, 1, 1)]


def assert_covers(name: str, partition: Partition, shape: Shape) -> None:
    """Nobody stands twice; a routed split leaves nobody out, the static one keeps what it may."""
    shared, experts = partition.shared_S, partition.experts_EN
    assert shared.dtype == experts.dtype == torch.int64
    everyone = torch.cat([shared, experts.flatten()]).tolist()
    assert len(set(everyone)) == len(everyone)
    assert set(everyone) <= set(range(shape.num_neurons))
    if name in NOT_ROUTED:
        assert len(experts) == 0
        assert len(shared) == shape.num_active
    else:
        assert experts.shape == (shape.num_experts, shape.expert_width)
        assert len(shared) == shape.num_shared
        assert len(everyone) == shape.num_neurons
    for neurons in (shared, *experts):
        assert neurons.tolist() == sorted(neurons.tolist())


def assert_equal(first: Partition, second: Partition) -> None:
    assert torch.equal(first.shared_S, second.shared_S)
    assert torch.equal(first.experts_EN, second.experts_EN)


def awkward(name: str) -> tuple[FFN, torch.Tensor]:
    """An FFN and inputs that are legal but odd."""
    ffn, x_TD = random_ffn(1), torch.randn(120, 12, generator=seeded(2))
    if name == "dead neurons":
        ffn.gate_FD[::2] = 0
    elif name == "dead layer":
        ffn.down_DF[:] = 0
    elif name == "duplicate tokens":
        x_TD = x_TD[:1].repeat(120, 1)
    elif name == "duplicate neurons":
        ffn = FFN(*(w[:1].repeat(48, 1) for w in (ffn.gate_FD, ffn.up_FD, ffn.down_DF.T)))
        ffn = dataclasses.replace(ffn, down_DF=ffn.down_DF.T.contiguous())
    elif name == "a huge token":
        x_TD[7] *= 1e4
    elif name == "silent tokens":
        x_TD[::3] = 0
    return ffn, x_TD


@pytest.mark.parametrize("name", SPLITS)
def test_the_signature_is_the_one_that_recipes_bind(name):
    positional, keywords = [], {}
    for parameter in inspect.signature(SPLITS[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = parameter.default
        else:
            positional.append(parameter.name)
    assert positional == ["ffn", "profile", "shape"]
    assert keywords.pop("generator") is inspect.Parameter.empty
    assert inspect.Parameter.empty not in keywords.values()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_it_covers_what_it_claims_and_the_seed_decides(name, shape):
    ffn = random_ffn(0)
    profile = observed(ffn, torch.randn(150, 12, generator=seeded(3)), num_heldout=50)
    first = SPLITS[name](ffn, profile, shape, generator=seeded(4))
    assert_covers(name, first, shape)
    assert_equal(first, SPLITS[name](ffn, profile, shape, generator=seeded(4)))
    assert_covers(name, SPLITS[name](ffn, profile, shape, generator=seeded(5)), shape)


@pytest.mark.parametrize(
    "oddity",
    [
        "dead neurons",
        "dead layer",
        "duplicate tokens",
        "duplicate neurons",
        "a huge token",
        "silent tokens",
    ],
)
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_odd_layers_and_tokens_are_split_like_others(name, oddity):
    ffn, x_TD = awkward(oddity)
    profile = observed(ffn, x_TD, num_heldout=30)
    for shape in SHAPES[:2]:
        first = SPLITS[name](ffn, profile, shape, generator=seeded(0))
        assert_covers(name, first, shape)
        assert_equal(first, SPLITS[name](ffn, profile, shape, generator=seeded(0)))


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_not_kept_in_memory_is_computed_alike(name):
    planted = plant()
    split = SPLITS[name]
    lean = dataclasses.replace(planted.profile, h_TF=None)
    assert_equal(
        split(planted.ffn, planted.profile, planted.shape, generator=seeded(0)),
        split(planted.ffn, lean, planted.shape, generator=seeded(0)),
    )


@pytest.mark.parametrize("name", ["shuffle", "static"])
def test_the_controls_keep_the_neurons_of_greatest_mean_energy(name):
    ffn, shape = random_ffn(6), SHAPES[0]
    x_TD, residual_TD = torch.randn(2, 150, 12, generator=seeded(7))
    profile = observed(ffn, x_TD, num_heldout=50, residual_TD=residual_TD)
    h_TF = ffn.activations(x_TD)
    y_TD = h_TF @ ffn.down_DF.T
    weight_T = 1 / (residual_TD + y_TD).square().sum(1).numpy()
    mean_F = (energies(ffn, h_TF) * weight_T[:, None])[:100].mean(0)
    shared_S = SPLITS[name](ffn, profile, shape, generator=seeded(0)).shared_S
    count = {"shuffle": shape.num_shared, "static": shape.num_active}[name]
    assert shared_S.tolist() == sorted(np.argsort(-mean_F)[:count].tolist())


def test_shuffle_follows_the_seed_and_static_does_not():
    planted = plant()
    first, second = (
        {
            name: SPLITS[name](planted.ffn, planted.profile, planted.shape, generator=seeded(seed))
            for name in ("shuffle", "static")
        }
        for seed in (0, 1)
    )
    assert not torch.equal(first["shuffle"].experts_EN, second["shuffle"].experts_EN)
    assert torch.equal(first["shuffle"].shared_S, second["shuffle"].shared_S)
    assert_equal(first["static"], second["static"])


# What ours finds


def heldout_energy(ffn: FFN, profile: Profile) -> np.ndarray:
    return energies(ffn, profile.h_TF[profile.num_fit :])


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(seed):
    planted = plant(seed)
    found = SPLITS["alternating"](
        planted.ffn, planted.profile, planted.shape, generator=seeded(seed)
    )
    assert recovered(found, planted) >= 0.95
    assert (planted.group_F[found.shared_S.numpy()] < 0).mean() >= 0.85
    by_lot = SPLITS["shuffle"](planted.ffn, planted.profile, planted.shape, generator=seeded(seed))
    assert recovered(by_lot, planted) < 0.5


def test_what_a_gpu_computes_finds_them_too(monkeypatch):
    planted = plant()
    monkeypatch.setattr(alternating, "assign", assign_on_device)
    monkeypatch.setattr(alternating, "kmeans", lambda *of: kmeans_on_device(*of, 1, 300, 1e-4))
    found = alternating.split(planted.ffn, planted.profile, planted.shape, generator=seeded(0))
    assert_covers("alternating", found, planted.shape)
    assert recovered(found, planted) >= 0.95


@pytest.mark.parametrize("seed", range(3))
def test_it_captures_more_than_experts_by_lot_where_there_is_structure_and_only_there(seed):
    planted = plant(seed)
    ffn, shape = planted.ffn, planted.shape
    # Destroyed: every token's activations are dealt to other neurons. Each token still has few
    # strong neurons, and all down columns are of unit length, but none fire together.
    dice = np.random.default_rng(seed)
    dealt_TF = torch.from_numpy(dice.permuted(planted.profile.h_TF.numpy(), axis=1))
    destroyed = dataclasses.replace(planted.profile, h_TF=dealt_TF)
    gain = {}
    for kind, profile in (("planted", planted.profile), ("destroyed", destroyed)):
        energy_TF = heldout_energy(ffn, profile)
        ours, by_lot = (
            best_captured(
                energy_TF,
                SPLITS[name](ffn, profile, shape, generator=seeded(seed)),
                shape.experts_per_token,
            )
            for name in ("alternating", "shuffle")
        )
        gain[kind] = ours - by_lot
    assert gain["planted"] > 0.12
    assert abs(gain["destroyed"]) < 0.05


def test_the_planted_partition_is_the_ceiling_that_the_search_reaches():
    planted = plant()
    energy_TF = heldout_energy(planted.ffn, planted.profile)
    found = SPLITS["alternating"](planted.ffn, planted.profile, planted.shape, generator=seeded(0))
    ceiling = best_captured(energy_TF, planted.partition, 2)
    assert ceiling > 0.99
    assert best_captured(energy_TF, found, 2) > ceiling - 0.01
    # The planted groups are those of the tokens: the loops that judge here see what was planted.
    strongest_TE = by_expert(energies(planted.ffn, planted.profile.h_TF), planted.partition)
    assert (strongest_TE[planted.chosen_TE].min() > strongest_TE[~planted.chosen_TE]).mean() > 0.99


def test_rounds_never_capture_less_than_the_clustering_they_start_from():
    gains = []
    for seed in range(6):
        ffn, shape = random_ffn(seed), SHAPES[0]
        x_TD = torch.randn(200, 12, generator=seeded(seed))
        profile = observed(ffn, x_TD, num_heldout=80)
        energy_TF = heldout_energy(ffn, profile)
        shares = []
        for options in ({"rounds": 0, "routed_rounds": 0}, {}):
            found = SPLITS["alternating"](ffn, profile, shape, generator=seeded(seed), **options)
            # Rounds are told apart by the linear router, in closed form, that would serve them.
            router = linear.fit(ffn, profile, found, shape, generator=seeded(0), options=CLOSED)
            mask_TE = mask_of((x_TD[120:] @ router.weight_ED.T).numpy(), shape.experts_per_token)
            shares.append(captured(energy_TF, found, mask_TE))
        gains.append(shares[1] - shares[0])
    assert min(gains) >= -1e-6
    assert max(gains) > 0.01


# Neurons that make an attention sink


def with_sink(strength: float) -> tuple[FFN, torch.Tensor, int]:
    """A planted FFN and inputs in which one routed neuron writes, at each tenth token alone,
    `strength` times what the whole FFN writes at the median token."""
    planted = plant()
    neuron, sequence = int(planted.partition.experts_EN[3, 2]), 10
    ffn, x_TD = planted.ffn, planted.profile.x_TD.clone()
    length_T = (ffn.activations(x_TD) @ ffn.down_DF.T).norm(dim=1)
    mark_D = torch.zeros(x_TD.shape[1] + 1)
    mark_D[-1] = 1
    x_TD = torch.nn.functional.pad(x_TD, (0, 1))  # the last input says: first of its sequence
    x_TD[::sequence, -1] = 1
    gate_FD, up_FD = (torch.nn.functional.pad(m, (0, 1)) for m in (ffn.gate_FD, ffn.up_FD))
    gate_FD[neuron], up_FD[neuron] = 50 * mark_D, mark_D  # silu(50) * 1 = 50
    down_DF = torch.nn.functional.pad(ffn.down_DF, (0, 0, 0, 1))
    down_DF[:, neuron] *= strength * length_T.median() / 50
    return FFN(gate_FD, up_FD, down_DF), x_TD, neuron


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_makes_an_attention_sink_is_shared_though_an_expert_would_lose_nothing(overlaps):
    shape = Shape(56, 8, 8, 12 if overlaps else 6, 2)
    ffn, x_TD, neuron = with_sink(200.0)
    first = torch.zeros(len(x_TD), 1)
    first[::10] = 1e6  # the residual stream is huge there, so that the token weighs nothing
    residual_TD = torch.randn(len(x_TD), 25, generator=seeded(3)) + first
    profile = observed(ffn, x_TD, num_heldout=200, residual_TD=residual_TD)
    assert profile.sink_F.nonzero().flatten().tolist() == [neuron]
    for options in ({}, {"rounds": 0, "routed_rounds": 0}):
        shared_S = alternating.split(ffn, profile, shape, generator=seeded(0), **options).shared_S
        assert neuron in shared_S.tolist()
    blind = dataclasses.replace(profile, sink_F=None)
    assert neuron not in alternating.split(ffn, blind, shape, generator=seeded(0)).shared_S.tolist()
    none_shared = alternating.split(
        ffn, profile, Shape(56, 0, 8, 7, 2), generator=seeded(0)
    )  # a class without shared neurons has no place for it
    assert neuron in none_shared.experts_EN.flatten().tolist()


def test_only_what_towers_above_the_median_token_makes_a_sink_and_only_where_it_is_fitted():
    for strength, sinks in ((9.0, 0), (11.0, 1)):
        ffn, x_TD, _ = with_sink(strength)
        assert int(observed(ffn, x_TD, num_heldout=200).sink_F.sum()) == sinks
        x_TD[: len(x_TD) - 200, -1] = 0  # held-out tokens alone
        assert not observed(ffn, x_TD, num_heldout=200).sink_F.any()
    assert not plant().profile.sink_F.any()
