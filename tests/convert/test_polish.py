"""Polish is Adam on a layer's own error, judged by held-out tokens; it never makes that worse."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import random_ffn, seeded
from safetensors.torch import load_file

from moefy.config.recipe import build
from moefy.convert.partition import shuffle, static
from moefy.convert.polish import activations, polish
from moefy.convert.prepare import prepare
from moefy.convert.profile import Inputs, observe
from moefy.convert.refit import refit
from moefy.convert.routed_ffn import RoutedFFN, unrouted
from moefy.convert.router import linear
from moefy.convert.run import convert
from moefy.errors import MoefyError
from moefy.types import Shape

SHAPE = Shape(48, 8, 5, 8, 2)


def setting(*, tokens: int = 4000, routes: bool = True):
    """A refitted FFN, divided by lot, and its profile."""
    ffn = random_ffn(0)
    x_TD, residual_TD = torch.randn(2, tokens, 12, generator=seeded(1))
    profile = observe(ffn, Inputs(x_TD, tokens // 4, residual_TD))
    split = shuffle.split if routes else static.split
    partition = split(ffn, profile, SHAPE, generator=seeded(2))
    routed = unrouted(ffn, partition)
    if routes:
        router = linear.fit(ffn, profile, partition, SHAPE, generator=seeded(3))
        routed = RoutedFFN(ffn, partition, router, 2)
    return routed.with_down(refit(routed, profile).down_DF), profile


def error(routed: RoutedFFN, profile) -> float:
    """On the held-out tokens: plain loops in float64."""
    ffn, wrong, norm = routed.ffn, 0.0, 0.0
    gate_FD, up_FD, down_DF = (m.double().numpy() for m in (ffn.gate_FD, ffn.up_FD, ffn.down_DF))
    for token in range(profile.num_fit, len(profile.x_TD)):
        x_D, scale = profile.x_TD[token].double().numpy(), float(profile.scale_T[token])
        neurons = routed.partition.shared_S.tolist()
        if routed.k:
            score_E = routed.router.weight_ED.double().numpy() @ x_D
            for expert in np.argsort(-score_E)[: routed.k]:
                neurons += routed.partition.experts_EN[expert].tolist()
        gate_F, up_F = gate_FD[neurons] @ x_D, up_FD[neurons] @ x_D
        y_D = down_DF[:, neurons] @ (gate_F / (1 + np.exp(-gate_F)) * up_F)
        goal_D = profile.goal_TD[token].double().numpy()
        wrong += ((scale * y_D - goal_D) ** 2).sum()
        norm += (goal_D**2).sum()
    return (wrong / norm) ** 0.5


@pytest.mark.parametrize("routes", [True, False])
def test_a_trained_layer_errs_less_on_tokens_that_it_never_saw(routes):
    routed, profile = setting(routes=routes)
    trained, told = polish(routed, profile, 20, seeded(4))
    before, after = error(routed, profile), error(trained, profile)
    assert after == pytest.approx(told, rel=1e-4)
    assert after < 0.97 * before
    assert trained.router is routed.router and trained.partition is routed.partition
    again, _ = polish(routed, profile, 20, seeded(4))
    assert torch.equal(again.ffn.down_DF, trained.ffn.down_DF)


def test_what_only_fits_its_own_tokens_is_not_kept():
    """The planted fault: wrong aims on the tokens to fit on. The weights stay, to the bit."""
    routed, profile = setting(tokens=400)
    sign_T1 = torch.ones(400, 1).index_fill_(0, torch.arange(profile.num_fit), -1.0)
    misled = dataclasses.replace(profile, goal_TD=profile.goal_TD * sign_T1)
    kept, told = polish(routed, misled, 3, seeded(6))
    assert kept.ffn is routed.ffn
    assert told == pytest.approx(error(routed, profile), rel=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_those_of_the_ffn(activation, gated):
    ffn = dataclasses.replace(random_ffn(7), activation=activation)
    if not gated:
        ffn = dataclasses.replace(ffn, gate_FD=None, bias_F=torch.randn(48, generator=seeded(8)))
    x_TD = torch.randn(5, 12, generator=seeded(9))
    torch.testing.assert_close(activations(ffn, x_TD), ffn.activations(x_TD))


def test_a_polished_layer_is_written_with_what_it_was_trained_to(pico, text, tmp_path):
    """The reopened model computes what the converter did; without passes the layer errs more."""
    given = {"model": str(pico("llama")), "calibration": str(text), "tokens": 4096, "layers": ":"}
    told = {}
    for polished in (0, 8):
        recipe = build(None, {**given, "sequence_length": 64, "polish": polished}, [])
        told[polished] = convert(prepare(recipe), tmp_path / f"{polished}")
    assert told[8]["reopened"]["hidden_state_error"] < 1e-2
    for layer in told[8]["layers"]:
        assert layer["error_after_polish"] <= layer["error_after_refit"]
    assert any(row["error_after_polish"] < row["error_after_refit"] for row in told[8]["layers"])
    assert not any("error_after_polish" in layer for layer in told[0]["layers"])
    weights = [load_file(tmp_path / f"{n}" / "model.safetensors") for n in (0, 8)]
    name = next(name for name in weights[0] if "gate_proj" in name and "expert" in name)
    assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "upcycle", "polish": 2}, "copies lose nothing"),
        ({"polish": -1}, "polish"),
    ],
)
def test_where_there_is_nothing_to_polish(settings, message, pico):
    with pytest.raises(MoefyError, match=message) as caught:
        prepare(build(None, {"model": str(pico("llama")), **settings}, []))
    assert caught.value.code == 2
