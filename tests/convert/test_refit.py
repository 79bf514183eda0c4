"""The refit is ridge regression under the routing, and never makes held-out outputs worse."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import mask_of, random_ffn, seeded
from sklearn.linear_model import Ridge
from torch import nn

from moefy.convert import refit as refitting
from moefy.convert.partition import alternating, shuffle, static
from moefy.convert.profile import Inputs, chunks, observe, some_activations
from moefy.convert.refit import EXPERT_STRENGTHS, STRENGTHS, refit, refit_experts
from moefy.convert.routed_ffn import RoutedFFN, unfold, unrouted
from moefy.convert.router import linear
from moefy.types import FFN, Partition, Profile, Router, Shape

CLOSED = linear.Options(steps=0)
SHAPE = Shape(48, 8, 5, 8, 2)


def setting(seed: int, *, tokens: int = 300, weighed: bool = True):
    """A random FFN whose outputs are added to a residual stream, and experts by lot."""
    ffn = random_ffn(seed)
    x_TD, residual_TD = torch.randn(2, tokens, 12, generator=seeded(50 + seed))
    residual_TD *= torch.rand(tokens, 1, generator=seeded(seed)) * 20
    profile = observe(ffn, Inputs(x_TD, tokens // 3, residual_TD if weighed else None))
    partition = shuffle.split(ffn, profile, SHAPE, generator=seeded(seed))
    router = linear.fit(ffn, profile, partition, SHAPE, generator=seeded(seed), options=CLOSED)
    return ffn, profile, partition, router


def running(profile: Profile, partition: Partition, router: Router, k: int) -> np.ndarray:
    """Activations of what runs, zero elsewhere, (T, F): plain loops in float64."""
    h_TF = profile.h_TF.double().numpy()
    score_TE = profile.x_TD.double().numpy() @ router.weight_ED.double().numpy().T
    mask_TE = mask_of(score_TE, k)
    run_TF = np.zeros_like(h_TF)
    for token, chosen_E in enumerate(mask_TE):
        neurons = [*partition.shared_S.tolist()]
        for expert in np.flatnonzero(chosen_E):
            neurons += partition.experts_EN[expert].tolist()
        run_TF[token, neurons] = h_TF[token, neurons]
    return run_TF


def error(run_TF: np.ndarray, y_TD: torch.Tensor, down_DF: torch.Tensor, tokens: slice) -> float:
    """|y' - y| / |y| over some tokens."""
    wrong_TD = run_TF @ down_DF.double().numpy().T - y_TD.double().numpy()
    return np.linalg.norm(wrong_TD[tokens]) / np.linalg.norm(y_TD[tokens])


def made_up(h_TF: torch.Tensor, down_DF: torch.Tensor, num_heldout: int) -> tuple[FFN, Profile]:
    """An FFN and a profile of given activations, which its inputs have nothing to do with."""
    num_tokens, num_neurons = h_TF.shape
    size = len(down_DF)
    ffn = FFN(torch.zeros(num_neurons, size), torch.zeros(num_neurons, size), down_DF)
    energy_F = h_TF[: num_tokens - num_heldout].square().mean(0) * ffn.down_norm_sq_F
    x_TD = torch.ones(num_tokens, size)
    y_TD = h_TF @ down_DF.T
    return ffn, Profile(x_TD, y_TD, torch.ones(num_tokens), num_heldout, energy_F, h_TF)


def keep(count: int) -> Partition:
    """The static partition that keeps the first neurons."""
    return Partition(torch.arange(count), torch.empty((0, 0), dtype=torch.long))


def regression(run_TF: np.ndarray, missing_TD: np.ndarray, strength: float) -> np.ndarray:
    """scikit-learn's ridge regression of what is missing on what runs, as a change of down."""
    alpha = strength * (run_TF**2).sum(0).mean()
    return Ridge(alpha=alpha, fit_intercept=False).fit(run_TF, missing_TD).coef_


def missing(run_TF: np.ndarray, y_TD: torch.Tensor, down_DF: torch.Tensor) -> np.ndarray:
    return y_TD.double().numpy() - run_TF @ down_DF.double().numpy().T


@pytest.mark.parametrize("tokens", [300, 600, 1500])
def test_the_correction_is_ridge_regression_on_what_runs(tokens):
    ffn, profile, partition, router = setting(0, tokens=tokens)
    found = refit(RoutedFFN(ffn, partition, router, 2), profile)
    assert found.strength in STRENGTHS
    run_TF = running(profile, partition, router, 2)
    fit, held = slice(0, profile.num_fit), slice(profile.num_fit, None)
    missing_TD = missing(run_TF, profile.goal_TD, ffn.down_DF)
    change_DF = regression(run_TF[fit], missing_TD[fit], found.strength)
    slack = 2e-3 * np.abs(change_DF).max()
    np.testing.assert_allclose(found.down_DF - ffn.down_DF, change_DF, atol=slack)
    assert found.error_before == pytest.approx(
        error(run_TF, profile.goal_TD, ffn.down_DF, held), rel=1e-4
    )
    assert found.error_after == pytest.approx(
        error(run_TF, profile.goal_TD, found.down_DF, held), rel=1e-4
    )
    assert found.error_fit == pytest.approx(
        error(run_TF, profile.goal_TD, found.down_DF, fit), rel=1e-3
    )
    # No other strength gives the same, so the comparison can fail.
    other_DF = regression(run_TF[fit], missing_TD[fit], 1.5 * found.strength)
    assert np.abs(other_DF - change_DF).max() > 5 * slack


@pytest.mark.parametrize("tokens", [60, 150, 600])
@pytest.mark.parametrize("mixtures", [6, 12])  # of twelve outputs
def test_no_other_strength_is_better_by_a_hundredth(tokens, mixtures, monkeypatch):
    monkeypatch.setattr(refitting, "MIXTURES", mixtures)
    for seed in range(4):
        ffn, profile, partition, router = setting(seed, tokens=tokens)
        run_TF = running(profile, partition, router, 2)
        fit, held = slice(0, profile.num_fit), slice(profile.num_fit, None)
        missing_TD = missing(run_TF, profile.goal_TD, ffn.down_DF)
        errors = {None: error(run_TF, profile.goal_TD, ffn.down_DF, held)}
        for strength in STRENGTHS:
            change_DF = torch.from_numpy(regression(run_TF[fit], missing_TD[fit], strength))
            errors[strength] = error(run_TF, profile.goal_TD, ffn.down_DF + change_DF, held)
        found = refit(RoutedFFN(ffn, partition, router, 2), profile)
        assert errors[found.strength] <= 1.01 * min(errors.values())


def test_the_static_correction_leaves_the_dropped_columns_alone():
    ffn, profile, _, _ = setting(3)
    partition = static.split(ffn, profile, SHAPE, generator=seeded(0))
    found = refit(unrouted(ffn, partition), profile)
    assert found.strength in STRENGTHS
    kept = partition.shared_S.numpy()
    dropped = np.setdiff1d(np.arange(48), kept)
    assert torch.equal(found.down_DF[:, dropped], ffn.down_DF[:, dropped])
    h_TF = profile.h_TF.double().numpy()[:, kept]
    missing_TD = missing(h_TF, profile.goal_TD, ffn.down_DF[:, kept])
    change_DF = regression(h_TF[:200], missing_TD[:200], found.strength)
    np.testing.assert_allclose((found.down_DF - ffn.down_DF)[:, kept], change_DF, atol=2e-3)


@pytest.mark.parametrize("tokens", [30, 90, 600])
def test_heldout_error_never_rises(tokens):
    strengths = []
    for seed in range(8):
        ffn, profile, partition, router = setting(seed, tokens=tokens, weighed=seed % 2 == 0)
        found = refit(RoutedFFN(ffn, partition, router, 2), profile)
        held = slice(profile.num_fit, None)
        run_TF = running(profile, partition, router, 2)
        before = error(run_TF, profile.goal_TD, ffn.down_DF, held)
        after = error(run_TF, profile.goal_TD, found.down_DF, held)
        assert after <= before * (1 + 1e-5)
        assert found.error_after == pytest.approx(after, rel=1e-4)
        assert (found.strength is None) == torch.equal(found.down_DF, ffn.down_DF)
        strengths.append(found.strength)
    if tokens == 600:
        assert None not in strengths


def test_a_fit_of_few_tokens_does_harm_unless_heldout_tokens_decide():
    # Fewer tokens than neurons run at once: plain least squares fits them all and nothing else.
    harmed = 0
    for seed in range(8):
        ffn, profile, partition, router = setting(seed, tokens=30)
        run_TF = running(profile, partition, router, 2)
        missing_TD = profile.goal_TD.double().numpy() - run_TF @ ffn.down_DF.double().numpy().T
        delta_FD = np.linalg.lstsq(run_TF[:20], missing_TD[:20])[0]
        unchecked_DF = ffn.down_DF + torch.from_numpy(delta_FD.T)
        held = slice(20, None)
        harmed += error(run_TF, profile.goal_TD, unchecked_DF, held) > error(
            run_TF, profile.goal_TD, ffn.down_DF, held
        )
    assert harmed >= 3


@pytest.mark.parametrize("weighed", [True, False])
def test_with_all_experts_active_nothing_changes(weighed):
    for seed in range(4):
        ffn, profile, partition, router = setting(seed, weighed=weighed)
        found = refit(RoutedFFN(ffn, partition, router, 5), profile)
        assert found.strength is None
        assert torch.equal(found.down_DF, ffn.down_DF)
        assert found.error_before == found.error_after < 1e-5
        assert found.error_fit < 1e-5


def test_switched_off_it_measures_and_changes_nothing():
    ffn, profile, partition, router = setting(0)
    found = refit(RoutedFFN(ffn, partition, router, 2), profile, enabled=False)
    assert found.strength is None
    assert torch.equal(found.down_DF, ffn.down_DF)
    run_TF = running(profile, partition, router, 2)
    held, fit = slice(200, None), slice(0, 200)
    assert found.error_before == pytest.approx(error(run_TF, profile.goal_TD, ffn.down_DF, held))
    assert found.error_fit == pytest.approx(error(run_TF, profile.goal_TD, ffn.down_DF, fit))


def test_a_dead_layer_is_left_as_it_is():
    ffn, profile, partition, router = setting(0)
    ffn.down_DF[:] = 0
    profile = observe(ffn, Inputs(profile.x_TD, 100))
    found = refit(RoutedFFN(ffn, partition, router, 2), profile)
    assert (found.error_before, found.error_after, found.error_fit) == (0, 0, 0)
    assert found.strength is None


# Planted problems


def combinations(sign: float) -> tuple[FFN, Profile]:
    """Twelve neurons, and twelve more that answer by `sign` times mixtures of them if held out."""
    kept_TF = torch.randn(600, 12, generator=seeded(0))
    mixing_FF = torch.randn(12, 12, generator=seeded(1)) / 12**0.5
    dropped_TF = kept_TF @ mixing_FF
    dropped_TF[400:] *= sign
    down_DF = torch.randn(8, 24, generator=seeded(2))
    return made_up(torch.cat([kept_TF, dropped_TF], 1), down_DF, 200)


def test_neurons_that_are_combinations_of_kept_ones_are_not_missed():
    ffn, profile = combinations(1.0)
    found = refit(unrouted(ffn, keep(12)), profile)
    assert found.strength == STRENGTHS[0]
    assert found.error_before > 0.5
    # Of what a neuron's share of variance is, ridge takes away about its strength.
    assert found.error_after < 2 * STRENGTHS[0] * found.error_before


def test_where_heldout_tokens_say_the_opposite_the_dense_weights_stay():
    ffn, profile = combinations(-1.0)
    found = refit(unrouted(ffn, keep(12)), profile)
    assert found.strength is None
    assert torch.equal(found.down_DF, ffn.down_DF)
    assert found.error_before == found.error_after
    # Not because nothing was there to learn: what the fitting tokens teach undoes them there.
    run_TF = profile.h_TF.double().numpy() * (np.arange(24) < 12)
    missing_TD = missing(run_TF, profile.goal_TD, ffn.down_DF)
    change_DF = torch.from_numpy(regression(run_TF[:400], missing_TD[:400], 0.01))
    taught = error(run_TF, profile.goal_TD, ffn.down_DF + change_DF, slice(0, 400))
    assert taught < 0.05
    misled = error(run_TF, profile.goal_TD, ffn.down_DF + change_DF, slice(400, None))
    assert misled > 1.5 * found.error_before


def test_where_dropped_neurons_are_silent_on_heldout_tokens_the_dense_weights_stay():
    ffn, profile = combinations(0.0)
    # Held out, the dropped neurons are silent: any correction is an error.
    found = refit(unrouted(ffn, keep(12)), profile)
    assert found.strength is None
    assert found.error_after < 1e-6


def test_an_expert_is_corrected_under_the_tokens_that_it_gets():
    # Expert 0 gets tokens of kind +1, expert 1 those of kind -1. Each expert's neurons echo the
    # other's, with a sign that depends on who runs, so one mask for all could not be corrected.
    kind_T = torch.tensor([1.0, -1.0]).repeat(300)
    a_TF = torch.randn(600, 6, generator=seeded(0))
    h_TF = torch.cat([a_TF, kind_T[:, None] * a_TF], 1)
    ffn, profile = made_up(h_TF, torch.randn(8, 12, generator=seeded(1)), 200)
    x_TD = torch.zeros(600, 8)
    x_TD[:, 0] = kind_T
    profile = dataclasses.replace(profile, x_TD=x_TD)
    router = Router(torch.eye(8)[:1] * torch.tensor([[1.0], [-1.0]]))
    partition = Partition(torch.empty(0, dtype=torch.long), torch.arange(12).view(2, 6))
    routed = refit(RoutedFFN(ffn, partition, router, 1), profile)
    assert routed.strength == STRENGTHS[0]
    assert routed.error_before > 0.5
    assert routed.error_after < 0.05
    everywhere = refit(unrouted(ffn, keep(6)), profile)
    assert everywhere.error_after > 0.5


# Drift: what the layers below have lost


def drifted(join=None, *, drift: float = 1.0):
    """An FFN whose stream came with an error that its own activations tell."""
    ffn = random_ffn(3)
    x_TD, residual_TD = torch.randn(2, 300, 12, generator=seeded(4))
    added_TD = ffn.activations(x_TD) @ ffn.down_DF.T
    leaving_TD = residual_TD + (join(added_TD) if join else added_TD)
    lost_TD = ffn.activations(x_TD) @ torch.randn(48, 12, generator=seeded(5)) * 0.05
    inputs = Inputs(x_TD, 100, residual_TD, join, dense_TD=leaving_TD + lost_TD)
    return ffn, observe(ffn, inputs, drift), lost_TD


def outputs(ffn: FFN, profile: Profile) -> torch.Tensor:
    """What the dense FFN answers, scaled."""
    return ffn.activations(profile.x_TD) @ ffn.down_DF.T * profile.scale_T[:, None]


@pytest.mark.parametrize("drift", [0.0, 0.5, 1.0])
def test_the_output_aims_at_a_share_of_what_is_lacking(drift):
    ffn, profile, lost_TD = drifted(drift=drift)
    wanted_TD = outputs(ffn, profile) + drift * lost_TD * profile.scale_T[:, None]
    torch.testing.assert_close(profile.goal_TD, wanted_TD)


def test_what_enters_a_join_makes_what_leaves_it():
    ffn, profile, lost_TD = drifted(lambda y_TD: 0.25 * y_TD)
    wanted_TD = outputs(ffn, profile) + 4 * lost_TD * profile.scale_T[:, None]
    torch.testing.assert_close(profile.goal_TD, wanted_TD)


def test_nothing_is_made_good_through_what_a_norm_shuts_out():
    """Else the output aims at values that the norm would divide all others by."""
    weight_D = torch.ones(12).index_fill(0, torch.tensor([3]), 1e-6)
    ffn, profile, _ = drifted(lambda y_TD: nn.functional.rms_norm(y_TD, (12,), weight_D))
    y_TD = outputs(ffn, profile)
    aims_TD = profile.goal_TD - y_TD
    assert aims_TD[:, 3].abs().max() < 10 * y_TD.abs().max()
    assert aims_TD.norm() > 0.1 * y_TD.norm()


def test_a_refit_makes_good_what_its_activations_tell():
    """All neurons run, so nothing but the drift is there to fit; without it nothing is."""
    every = Partition(torch.arange(48), torch.zeros(0, 0, dtype=torch.long))
    ffn, profile, _ = drifted()
    found = refit(unrouted(ffn, every), profile)
    assert found.error_after < 0.2 * found.error_before
    ffn, profile, _ = drifted(drift=0.0)
    found = refit(unrouted(ffn, every), profile)
    assert found.strength is None and found.error_before < 1e-6


# Experts that overlap


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "computed again"])
def test_a_copied_neuron_answers_as_an_ffn_that_has_it_many_times(stored):
    """All at once, and an expert's on some tokens; those of other neurons differ."""
    ffn, profile, _, _ = setting(5, tokens=900)
    partition = alternating.split(ffn, profile, Shape(48, 8, 4, 16, 1), generator=seeded(0))
    router = Router(torch.randn(4, ffn.hidden_size, generator=seeded(1)))
    profile = profile if stored else dataclasses.replace(profile, h_TF=None)
    unfolded, spread = unfold(RoutedFFN(ffn, partition, router, 1), profile)
    wanted_TA = unfolded.ffn.activations(profile.x_TD) * profile.scale_T[:, None]
    found_TA = torch.cat([h_TA for _, h_TA, *_ in chunks(unfolded.ffn, spread, "all")])
    torch.testing.assert_close(found_TA, wanted_TA)
    token_T, place_N = torch.tensor([3, 500, 899]), unfolded.partition.experts_EN[2]
    some_TN = some_activations(unfolded.ffn, spread, token_T, place_N)
    torch.testing.assert_close(some_TN, wanted_TA[token_T][:, place_N])
    assert (some_TN - wanted_TA[token_T][:, place_N - 1]).abs().max() > 0.01 * wanted_TA.std()


def test_experts_are_refitted_on_their_own_tokens():
    """Equal to scikit-learn's ridge of each expert's residual, at the strength that was taken."""
    ffn, profile, _, _ = setting(5, tokens=900)
    shape = Shape(48, 8, 4, 16, 1)
    partition = alternating.split(ffn, profile, shape, generator=seeded(0))
    router = linear.fit(ffn, profile, partition, shape, generator=seeded(0), options=CLOSED)
    unfolded, spread = unfold(RoutedFFN(ffn, partition, router, 1), profile)
    places = unfolded.partition
    own = dataclasses.replace(spread, goal_TD=spread.goal_TD.clone())  # is written over
    down_DF, error = refit_experts(unfolded, own)
    _, neuron_A = spread.folded
    copied = dataclasses.replace(spread, h_TF=spread.h_TF[:, neuron_A], folded=None)
    run_TF = running(copied, places, router, 1)
    plain_TD = run_TF @ unfolded.ffn.down_DF.double().numpy().T
    rest_TD = profile.goal_TD.double().numpy() - plain_TD
    chosen_T = (profile.x_TD @ router.weight_ED.T).argmax(1).numpy()
    fit_T = np.arange(900) < profile.num_fit
    errors = []
    for strength in EXPERT_STRENGTHS:
        wanted_DF = unfolded.ffn.down_DF.double().numpy().copy()
        for expert, neurons in enumerate(places.experts_EN.numpy()):
            own_TN = run_TF[fit_T & (chosen_T == expert)][:, neurons]
            damping = strength * (own_TN**2).sum(0).mean()
            model = Ridge(alpha=damping, fit_intercept=False)
            model.fit(own_TN, rest_TD[fit_T & (chosen_T == expert)])
            wanted_DF[:, neurons] += model.coef_
        wrong_TD = profile.goal_TD.double().numpy() - run_TF @ wanted_DF.T
        errors.append(np.linalg.norm(wrong_TD[~fit_T]))
        if errors[-1] == min(errors):
            best_DF = wanted_DF
    norm = np.linalg.norm(profile.goal_TD[~torch.tensor(fit_T)])
    assert min(errors) < np.linalg.norm(rest_TD[~fit_T])
    np.testing.assert_allclose(down_DF.numpy(), best_DF, rtol=2e-3, atol=2e-4)
    assert error == pytest.approx(min(errors) / norm, rel=1e-3)
