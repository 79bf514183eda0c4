"""Upcycled models: as long as the copies are alike, any routing computes what the dense model does.

The judge is transformers, as in test_identity. Router rows are replaced by others, so that it is
not the routing that was written which agrees.
"""

import json

import pytest
import torch
from planted import seeded
from safetensors.torch import load_file
from stock import (
    EXACT,
    ONE_EACH,
    OWN,
    ROUTER,
    blocks,
    changed,
    dense_logits,
    distance,
    logits,
    opened,
    planted,
    router_rows,
)

from moefy.config.recipe import build
from moefy.convert.prepare import prepare
from moefy.errors import MoefyError
from moefy.models import targets

UPCYCLE = {"method": "upcycle", "experts": 4, "top_k": 2}
CAN = [(family, target) for family, target in ONE_EACH if targets.load(target).copies]
SIZES = {"ernie4_5_moe": 2, "hunyuan_v1_moe": 2}
"""Slices of a copy where 96 neurons divide otherwise."""


@pytest.fixture(scope="module")
def llama(pico):
    return pico("llama")


@pytest.fixture(scope="module")
def whole(llama, converted):
    """Whole copies in the second of two layers."""
    return converted(llama, layers="1:", **UPCYCLE)


def report(folder) -> dict:
    return json.loads((folder / "moefy" / "conversion.json").read_text())


def rerouted(model, granularity: int = 1, seed: int = 0):
    """The model with other router rows, those of the slices of a copy alike, far from equal."""
    for block in blocks(model).values():
        rows_ED = router_rows(block)
        size = (len(rows_ED) // granularity, rows_ED.shape[1])
        copies_ED = 3 * torch.randn(size, generator=seeded(seed))
        rows_ED.data = copies_ED.repeat_interleave(granularity, 0).to(rows_ED)
    return model


def assert_dense(dense, model, granularity: int = 1) -> None:
    assert distance(logits(model), dense_logits(dense)) < EXACT
    other = rerouted(model, granularity)
    assert distance(logits(other), dense_logits(dense)) < EXACT


@pytest.mark.parametrize(("family", "target"), [*CAN, ("gpt2", OWN)])
def test_any_routing_among_copies_is_the_dense_model(family, target, pico, converted):
    dense, size = pico(family), SIZES.get(target, 4)
    moe = opened(converted(dense, target=target, layers=":", granularity=size, **UPCYCLE))
    assert len(router_rows(blocks(moe)[0])) == 4 * size
    assert_dense(dense, moe, size)


def test_whole_copies_in_chosen_layers(llama, whole):
    moe = opened(whole)
    assert list(blocks(moe)) == [1]
    assert_dense(llama, moe)


def slice_lost(tensors, config) -> None:
    """One slice of a copy doubled."""
    changed(tensors, r"experts\.5\.down_proj", lambda down: 2 * down)


def gates_unnormalised(tensors, config) -> None:
    """Gates that sum to less than one."""
    config["norm_topk_prob"] = False


def rows_apart(tensors, config) -> None:
    """Slices of a copy with rows of their own, so that they are not chosen together."""
    changed(tensors, ROUTER, lambda rows: torch.randn(rows.shape, generator=seeded(3)))


@pytest.mark.parametrize("plant", [slice_lost, gates_unnormalised, rows_apart])
def test_a_planted_fault_is_found(plant, llama, converted, tmp_path):
    moe = converted(llama, target="qwen2_moe", layers=":", granularity=4, **UPCYCLE)
    faulty = opened(planted(moe, tmp_path / "faulty", plant))
    assert distance(logits(faulty), dense_logits(llama)) > 100 * EXACT


def test_routers_start_balanced_and_their_gates_mean_something(llama, whole):
    (layer,) = report(whole)["layers"]
    assert layer["load_cv"] <= 0.3
    assert layer["error"] < 1e-6
    chosen = []
    moe = opened(whole)
    blocks(moe)[1].gate.register_forward_hook(lambda module, args, out: chosen.append(out[1]))
    logits(moe)
    assert chosen[0].std(0).min() > 0.05  # not 1 / K for all


def test_noise_and_reinit_change_the_share_of_weights_that_they_say(llama, whole, converted):
    """Each copy otherwise, and the shared neurons not at all."""
    base = load_file(whole / "model.safetensors")
    given = {"layers": "1:", **UPCYCLE}
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"

    noisy = load_file(converted(llama, noise=0.1, **given) / "model.safetensors")
    steps = [noisy[name.format(e)] - base[name.format(e)] for e in range(4)]
    for step in steps:
        assert float(step.std() / base[name.format(0)].std()) == pytest.approx(0.1, rel=0.1)
    assert distance(steps[0], steps[1]) > 0.5

    moe = converted(llama, reinit=0.5, **given)
    drawn = load_file(moe / "model.safetensors")
    for expert in range(4):
        rows_ND = drawn[name.format(expert)]
        same_N = (rows_ND == base[name.format(expert)]).all(1)
        assert float((~same_N).float().mean()) == pytest.approx(0.5, abs=0.01)
        down_DN = drawn[name.format(expert).replace("up", "down")]
        before_DN = base[name.format(expert).replace("up", "down")]
        assert torch.equal((down_DN == before_DN).all(0), same_N)
        fresh = rows_ND[~same_N]
        assert float(fresh.std() / base[name.format(expert)].std()) == pytest.approx(1, rel=0.1)
    assert report(moe)["layers"][0]["error"] > 0.3
    shared = "model.layers.1.mlp.shared_expert.up_proj.weight"
    assert torch.equal(drawn[shared], base[shared])
    assert torch.equal(noisy[shared], base[shared])


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"active": 0.5}, 2, "--active 0.5"),
        ({"overlap": 2.0}, 2, "--overlap 2"),
        ({"refit": True}, 2, "--refit"),
        ({"router": "linear"}, 2, "clusters or random"),
        ({"granularity": 3}, 2, "power of two"),
        ({"granularity": 64, "target": "mixtral"}, 2, "--granularity 64"),
        ({"top_k": 5}, 2, "at most 4"),
        ({"method": "ours", "noise": 0.1, "top_k": None}, 2, "--noise without copies"),
        ({"target": "glm4_moe"}, 4, "sum to one"),
        ({"engines": "llama.cpp", "layers": "0:1"}, 4, "glm4_moe: its gates"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, code, words, llama):
    values = {"model": str(llama), **UPCYCLE, **changes}
    with pytest.raises(MoefyError) as caught:
        prepare(build(None, values, []))
    assert caught.value.code == code
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_engines_that_know_no_normalised_gates_are_named(llama):
    plan = prepare(build(None, {"model": str(llama), "engines": "llama.cpp", **UPCYCLE}, []))
    assert plan.target.model_type == "mixtral"  # qwen2_moe is the first choice elsewhere
    assert "norm_topk_prob" in plan.reason
