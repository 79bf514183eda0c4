"""Routers choose as plain loops say; ours finds a planted routing and chance does not."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from planted import (
    by_expert,
    captured,
    energies,
    mask_of,
    methods,
    plant,
    random_ffn,
    seeded,
    squares,
)

from moefy.config.recipe import UNWRITABLE
from moefy.convert import routed_ffn as routing
from moefy.convert.partition import shuffle
from moefy.convert.profile import Inputs, observe
from moefy.convert.ridge import ridge, scorer
from moefy.convert.routed_ffn import RoutedFFN, energies_of, expert_energies, membership, top_mask
from moefy.convert.router import linear
from moefy.types import Partition, Profile, Router, Shape

CLOSED = linear.Options(steps=0)
FITS = methods("router", "fit")
SHAPE, LENGTH = Shape(48, 8, 5, 8, 2), 16
POSITION_T = torch.arange(240) % LENGTH


def setting(seed: int, size: int = 12):
    """A random FFN, inputs whose mean is not zero, and a partition by lot."""
    ffn = random_ffn(seed, size=size)
    x_TD = torch.randn(240, size, generator=seeded(100 + seed)) + 0.5
    profile = observe(ffn, Inputs(x_TD, 80, length=LENGTH))
    return ffn, profile, shuffle.split(ffn, profile, SHAPE, generator=seeded(seed))


def chosen(ffn, profile: Profile, partition: Partition, router: Router, k: int) -> np.ndarray:
    """True where `router` sends a held-out token to an expert, by plain loops."""
    if router.norm_EN is not None:
        return mask_of(squares(profile.h_TF, partition, router.norm_EN), k)[profile.num_fit :]
    score_TE = profile.x_TD.double().numpy() @ router.weight_ED.double().numpy().T
    return mask_of(score_TE, k)[profile.num_fit :]


def agreement(planted, router: Router) -> float:
    """Share of the choices for held-out tokens that are the planted ones."""
    k = planted.shape.experts_per_token
    mask_TE = chosen(planted.ffn, planted.profile, planted.partition, router, k)
    return (mask_TE & planted.chosen_TE[planted.profile.num_fit :]).sum() / (k * len(mask_TE))


# The values that routing is made of


def test_energies_by_expert_equal_plain_loops():
    ffn, profile, partition = setting(0)
    wanted_TE = by_expert(energies(ffn, profile.h_TF), partition)
    np.testing.assert_allclose(energies_of(ffn, partition, profile.h_TF), wanted_TE, rtol=1e-4)
    for part, rows in (("fit", slice(160)), ("heldout", slice(160, None)), ("all", slice(None))):
        found_TE = expert_energies(ffn, profile, partition, part)
        np.testing.assert_allclose(found_TE, wanted_TE[rows], rtol=1e-4)


def test_an_expert_writes_what_the_sum_of_its_energies_bounds():
    # One neuron per expert: its energy is the squared length of what the expert writes.
    ffn, profile, _ = setting(1)
    single = Partition(torch.empty(0, dtype=torch.long), torch.arange(48)[:, None])
    energy_TE = energies_of(ffn, single, profile.h_TF)
    for neuron in (0, 17, 47):
        written_TD = profile.h_TF[:, neuron, None] * ffn.down_DF[:, neuron]
        np.testing.assert_allclose(energy_TE[:, neuron], written_TD.square().sum(1), rtol=1e-4)


def test_membership_equals_plain_loops():
    _, _, partition = setting(2)
    member_FE = membership(partition, 48)
    for neuron in range(48):
        homes = [e for e in range(5) if neuron in partition.experts_EN[e].tolist()]
        assert member_FE[neuron].nonzero().flatten().tolist() == homes


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("overlaps", [False, True])
def test_products_of_what_runs_are_those_of_the_whole(block, overlaps, monkeypatch):
    """Other than zero they are only where a neuron runs, which plain loops say."""
    monkeypatch.setattr(routing, "BLOCK", block)
    ffn, profile, partition = setting(2)
    if overlaps:  # each expert takes two neurons of the next
        experts_EN = partition.experts_EN
        more_EN = torch.cat([experts_EN, experts_EN.roll(-1, 0)[:, :2]], 1)
        partition = Partition(partition.shared_S, more_EN)
    mask_TE = top_mask(torch.randn(240, 5, generator=seeded(0)), 2)
    routed = RoutedFFN(ffn, partition, Router(torch.zeros(5, 12)), 2)
    h_TF, y_TD = profile.h_TF.double(), profile.goal_TD.double()
    run = routed.run(h_TF, mask_TE)
    assert sorted(routed.used_A.tolist()) == list(range(48))
    run_TF = torch.zeros_like(h_TF)
    for token in range(240):
        run_TF[token, partition.shared_S] = h_TF[token, partition.shared_S]
        for neurons in partition.experts_EN[mask_TE[token] == 1]:
            run_TF[token, neurons] += h_TF[token, neurons]
    run_TA = run_TF[:, routed.used_A]
    torch.testing.assert_close(run.h_TA, run_TA)
    down_AD = ffn.down_DF.T[routed.used_A]
    assert torch.equal(routed.down_AD, down_AD)
    torch.testing.assert_close(run.outputs(down_AD.double()), run_TF @ ffn.down_DF.T.double())
    gram_AA, cross_AD = h_TF.new_zeros(48, 48), h_TF.new_zeros(48, 12)
    run.add_products(y_TD, gram_AA, cross_AD)
    torch.testing.assert_close(gram_AA.tril(), (run_TA.T @ run_TA).tril())
    torch.testing.assert_close(cross_AD, run_TA.T @ y_TD)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_choices_equal_plain_loops(k):
    ffn, profile, partition = setting(3)
    rows = Router(torch.randn(5, 12, generator=seeded(1)))
    for router in (rows, dataclasses.replace(rows, norm_EN=torch.rand(5, 8, generator=seeded(2)))):
        mask_TE = RoutedFFN(ffn, partition, router, k).mask(profile.x_TD, profile.h_TF)
        assert mask_TE.sum(1).tolist() == [k] * 240
        wanted_TE = chosen(ffn, profile, partition, router, k)
        assert np.array_equal(mask_TE[160:].numpy() > 0, wanted_TE)


def test_the_oracle_chooses_the_experts_of_greatest_energy():
    ffn, profile, partition = setting(3)
    router = FITS["oracle"](ffn, profile, partition, SHAPE, generator=seeded(0))
    wanted_TE = mask_of(by_expert(energies(ffn, profile.h_TF), partition), 2)
    found_TE = RoutedFFN(ffn, partition, router, 2).mask(profile.x_TD, profile.h_TF)
    assert np.array_equal(found_TE.numpy() > 0, wanted_TE)


def test_the_weight_of_a_token_does_not_change_where_it_goes():
    ffn, profile, partition = setting(4)
    scale_T1 = torch.rand(240, 1, generator=seeded(0)) * 9 + 1
    router = Router(torch.zeros(5, 12), torch.rand(5, 8, generator=seeded(1)))
    plain_TE = RoutedFFN(ffn, partition, router, 2).mask(profile.x_TD, profile.h_TF)
    scaled_TE = RoutedFFN(ffn, partition, router, 2).mask(profile.x_TD, profile.h_TF * scale_T1)
    assert torch.equal(plain_TE, scaled_TE)


# Every router


@pytest.mark.parametrize("name", FITS)
def test_the_signature_is_the_one_that_recipes_bind(name):
    parameters = inspect.signature(FITS[name]).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert positional == ["ffn", "profile", "partition", "shape"]
    assert keywords.pop("generator") is inspect.Parameter.empty
    assert inspect.Parameter.empty not in keywords.values()


@pytest.mark.parametrize("name", FITS)
def test_a_router_is_finite_seeded_and_of_the_right_size(name):
    ffn, profile, partition = setting(5)
    first = FITS[name](ffn, profile, partition, SHAPE, generator=seeded(1))
    again = FITS[name](ffn, profile, partition, SHAPE, generator=seeded(1))
    assert first.weight_ED.shape == (5, 12) and first.weight_ED.dtype == torch.float32
    assert first.weight_ED.isfinite().all() and not first.weight_ED.requires_grad
    assert torch.equal(first.weight_ED, again.weight_ED)
    assert (first.norm_EN is None) == (name not in UNWRITABLE)
    if first.norm_EN is not None:
        assert first.norm_EN.shape == partition.experts_EN.shape
        assert torch.equal(first.norm_EN, again.norm_EN)
    else:
        # Only the order of the scores counts, so the rows sum to nothing; their scale is set.
        assert first.weight_ED.sum(0).abs().max() < 1e-4
        score_TE = first.scores(profile.x_TD, POSITION_T)
        assert float(score_TE.std()) == pytest.approx(1, abs=0.15)


def test_random_rows_follow_the_seed():
    ffn, profile, partition = setting(6)
    first, second = (
        FITS["random"](ffn, profile, partition, SHAPE, generator=seeded(seed)) for seed in (0, 1)
    )
    assert not torch.allclose(first.weight_ED, second.weight_ED, atol=0.1)
    assert float((profile.x_TD @ first.weight_ED.T).std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", FITS)
def test_dead_and_equal_experts_are_routed_like_others(name):
    for change in ("dead expert", "dead layer", "equal experts"):
        ffn, profile, partition = setting(7)
        if change == "equal experts":
            for weight in (ffn.gate_FD, ffn.up_FD, ffn.down_DF.T):
                weight[partition.experts_EN] = weight[partition.experts_EN[0]].clone()
        else:
            ffn.down_DF[:, partition.experts_EN[0] if change == "dead expert" else slice(None)] = 0
        profile = observe(ffn, Inputs(profile.x_TD, 80))
        router = FITS[name](ffn, profile, partition, SHAPE, generator=seeded(0))
        assert router.weight_ED.isfinite().all()
        routed = RoutedFFN(ffn, partition, router, 2)
        mask_TE = routed.mask(profile.x_TD, profile.h_TF, POSITION_T)
        assert mask_TE.sum(1).tolist() == [2] * 240


# What ours finds


@pytest.mark.parametrize("seed", range(3))
def test_linear_finds_a_planted_routing_and_random_is_at_chance(seed):
    planted = plant(seed)
    given = (planted.ffn, planted.profile, planted.partition, planted.shape)
    assert agreement(planted, FITS["oracle"](*given, generator=seeded(0))) > 0.99
    assert agreement(planted, FITS["linear"](*given, generator=seeded(0))) > 0.9
    assert agreement(planted, FITS["linear"](*given, generator=seeded(0), options=CLOSED)) > 0.9
    by_lot = [agreement(planted, FITS["random"](*given, generator=seeded(n))) for n in range(30)]
    chance = planted.shape.experts_per_token / planted.shape.num_experts
    assert np.mean(by_lot) == pytest.approx(chance, abs=0.05)


def test_linear_is_at_chance_where_inputs_say_nothing():
    # The same energies behind the inputs of other tokens.
    planted = plant()
    other_T = torch.randperm(len(planted.profile.x_TD), generator=seeded(0))
    profile = dataclasses.replace(planted.profile, x_TD=planted.profile.x_TD[other_T])
    router = FITS["linear"](
        planted.ffn, profile, planted.partition, planted.shape, generator=seeded(0)
    )
    found = agreement(dataclasses.replace(planted, profile=profile), router)
    assert found == pytest.approx(2 / 8, abs=0.08)


def test_steps_never_capture_less_than_the_closed_form_and_sometimes_more():
    gains = []
    for seed in range(8):
        ffn, profile, partition = setting(seed)
        energy_TF = energies(ffn, profile.h_TF)[160:]
        closed, stepped = (
            captured(
                energy_TF,
                partition,
                chosen(
                    ffn,
                    profile,
                    partition,
                    FITS["linear"](
                        ffn,
                        profile,
                        partition,
                        SHAPE,
                        generator=seeded(seed),
                        options=linear.Options(steps=steps, load_cv=0.0),
                    ),
                    SHAPE.experts_per_token,
                ),
            )
            for steps in (0, 100)
        )
        gains.append(stepped - closed)
    assert min(gains) >= -1e-6
    assert max(gains) > 1e-3


def test_steps_that_lead_astray_are_not_returned():
    ffn, profile, partition = setting(0)
    # The fitting tokens' energies are dealt to other tokens; only held-out tokens tell the truth.
    other_T = torch.cat([torch.randperm(160, generator=seeded(1)), torch.arange(160, 240)])
    profile = dataclasses.replace(profile, h_TF=profile.h_TF[other_T])
    energy_TF = energies(ffn, profile.h_TF)[160:]
    shares = []
    for options in ({"steps": 0}, {"steps": 100, "learning_rate": 1.0}):
        options = linear.Options(strength=1.0, **options)
        router = linear.fit(ffn, profile, partition, SHAPE, generator=seeded(0), options=options)
        shares.append(captured(energy_TF, partition, chosen(ffn, profile, partition, router, 2)))
    assert shares[1] >= shares[0] - 1e-6


def test_linear_reads_no_heldout_token_in_closed_form():
    ffn, profile, partition = setting(1)
    x_TD = profile.x_TD.clone()
    x_TD[160:] *= -3
    other = observe(ffn, Inputs(x_TD, 80))
    first, second = (
        FITS["linear"](ffn, p, partition, SHAPE, generator=seeded(0), options=CLOSED)
        for p in (profile, other)
    )
    assert torch.equal(first.weight_ED, second.weight_ED)


# The closed form


def test_the_closed_form_is_ridge_regression_of_the_root_energies():
    from sklearn.linear_model import Ridge

    ffn, profile, partition = setting(2)
    x_TD = profile.x_TD[:160].double().numpy()
    root_TE = np.sqrt(by_expert(energies(ffn, profile.h_TF), partition)[:160])
    root_TE -= root_TE.mean(1, keepdims=True)
    alpha = 0.05 * (x_TD**2).sum(0).mean()
    rows_ED = Ridge(alpha=alpha, fit_intercept=False).fit(x_TD, root_TE).coef_
    rows_ED /= (x_TD @ rows_ED.T).std()
    energy_TE = expert_energies(ffn, profile, partition, "fit")
    found_ED = scorer(profile.x_TD[:160], 0.05)(energy_TE)
    np.testing.assert_allclose(found_ED, rows_ED, atol=2e-3)


@pytest.mark.parametrize("rank", [3, 20])
def test_ridge_solves_its_equation_and_gives_the_matrix_back(rank):
    x_TA = torch.randn(rank, 8, generator=seeded(0))
    gram_AA, cross_AB = x_TA.T @ x_TA, torch.randn(8, 2, generator=seeded(1))
    before_AA = gram_AA.clone()
    gram_AA += torch.full((8, 8), float("nan")).triu(1)  # which is not read
    given_AA = gram_AA.clone()
    solution_AB = ridge(gram_AA, cross_AB, 0.1)
    torch.testing.assert_close(gram_AA, given_AA, rtol=0, atol=0, equal_nan=True)
    damped_AA = before_AA + 0.1 * before_AA.diagonal().mean() * torch.eye(8)
    np.testing.assert_allclose(damped_AA @ solution_AB, cross_AB, atol=1e-4)


def test_ridge_survives_a_matrix_that_rounding_left_indefinite():
    gram_AA = torch.diag(torch.tensor([1.0, 1.0, -1e-3]))
    gram_AA[1, 0], gram_AA[0, 1] = 0.5, float("nan")  # the upper triangle is not read
    given_AA, cross_AB = gram_AA.clone(), torch.ones(3, 1)
    solution_AB = ridge(gram_AA, cross_AB, 1e-6)
    damped_AA = np.array([[1.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, -1e-3]])
    damped_AA += 1e-6 * np.diag(damped_AA).mean() * np.eye(3)
    np.testing.assert_allclose(damped_AA @ solution_AB.numpy(), cross_AB, rtol=1e-3)
    torch.testing.assert_close(gram_AA, given_AA, rtol=0, atol=0, equal_nan=True)


# What experts are worth beside the others


@pytest.mark.parametrize("k", [1, 2])
def test_gains_are_differences_of_squared_errors(k, monkeypatch):
    monkeypatch.setattr(routing, "GAINS", 100)  # several parts
    ffn = random_ffn(0)
    shape = dataclasses.replace(SHAPE, experts_per_token=k)
    profile = observe(ffn, Inputs(torch.randn(60, 12, generator=seeded(1)), 20))
    partition = shuffle.split(ffn, profile, shape, generator=seeded(0))
    router = FITS["random"](ffn, profile, partition, shape, generator=seeded(0))
    changed = dataclasses.replace(ffn, down_DF=ffn.down_DF * 1.1)
    found_TE = routing.gains(RoutedFFN(changed, partition, router, k), profile)
    parts = [(profile.h_TF[:, n] @ changed.down_DF[:, n].T).double() for n in partition.experts_EN]
    shared_TD = profile.h_TF[:, partition.shared_S] @ changed.down_DF[:, partition.shared_S].T
    score_TE = profile.x_TD @ router.weight_ED.T

    def error(token: int, experts: set[int]) -> float:
        made_D = shared_TD[token].double() + sum(parts[e][token] for e in experts)
        return float((profile.goal_TD[token].double() - made_D).square().sum())

    for token in range(60):
        chosen = set(score_TE[token].topk(k).indices.tolist())
        worth = {e: error(token, chosen - {e}) - error(token, chosen) for e in chosen}
        rest = chosen - {min(worth, key=worth.__getitem__)}
        for expert in set(range(shape.num_experts)) - chosen:
            worth[expert] = error(token, rest) - error(token, rest | {expert})
        wanted_E = [worth[expert] for expert in range(shape.num_experts)]
        np.testing.assert_allclose(found_TE[token].numpy(), wanted_E, rtol=1e-3, atol=1e-5)
