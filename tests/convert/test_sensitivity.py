"""The layers that stay dense are those whose loss the stock model itself feels most."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moefy import pipeline
from moefy.config.recipe import build, read
from moefy.convert import sensitivity
from moefy.convert.prepare import Job, prepare
from moefy.convert.run import calibration_tokens, convert
from moefy.errors import MoefyError
from moefy.models import families

LAYERS, LOUD = 6, 3


def down_of(family: str, layer: int) -> str:
    return families.load(family).ffn_names(layer)[-1]


def make_loud(folder: Path, family: str) -> Path:
    """Have one layer write twenty times as much as any other."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(LAYERS):
        tensors[down_of(family, layer)] *= 6.0 if layer == LOUD else 0.3
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def loud(own_pico) -> Path:
    """A model of six layers, one of them loud."""
    return make_loud(own_pico("llama", num_hidden_layers=LAYERS), "llama")


def job_of(model: Path, text: Path, **recipe: Any) -> Job:
    few = {"tokens": 1024, "sequence_length": 64, "calibration": str(text), "layers": "auto"}
    return prepare(build(None, {"model": str(model), **few, **recipe}, []))


def worth(*saved_L: float) -> sensitivity.Savings:
    """Savings that sum up to the whole loss."""
    return sensitivity.Savings(sum(saved_L), list(saved_L))


def silent(*_: object) -> None:
    pass


OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("opt", {}), ("opt", OPT_350M)])
def test_savings_are_what_the_stock_model_gains_by_one_dense_ffn(
    family, changes, own_pico, text, monkeypatch
):
    loud = make_loud(own_pico(family, num_hidden_layers=LAYERS, **changes), family)
    job = job_of(loud, text, target="moefy")
    tokens = calibration_tokens(job, silent)
    blocks = []

    def noted(*args: Any, **options: Any):
        blocks.append(convert_block(*args, **options))
        return blocks[-1]

    convert_block = sensitivity.convert_block
    monkeypatch.setattr(sensitivity, "convert_block", noted)
    found = sensitivity.savings(job, tokens, silent)
    assert len(found.saved_L) == len(blocks) == LAYERS
    assert found.saved_L.index(max(found.saved_L)) == LOUD
    _, probes = sensitivity.pieces(tokens, *sensitivity.PIECES)
    dense = AutoModelForCausalLM.from_pretrained(loud).eval()

    @torch.inference_mode()
    def loss(whole: int | None) -> float:
        """The stock model's, all FFNs pruned but one."""
        model = AutoModelForCausalLM.from_pretrained(loud).eval()
        for layer, block in enumerate(blocks):
            kept = block.routed.partition.shared_S
            assert 0 < len(kept) < 96
            if layer != whole:
                down_DF = model.get_parameter(down_of(family, layer))
                down_DF.zero_()
                down_DF[:, kept] = block.routed.ffn.down_DF[:, kept]
        wanted_BTV = dense(probes).logits.log_softmax(-1)
        loss_BTV = wanted_BTV.exp() * (wanted_BTV - model(probes).logits.log_softmax(-1))
        return float(loss_BTV.sum(-1).mean())

    assert found.kl == pytest.approx(loss(None), rel=1e-3, abs=1e-7)
    for layer, saved in enumerate(found.saved_L):
        assert saved == pytest.approx(found.kl - loss(layer), rel=1e-2, abs=1e-3 * found.kl)


def test_pieces_are_apart_from_each_other_and_spread_over_the_sequences(loud, text):
    job = job_of(loud, text, tokens=4096, sequence_length=256)
    tokens = calibration_tokens(job, silent)
    fitted, probes = sensitivity.pieces(tokens, *sensitivity.PIECES)
    length, num_fitted, num_probes = sensitivity.PIECES
    assert len(fitted) == num_fitted and len(probes) == num_probes
    whole = [part.reshape(-1, length).tolist() for part in tokens.ids_BT.split([14, 2])]
    for drawn, all_of_them in zip((fitted.tolist(), probes.tolist()), whole, strict=True):
        assert drawn[0] == all_of_them[0] and drawn[-1] == all_of_them[-1]
        places = [all_of_them.index(ids) for ids in drawn]
        steps = {after - before for before, after in itertools.pairwise(places)}
        assert max(steps) - min(steps) <= 1


def test_auto_leaves_the_loud_layer_dense_and_shrinks_the_others(loud, text, tmp_path):
    job = job_of(loud, text)
    summary = convert(job, tmp_path / "out")
    assert LOUD in summary["layers_left_dense"]
    dense = len(summary["layers_left_dense"])
    left = summary["shape"]["active_fraction"]
    assert left < 0.5
    assert (dense + (LAYERS - dense) * left) / LAYERS == pytest.approx(0.5, abs=0.01)
    assert (
        AutoConfig.from_pretrained(tmp_path / "out").mlp_only_layers
        == (summary["layers_left_dense"])
    )
    told = json.loads((tmp_path / "out" / "moefy" / "conversion.json").read_text())["budget"]
    assert told["active"] == 0.5 and len(told["kl_saved_if_dense"]) == LAYERS


def test_the_recipe_that_is_kept_names_the_layers_and_gives_the_same_bytes(loud, text, tmp_path):
    convert(job_of(loud, text), tmp_path / "auto")
    again = prepare(build(None, read(tmp_path / "auto" / "moefy" / "recipe.toml"), []))
    assert again.recipe.layers != "auto"
    convert(again, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors") for name in ("auto", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_with_chosen_layers_is_known_again(loud, text, tmp_path):
    job = job_of(loud, text)
    convert(job, tmp_path / "out")
    assert pipeline._converted(tmp_path / "out", job.recipe)
    for other in ({"active": 0.6}, {"layers": ":"}):
        with pytest.raises(MoefyError, match="another recipe"):
            pipeline._converted(tmp_path / "out", dataclasses.replace(job.recipe, **other))


def test_a_class_that_can_leave_no_layer_dense_converts_all(loud, text):
    job = job_of(loud, text, target="mixtral")
    assert not job.weighs and job.layers == list(range(LAYERS))
    assert any("all layers are converted: no class" in note for note in job.notes)


def test_a_class_with_dense_layers_in_front_gets_them_there(loud, text):
    first = worth(9.0, 0.2, 0.1, 0.1, 0.1, 0.1)
    middle = worth(0.1, 0.1, 0.1, 9.0, 0.1, 0.1)
    job = job_of(loud, text, target="glm4_moe")
    assert job.weighs
    assert sensitivity.settle(job, first).recipe.layers == "1:6"
    assert sensitivity.settle(job, middle).recipe.layers == "0:6"
    free = job_of(loud, text, target="qwen2_moe")
    assert sensitivity.settle(free, middle).recipe.layers == "0:3,4:6"


def test_dense_layers_that_cost_time_are_left_out_where_engines_are_named(loud, text, monkeypatch):
    saved = worth(9.0, 0.1, 0.1, 0.1, 0.1, 0.1)
    named = {"target": "glm4_moe", "engines": "llama.cpp"}
    monkeypatch.setattr(sensitivity, "SLACK", 1.2)  # (1 + 5 x .5) / 6 is 1.17 times .5
    for time, layers in ((0.5, "1:6"), (0.2, "0:6")):
        monkeypatch.setattr(sensitivity, "relative_time", lambda *_, time=time: time)
        assert sensitivity.settle(job_of(loud, text, **named), saved).recipe.layers == layers
    assert sensitivity.settle(job_of(loud, text, target="glm4_moe"), saved).recipe.layers == "1:6"


def test_a_model_without_a_next_token_loss_converts_all(own_pico, text):
    job = job_of(own_pico("bert", num_hidden_layers=LAYERS), text, target="moefy")
    assert job.layers == list(range(LAYERS))
    assert any("no next-token loss to weigh layers by" in note for note in job.notes)


def test_too_few_layers_or_too_few_active_neurons_convert_all(loud, text):
    assert not job_of(loud, text, active=0.25).weighs
    assert not job_of(loud, text, active=1.0).weighs
    assert job_of(loud, text, active=0.5).weighs


def test_auto_is_the_default_and_a_colon_converts_all(loud, text):
    default = prepare(build(None, {"model": str(loud), "calibration": str(text)}, []))
    assert (
        default.weighs
        and default.recipe.layers == "auto"
        and any("measured first" in n for n in default.notes)
    )
    assert not job_of(loud, text, layers=":").weighs


def test_layers_of_equal_sensitivity_are_not_worth_a_dense_one(loud, text):
    job = job_of(loud, text, experts=4)
    assert sensitivity.settle(job, worth(*[1.0] * LAYERS)).layers == list(range(LAYERS))
    assert sensitivity.settle(job, worth(9.0, *[1.0] * 5)).layers == [1, 2, 3, 4, 5]


def test_a_dense_layer_is_not_worth_it_where_the_others_get_a_poorer_choice(
    loud, text, monkeypatch
):
    job = job_of(loud, text, experts=4)
    saved = worth(2.0, *[1.0] * 5)
    assert sensitivity.settle(job, saved).layers == [1, 2, 3, 4, 5]

    def poorer(shape):
        return (1 - shape.active_fraction) * (1.2 if shape != job.shape else 1)

    monkeypatch.setattr(sensitivity, "expected_loss", poorer)
    assert sensitivity.settle(job, saved).layers == list(range(LAYERS))


def test_sets_of_dense_layers_come_by_their_number_and_the_most_sensitive_first():
    loss_L = [5.0, 1.0, 0.5, 0.5, 6.0, 0.5, 0.5, 0.5, 0.5, 4.0]
    by_number = sensitivity.dense_sets(loss_L, 0.5)
    assert [sets[0] for sets in by_number] == [set(), {4}, {0, 4}, {0, 4, 9}]
    # The ends, for classes that have dense layers there alone.
    assert by_number[2][1:] == [{0, 9}, {0, 1}, {8, 9}]
    # No other layer runs less than half of what it was asked to.
    assert len(by_number) == 4


@pytest.mark.parametrize(
    ("layers", "written"), [([0, 1, 2], "0:3"), ([1, 3, 4], "1:2,3:5"), ([5], "5:6")]
)
def test_layers_are_written_as_the_option_takes_them(layers, written):
    from moefy.config.layer_names import chosen_layers

    assert sensitivity.ranges(layers) == written
    assert chosen_layers(written, 6) == layers


def test_an_unknown_word_is_still_refused(loud, text):
    with pytest.raises(MoefyError, match="auto"):
        job_of(loud, text, layers="most")


def test_auto_keeps_to_the_experts_that_were_asked_for(loud, text):
    saved = worth(1.0, 0.1, 0.1, 0.1, 0.1, 0.1)
    asked = sensitivity.settle(job_of(loud, text, experts=4), saved)
    assert asked.shape.num_experts == 4 and asked.layers == [1, 2, 3, 4, 5]
    overlapping = sensitivity.settle(job_of(loud, text, overlap=2.0), saved)
    assert overlapping.shape.overlaps and overlapping.shape.num_experts <= 8


def test_a_router_for_evaluation_is_admitted_behind_auto_too(loud, text):
    job = job_of(loud, text)
    recipe = build(None, {**dataclasses.asdict(job.recipe), "router": "oracle"}, [])
    saved = worth(*(9.0 if layer == LOUD else 1.0 for layer in range(LAYERS)))
    settled = sensitivity.settle(prepare(recipe, control=True), saved)
    assert LOUD not in settled.layers and settled.recipe.router == "oracle"
    with pytest.raises(MoefyError, match="or an evaluation"):
        prepare(recipe)
