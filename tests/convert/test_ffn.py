"""A converted block is the FFN it was, and its figures are what plain loops count."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from planted import (
    NOT_ROUTED,
    by_expert,
    energies,
    mask_of,
    methods,
    plant,
    random_ffn,
    seeded,
    slopes,
    squares,
)

from moefy.convert.ffn import Block, Method, convert_block
from moefy.convert.profile import Inputs, observe
from moefy.convert.router import linear, mlp
from moefy.types import FFN, Partition, Shape

SPLITS = methods("partition", "split")
FITS = methods("router", "fit")
FITS["mlp"] = partial(mlp.fit, options=mlp.Options(unit_steps=25))  # quickly, and as exact
WAYS = [(split, fit) for split in SPLITS for fit in (["none"] if split in NOT_ROUTED else FITS)]
SHAPE = Shape(48, 8, 5, 8, 2)
HELDOUT, LENGTH = 60, 20


def method(split: str, fit: str = "linear", refit: bool = True) -> Method:
    return Method(SPLITS[split], None if split in NOT_ROUTED else FITS[fit], refit)


def inputs(seed: int) -> tuple[FFN, torch.Tensor, torch.Tensor]:
    """A random FFN, what it reads, and what its output is added to."""
    ffn = random_ffn(seed)
    x_TD, residual_TD = torch.randn(2, 180, 12, generator=seeded(20 + seed))
    return ffn, x_TD + 0.3, residual_TD * (1 + 9 * torch.rand(180, 1, generator=seeded(seed)))


def convert(
    ffn: FFN,
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    how: Method,
    *,
    shape: Shape = SHAPE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Block:
    slope_TD = slopes(x_TD, HELDOUT)
    inputs = Inputs(x_TD, HELDOUT, residual_TD, gradient_TD=slope_TD, length=LENGTH)
    return convert_block(ffn, inputs, shape, how, dtype=dtype, seed=seed)


def dense(ffn: FFN, x_TD: torch.Tensor) -> torch.Tensor:
    """The FFN in float64, from its definition."""
    gate_FD, up_FD, down_DF = ffn.gate_FD.double(), ffn.up_FD.double(), ffn.down_DF.double()
    gate_TF = x_TD.double() @ gate_FD.T
    return (gate_TF * gate_TF.sigmoid() * (x_TD.double() @ up_FD.T)) @ down_DF.T


def choices(block: Block, ffn: FFN, x_TD: torch.Tensor, k: int) -> np.ndarray:
    """True where a token goes to an expert, (T, E)."""
    router = block.routed.router
    if router.norm_EN is not None:
        return mask_of(squares(ffn.activations(x_TD), block.routed.partition, router.norm_EN), k)
    score_TE = x_TD.double() @ router.weight_ED.double().T
    if router.hidden_HD is not None:
        score_TE += torch.tanh(x_TD.double() @ router.hidden_HD.double().T) @ (
            router.output_EH.double().T
        )
    if router.position_PE is not None:
        score_TE += router.position_PE.double().repeat(len(x_TD) // LENGTH, 1)
    return mask_of(score_TE.numpy(), k)


def routed(block: Block, ffn: FFN, x_TD: torch.Tensor, k: int) -> np.ndarray:
    """Outputs of the shared neurons and the chosen experts, each a small FFN, in float64."""
    parts = [block.routed.partition.shared_S, *block.routed.partition.experts_EN]
    written_PTD = [
        dense(FFN(ffn.gate_FD[n], ffn.up_FD[n], block.routed.ffn.down_DF[:, n]), x_TD).numpy()
        for n in parts
    ]
    out_TD = written_PTD[0].copy()
    if len(parts) > 1:
        mask_TE = choices(block, ffn, x_TD, k)
        for expert, expert_TD in enumerate(written_PTD[1:]):
            out_TD += mask_TE[:, expert, None] * expert_TD
    return out_TD


def assert_close(found_TD: torch.Tensor, wanted_TD, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    wanted_TD = torch.as_tensor(wanted_TD)
    assert (found_TD - wanted_TD).abs().max() < tolerance * wanted_TD.abs().max()


# All experts


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("split", sorted(set(SPLITS) - NOT_ROUTED))
def test_with_all_experts_active_the_outputs_are_the_dense_ones(split, fit):
    ffn, x_TD, residual_TD = inputs(0)
    shape = dataclasses.replace(SHAPE, experts_per_token=5)
    block = convert(ffn, x_TD, residual_TD, method(split, fit), shape=shape)
    assert_close(block.y_TD, dense(ffn, x_TD))
    assert torch.equal(block.routed.ffn.down_DF, ffn.down_DF)
    assert block.figures["refit_strength"] is None
    assert block.figures["error_after_refit"] < 1e-5
    for name in ("router", "oracle", "random", "neurons"):
        assert block.figures[f"energy_{name}"] == pytest.approx(1, abs=1e-5)
    assert block.figures["expert_load"] == [0.2] * 5
    # One expert fewer, and they are not: the comparison can fail.
    fewer = dataclasses.replace(SHAPE, experts_per_token=4)
    less = convert(ffn, x_TD, residual_TD, method(split, fit), shape=fewer)
    with pytest.raises(AssertionError):
        assert_close(less.y_TD, dense(ffn, x_TD), 1e-2)


def test_a_static_split_that_keeps_all_neurons_is_the_dense_layer():
    ffn, x_TD, residual_TD = inputs(0)
    block = convert(ffn, x_TD, residual_TD, method("static"), shape=Shape(48, 48, 0, 0, 0))
    assert_close(block.y_TD, dense(ffn, x_TD))
    assert torch.equal(block.routed.ffn.down_DF, ffn.down_DF)


# Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("split", "fit"), WAYS)
def test_outputs_are_those_of_the_experts_as_they_will_be_stored(split, fit, dtype):
    ffn, x_TD, residual_TD = inputs(1)
    block = convert(ffn, x_TD, residual_TD, method(split, fit), dtype=dtype)
    router = block.routed.router
    terms = (router.hidden_HD, router.output_EH, router.position_PE)
    for weight in (block.routed.ffn.down_DF, router.weight_ED, *terms):
        if weight is None:
            continue
        assert torch.equal(weight, weight.to(dtype).float())
    assert torch.equal(block.routed.ffn.gate_FD, ffn.gate_FD)
    assert torch.equal(block.routed.ffn.up_FD, ffn.up_FD)
    assert_close(block.y_TD, routed(block, ffn, x_TD, SHAPE.experts_per_token))


@pytest.mark.parametrize(("split", "fit"), WAYS)
def test_the_errors_told_weigh_each_token_by_the_stream_that_leaves(split, fit):
    ffn, x_TD, residual_TD = inputs(2)
    for refit in (False, True):
        block = convert(ffn, x_TD, residual_TD, method(split, fit, refit))
        wanted_TD = dense(ffn, x_TD).numpy()
        weight_T1 = 1 / np.linalg.norm(residual_TD.numpy() + wanted_TD, axis=1, keepdims=True)
        wrong_TD = (routed(block, ffn, x_TD, 2) - wanted_TD) * weight_T1
        told = block.figures
        for part, name in (
            (slice(-HELDOUT, None), "error_after_refit"),
            (slice(0, -HELDOUT), "error_after_refit_on_fitting_tokens"),
        ):
            norm = np.linalg.norm((wanted_TD * weight_T1)[part])
            assert told[name] == pytest.approx(np.linalg.norm(wrong_TD[part]) / norm, rel=1e-3)
        assert told["error_after_refit"] <= told["error_before_refit"]
        if not refit:
            assert told["refit_strength"] is None
            assert told["error_before_refit"] == told["error_after_refit"]


@pytest.mark.parametrize(("split", "fit"), WAYS)
def test_the_unit_of_the_residual_stream_does_not_matter(split, fit):
    # Four is a power of two: rounding is the same, so equality is exact.
    ffn, x_TD, residual_TD = inputs(3)
    louder = dataclasses.replace(ffn, down_DF=4 * ffn.down_DF)
    first = convert(ffn, x_TD, residual_TD, method(split, fit))
    second = convert(louder, x_TD, 4 * residual_TD, method(split, fit))
    assert torch.equal(first.routed.partition.shared_S, second.routed.partition.shared_S)
    assert torch.equal(first.routed.partition.experts_EN, second.routed.partition.experts_EN)
    assert torch.equal(first.routed.router.weight_ED, second.routed.router.weight_ED)
    assert torch.equal(4 * first.y_TD, second.y_TD)
    assert torch.equal(4 * first.routed.ffn.down_DF, second.routed.ffn.down_DF)


@pytest.mark.parametrize(("split", "fit"), [("shuffle", "random"), ("static", "none")])
def test_a_heldout_token_changes_nothing_for_others(split, fit):
    ffn, x_TD, residual_TD = inputs(4)
    before = convert(ffn, x_TD, residual_TD, method(split, fit, refit=False))
    residual_TD = residual_TD.clone()
    residual_TD[-1] *= 1000
    after = convert(ffn, x_TD, residual_TD, method(split, fit, refit=False))
    assert torch.equal(before.routed.partition.shared_S, after.routed.partition.shared_S)
    assert torch.equal(before.y_TD[:-1], after.y_TD[:-1])
    assert_close(before.y_TD[-1], after.y_TD[-1], 1e-5)
    # What it is added to drowns it: its error counts for less.
    assert before.figures["error_after_refit"] != after.figures["error_after_refit"]


def test_heldout_tokens_are_not_fitted_on():
    ffn, x_TD, residual_TD = inputs(5)
    other_TD = x_TD.clone()
    other_TD[-HELDOUT:] = torch.randn(HELDOUT, 12, generator=seeded(9)) * 3
    how = Method(SPLITS["shuffle"], partial(linear.fit, options=linear.Options(steps=0)), False)
    first, second = (convert(ffn, x, residual_TD, how) for x in (x_TD, other_TD))
    profiles = [observe(ffn, Inputs(x, HELDOUT, residual_TD)) for x in (x_TD, other_TD)]
    assert torch.equal(profiles[0].energy_F, profiles[1].energy_F)
    assert torch.equal(first.routed.partition.shared_S, second.routed.partition.shared_S)
    assert torch.equal(first.routed.partition.experts_EN, second.routed.partition.experts_EN)
    assert torch.equal(first.routed.router.weight_ED, second.routed.router.weight_ED)
    assert torch.equal(first.y_TD[:-HELDOUT], second.y_TD[:-HELDOUT])


@pytest.mark.parametrize(("split", "fit"), WAYS)
def test_the_seed_decides(split, fit):
    ffn, x_TD, residual_TD = inputs(6)
    first, second = (convert(ffn, x_TD, residual_TD, method(split, fit), seed=7) for _ in range(2))
    assert torch.equal(first.y_TD, second.y_TD)
    told = [
        {key: value for key, value in block.figures.items() if "seconds" not in key}
        for block in (first, second)
    ]
    assert told[0] == told[1]


# Figures


@pytest.mark.parametrize(("split", "fit"), WAYS)
def test_shares_of_energy_are_in_their_order_and_equal_plain_loops(split, fit):
    ffn, x_TD, residual_TD = inputs(7)
    block = convert(ffn, x_TD, residual_TD, method(split, fit))
    told, k = block.figures, SHAPE.experts_per_token
    stream_TD = residual_TD + dense(ffn, x_TD)
    weight_T1 = 1 / stream_TD.square().sum(1, keepdim=True).numpy()
    energy_TF = energies(ffn, ffn.activations(x_TD)) * weight_T1
    fit_TF, held_TF = energy_TF[:-HELDOUT], energy_TF[-HELDOUT:]
    total = held_TF.sum()
    static_F = np.argsort(-fit_TF.mean(0))[: SHAPE.num_active]
    wanted = {
        "static": held_TF[:, static_F].sum() / total,
        "neurons": np.sort(held_TF, axis=1)[:, -SHAPE.num_active :].sum() / total,
    }
    if split not in NOT_ROUTED:
        expert_TE = by_expert(held_TF, block.routed.partition)
        shared = held_TF[:, block.routed.partition.shared_S.numpy()].sum()
        mask_TE = choices(block, ffn, x_TD[-HELDOUT:], k)
        best_TE = mask_of(expert_TE, k)
        wanted["router"] = (shared + (expert_TE * mask_TE).sum()) / total
        wanted["oracle"] = (shared + (expert_TE * best_TE).sum()) / total
        wanted["random"] = (shared + expert_TE.sum() * k / SHAPE.num_experts) / total
        load_E = mask_TE.sum(0) / mask_TE.sum()
        assert told["expert_load"] == pytest.approx(load_E.tolist(), abs=1e-5)
        assert sum(told["expert_load"]) == pytest.approx(1, abs=1e-4)
        assert told["load_cv"] == pytest.approx(load_E.std() / load_E.mean(), abs=1e-5)
        agreed = (mask_TE & best_TE).sum() / best_TE.sum()
        assert told["router_oracle_agreement"] == pytest.approx(agreed, abs=1e-6)
        assert told["agreement_by_chance"] == k / SHAPE.num_experts
    found = {
        name.removeprefix("energy_"): value
        for name, value in told.items()
        if name.startswith("energy_")
    }
    assert found == pytest.approx(wanted, rel=1e-4)
    assert 1 >= found["neurons"] >= found["static"]
    if split not in NOT_ROUTED:
        assert found["neurons"] >= found["oracle"] >= found["router"]
        assert found["oracle"] >= found["random"]


@pytest.mark.parametrize("split", sorted(set(SPLITS) - NOT_ROUTED))
def test_the_oracle_router_agrees_with_the_oracle(split):
    block = convert(*inputs(8), method(split, "oracle"))
    assert block.figures["router_oracle_agreement"] == 1
    assert block.figures["energy_router"] == block.figures["energy_oracle"]
    assert convert(*inputs(8), method(split, "random")).figures["router_oracle_agreement"] < 0.7


@pytest.mark.parametrize("fit", ["oracle", "linear"])
def test_a_dead_expert_gets_no_token(fit):
    planted = plant()
    partition, shape = planted.partition, planted.shape
    ffn = dataclasses.replace(planted.ffn, down_DF=planted.ffn.down_DF.clone())
    ffn.down_DF[:, partition.experts_EN[3]] = 0
    x_TD = planted.profile.x_TD

    def split(*_: object, **__: object) -> Partition:
        return partition

    # Balance would give a dead expert tokens: that is tested on its own.
    fit_on = {"options": linear.Options(load_cv=0.0)} if fit == "linear" else {}
    dead, alive = (
        convert_block(
            layer,
            Inputs(x_TD, 200, torch.zeros_like(x_TD)),
            shape,
            Method(split, partial(FITS[fit], **fit_on), True),
            dtype=torch.float32,
            seed=0,
        ).figures
        for layer in (ffn, planted.ffn)
    )
    assert dead["expert_load"][3] < 0.005
    assert min(dead["expert_load"][:3] + dead["expert_load"][4:]) > 0.08
    assert dead["load_cv"] > 0.3
    assert min(alive["expert_load"]) > 0.08
    assert alive["load_cv"] < 0.3


def test_experts_are_described_as_they_are():
    ffn, x_TD, residual_TD = inputs(9)
    told = convert(ffn, x_TD, residual_TD, method("shuffle")).figures
    names = ("shared_neurons", "experts", "expert_width", "experts_per_token")
    assert [told[name] for name in names] == [8, 5, 8, 2]
    told = convert(ffn, x_TD, residual_TD, method("static")).figures
    assert [told[name] for name in names] == [24, 0, 0, 0]
    block = convert(ffn, x_TD, residual_TD, method("alternating", "oracle"))
    squares_F = (ffn.down_DF.numpy().astype(np.float64) ** 2).sum(0)
    for expert, neurons in enumerate(block.routed.partition.experts_EN.numpy()):
        np.testing.assert_allclose(
            block.routed.router.norm_EN[expert], squares_F[neurons], rtol=1e-5
        )


@pytest.mark.parametrize(("split", "fit"), WAYS)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_layer_that_writes_nothing_is_converted_to_one_that_writes_nothing(split, fit):
    # As in models that were made deeper by added layers whose down_proj starts at zero.
    ffn, x_TD, residual_TD = inputs(0)
    ffn.down_DF[:] = 0
    block = convert(ffn, x_TD, residual_TD, method(split, fit))
    assert not block.y_TD.any()
    assert block.figures["error_after_refit"] == 0
    assert block.figures["energy_neurons"] == 0


# Experts that overlap

OVERLAP = Shape(48, 8, 5, 16, 1)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("fit", ["linear", "oracle"])
def test_overlapping_experts_write_what_is_stored(fit, k, refit):
    ffn, x_TD, residual_TD = inputs(2)
    shape = dataclasses.replace(OVERLAP, experts_per_token=k)
    block = convert(ffn, x_TD, residual_TD, method("alternating", fit, refit), shape=shape)
    assert block.routed.ffn.num_neurons == shape.num_stored == 88 and shape.overlaps
    rows = {row.numpy().tobytes(): neuron for neuron, row in enumerate(ffn.up_FD)}
    origin_F = torch.tensor([rows[row.numpy().tobytes()] for row in block.routed.ffn.up_FD])
    assert torch.equal(block.routed.ffn.gate_FD, ffn.gate_FD[origin_F])
    for (
        neurons
    ) in block.routed.partition.experts_EN:  # never twice in a token's run with one expert
        active = torch.cat([block.routed.partition.shared_S, neurons])
        assert len(origin_F[active].unique()) == 24
    assert len(origin_F.unique()) < 88
    assert_close(block.y_TD, routed(block, block.routed.ffn, x_TD, k))
    if not refit:
        assert torch.equal(block.routed.ffn.down_DF, ffn.down_DF[:, origin_F])


def test_the_error_told_of_overlapping_experts_is_that_of_their_outputs():
    ffn, x_TD, residual_TD = inputs(2)
    block = convert(ffn, x_TD, residual_TD, method("alternating"), shape=OVERLAP)
    wanted_TD = dense(ffn, x_TD).numpy()
    scale_T1 = 1 / np.linalg.norm(residual_TD.numpy() + wanted_TD, axis=1, keepdims=True)
    held = slice(-HELDOUT, None)
    found_TD = routed(block, block.routed.ffn, x_TD, 1)
    wrong = np.linalg.norm(((found_TD - wanted_TD) * scale_T1)[held])
    told = block.figures["error_after_refit"]
    assert told == pytest.approx(wrong / np.linalg.norm((wanted_TD * scale_T1)[held]), rel=1e-3)
    assert told <= block.figures["error_before_refit"]
