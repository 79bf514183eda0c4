"""Dropped layers are those that the stock model misses least, and the rest is a whole model."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from pico import FAMILY
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.checkpoint.cut import num_parameters, open_cut, without
from moefy.checkpoint.tensors import Checkpoint
from moefy.checkpoint.validate import check_tensors, open_checkpoint
from moefy.config.finetune import build as finetune_settings
from moefy.config.recipe import build, read
from moefy.convert import depth
from moefy.convert.depth import Drop, drops
from moefy.convert.estimate import estimate
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.errors import MoefyError
from moefy.evaluate.sizes import sizes as evaluate_sizes
from moefy.finetune.inputs import open_run, states_to_match
from moefy.finetune.run import finetune
from moefy.finetune.teacher import states
from moefy.models import families
from moefy.report.format import active_share
from moefy.runs.reproduce import reproduce
from moefy.runs.verify import verify
from moefy.types import Shape

LAYERS = 6
LISTS = ("layer_types", "no_rope_layers")
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
WRITES = ("o_proj", "down_proj")


def deep(family: str, **more: Any) -> dict[str, Any]:
    """What makes a tiny model six layers deep, its lists of layers repeated."""
    lists = {key: FAMILY[family][key] * 3 for key in LISTS if key in FAMILY[family]}
    return {"num_hidden_layers": LAYERS, **lists, **more}


def opened(folder: Path) -> tuple[Checkpoint, families.Family]:
    checkpoint = open_checkpoint(folder)
    family = families.load(str(checkpoint.config["model_type"]), checkpoint.config)
    return check_tensors(checkpoint, family)[0], family


def ids(rows: int, length: int = 24) -> torch.Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def chosen(folder: Path, number: int) -> list[Drop]:
    order = drops(*opened(folder), ids(4), torch.device("cpu"))
    return list(itertools.islice(order, number))


def stock_without(folder: Path, dropped: list[int], home: str) -> Any:
    """The model, its list of layers and its configuration cut by hand."""
    config = AutoConfig.from_pretrained(folder)
    kept = [layer for layer in range(LAYERS) if layer not in dropped]
    for key in LISTS:
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[layer] for layer in kept])
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = whole.get_submodule(home)
    whole.set_submodule(home, nn.ModuleList(layers[layer] for layer in kept))
    whole.config.num_hidden_layers = len(kept)
    for key in LISTS:
        if getattr(config, key, None):
            setattr(whole.config, key, getattr(config, key))
    return whole


@torch.inference_mode()
def loss(folder: Path, dropped: list[int], home: str) -> float:
    """KL divergence to the whole model, as transformers computes both."""
    whole, fewer = (
        stock_without(folder, layers, home)(ids(4), use_cache=False).logits.log_softmax(-1)
        for layers in ([], dropped)
    )
    return float((whole.exp() * (whole - fewer)).sum(-1).mean())


def test_a_stopped_search_goes_on_where_it_was(pico):
    """What it has measured is not measured again, and the order is that of an unbroken search."""
    folder, losses, measured = pico("llama", **deep("llama")), {}, []

    def known(gone, measure):
        if gone not in losses:
            measured.append(gone)
            losses[gone] = measure()
        return losses[gone]

    def searched(number):
        order = drops(*opened(folder), ids(4), torch.device("cpu"), known=known)
        return list(itertools.islice(order, number))

    searched(2)
    third = searched(3)
    assert third == chosen(folder, 3) and [len(gone) for gone in measured] == [0, 1, 2]
    losses[()] = losses[()][::-1]  # the negative control: what it knows decides
    assert searched(1)[0].layer != third[0].layer


HOMES = {"llama": "model.layers", "gemma3_text": "model.layers", "opt": "model.decoder.layers"}


@pytest.mark.parametrize(
    ("family", "more"), [("llama", {}), ("gemma3_text", {}), ("opt", OPT_350M)]
)
def test_the_layer_that_goes_is_the_one_that_the_stock_model_misses_least(family, more, pico):
    folder, home = pico(family, **deep(family, **more)), HOMES[family]
    first, second = chosen(folder, 2)
    alone = {layer: loss(folder, [layer], home) for layer in range(LAYERS)}
    order = sorted(alone, key=lambda layer: alone[layer])
    assert first.layer == order[0]
    assert first.kl == pytest.approx(alone[order[0]], rel=1e-3, abs=1e-6)
    # The half that cost least is tried again.
    both = {layer: loss(folder, [first.layer, layer], home) for layer in order[1:3]}
    assert second.layer == min(both, key=lambda layer: both[layer])
    assert second.kl == pytest.approx(both[second.layer], rel=1e-3, abs=1e-6)


def make_idle(folder: Path, layers: list[int]) -> Path:
    """Have some layers add nothing to the stream."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer, part in itertools.product(layers, WRITES):
        (name,) = (n for n in tensors if f"layers.{layer}." in n and part in n)
        tensors[name].mul_(1e-12)  # zeros would be refused as damage
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("idle", [[3], [1, 4]])
def test_layers_that_add_nothing_go_first_and_cost_nothing(idle, own_pico):
    order = chosen(make_idle(own_pico("llama", **deep("llama")), idle), len(idle) + 1)
    assert {drop.layer for drop in order[:-1]} == set(idle)
    assert all(drop.kl == 0 for drop in order[:-1])
    assert order[-1].kl > 1e-3  # a layer that adds something does cost


def test_the_parameters_that_are_left_are_those_of_the_stock_model(pico):
    folder = pico("llama", **deep("llama"))
    (drop,) = chosen(folder, 1)
    checkpoint, family = opened(folder)
    cut = open_cut(without(checkpoint, family, [drop.layer]), dtype=torch.float32)
    assert drop.parameters == sum(p.numel() for p in cut.parameters())
    assert drop.parameters < num_parameters(checkpoint)


def cut_by_hand(folder: Path, dropped: list[int], place: Path) -> Path:
    """A smaller checkpoint: tensors renamed, and lists in config.json cut."""
    kept = [layer for layer in range(LAYERS) if layer not in dropped]
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if match := re.search(r"(?<=layers\.)\d+|(?<=\.h\.)\d+", name):
            if int(match[0]) in dropped:
                continue
            name = f"{name[: match.start()]}{kept.index(int(match[0]))}{name[match.end() :]}"
        tensors[name] = tensor
    config |= {key: len(kept) for key in ("num_hidden_layers", "num_layers") if key in config}
    config |= {key: [config[key][layer] for layer in kept] for key in LISTS if key in config}
    shutil.copytree(folder, place)
    (place / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "lfm2", "qwen3_5_text"])
def test_the_rest_is_the_model_that_is_saved_without_them(family, pico, tmp_path):
    folder, dropped = pico(family, **deep(family)), [1, 4]
    hand = cut_by_hand(folder, dropped, tmp_path / "hand")
    wanted = AutoModelForCausalLM.from_pretrained(hand, dtype=torch.float32).eval()
    cut = open_cut(without(*opened(folder), dropped), dtype=torch.float32)
    other = open_cut(without(*opened(folder), [1, 3]), dtype=torch.float32)
    with torch.inference_mode():
        logits = wanted(ids(2)).logits
        assert torch.equal(cut(ids(2)).logits, logits)
        assert not torch.allclose(other(ids(2)).logits, logits, atol=1e-2)
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert cut.generate(ids(1), **options).tolist() == (
            wanted.generate(ids(1), **options).tolist()
        )
    cut.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(again(ids(2)).logits, logits)


@pytest.mark.parametrize("dropped", [[6], [-1], [0, 9], list(range(LAYERS))])
def test_layers_that_are_not_there_and_all_layers_are_refused(dropped, pico):
    checkpoint, family = opened(pico("llama", **deep("llama")))
    with pytest.raises(MoefyError, match="cannot be dropped of 6") as caught:
        without(checkpoint, family, dropped)
    assert caught.value.code == 2


def test_without_dropped_layers_it_is_the_checkpoint_itself(pico):
    checkpoint, family = opened(pico("llama"))
    assert without(checkpoint, family, []) is checkpoint


# --- conversions without some layers -------------------------------------------------------------


def made(folder: Path, text: Path, out: Path, **more: Any) -> dict[str, Any]:
    job = prepare(build(None, {**recipe(folder, text), **more}, []))
    return convert(job, out)


def recipe(folder: Path, text: Path) -> dict[str, Any]:
    """With one of six layers dropped, 32 + 3 of 8 experts of 8 neurons are active in the others."""
    few = {"tokens": 1024, "sequence_length": 64, "calibration": str(text)}
    return {"model": str(folder), **few, "experts": 8, "layers": ":", "active": 5 / 6 * 56 / 96}


PAIRS = [pair for pair in stock.HELD if pair not in stock.UNLIKE]
FIRST = list({target: pair for pair in reversed(PAIRS) for target in [pair[1]]}.values())


@pytest.mark.parametrize(
    ("family", "target"), [*FIRST, ("gemma3_text", stock.OWN), ("opt", stock.OWN)]
)
def test_all_experts_are_the_model_that_is_cut(family, target, pico, converted, tmp_path):
    folder, dropped = pico(family, **deep(family)), [1, 4]
    shape = stock.recipe(target)
    shape["active"] *= 4 / 6  # of all the layers
    moe = converted(folder, **shape, drop_layers="1,4")
    stock.assert_identity(cut_by_hand(folder, dropped, tmp_path / "hand"), moe, torch.float64)
    wrong = stock.dense_logits(cut_by_hand(folder, [1, 3], tmp_path / "wrong"))
    found = stock.logits(stock.open_all_active(moe))
    assert stock.distance(found, wrong) > stock.FAULT
    summary = json.loads((moe / "moefy" / "conversion.json").read_text())
    assert summary["dropped_layers"] == dropped and summary["dropped"] == []
    assert verify(moe)["passed"]


@pytest.mark.parametrize(("idle", "drift"), [(True, 0.5), (False, 0.5), (False, 0.0)])
def test_later_layers_aim_at_what_the_whole_model_computes(idle, drift, own_pico, text, tmp_path):
    """Without drift, or a loss to make good, it is the conversion of the smaller checkpoint."""
    folder = own_pico("llama", **deep("llama"))
    folder = make_idle(folder, [3]) if idle else folder
    hand = cut_by_hand(folder, [3], tmp_path / "hand")
    summary = made(folder, text, tmp_path / "out", drop_layers="3:4", drift=drift)
    small = made(hand, text, tmp_path / "small", drift=drift, active=56 / 96)
    assert summary["shape"] == small["shape"]
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "small"))
    assert (one == other) == (idle or not drift)


@pytest.mark.parametrize(("active", "whole"), [(0.83333, True), (0.8, False)])
def test_layers_alone_are_dropped_where_all_others_are_active(
    active, whole, own_pico, text, tmp_path
):
    folder = own_pico("llama", **deep("llama"))
    alone = {"drop_layers": "3:4", "partition": "static", "refit": False, "active": active}
    summary = made(folder, text, tmp_path / "out", experts=None, **alone)
    assert (summary["shape"]["active_fraction"] == 1.0) == whole
    own = stock.dense_logits(tmp_path / "out")
    hand = stock.dense_logits(cut_by_hand(folder, [3], tmp_path / "hand"))
    assert (stock.distance(own, hand) < stock.EXACT) == whole


def test_layers_are_chosen_and_named_in_the_recipe_that_is_kept(own_pico, text, tmp_path):
    folder = make_idle(own_pico("llama", **deep("llama")), [3])
    summary = made(folder, text, tmp_path / "out", drop_layers="1")
    assert summary["dropped_layers"] == [3]
    (drop,) = summary["dropped"]
    assert drop["layer"] == 3 and drop["kl"] == 0
    assert len(summary["layers"]) == 5 and summary["layers_left_dense"] == []
    # The fraction is of all layers.
    assert summary["shape"]["active_fraction"] == pytest.approx(56 / 96)
    assert active_share(summary) == pytest.approx(5 / 6 * 56 / 96)
    page = (tmp_path / "out" / "moefy" / "conversion.md").read_text()
    assert "without layers 3" in page and "each left: 3 (0.000)" in page
    again = tmp_path / "out" / "moefy" / "recipe.toml"
    assert 'drop_layers = "3:4"' in again.read_text()
    assert reproduce(again, tmp_path / "again")["reproduced"]["same"]


def test_what_is_measured_is_not_measured_again_after_a_stop(own_pico, text, tmp_path, monkeypatch):
    folder = make_idle(own_pico("llama", **deep("llama")), [3])
    made(folder, text, tmp_path / "whole", drop_layers="1")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 2:
            raise KeyboardInterrupt

    job = prepare(build(None, {**recipe(folder, text), "drop_layers": "1"}, []))
    with pytest.raises(KeyboardInterrupt):
        convert(job, tmp_path / "out", watch=stop)
    monkeypatch.setattr(depth, "drops", None)
    convert(job, tmp_path / "out")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert one == other


def test_dense_layers_beside_dropped_ones_share_one_budget(own_pico, text, tmp_path):
    folder = make_idle(own_pico("llama", **deep("llama")), [1])
    more = {"experts": None, "layers": "auto", "active": 0.6}
    summary = made(folder, text, tmp_path / "out", drop_layers="1", **more)
    assert summary["dropped_layers"] == [1]
    assert summary["budget"]["active"] == pytest.approx(0.72)
    assert active_share(summary) == pytest.approx(0.6, abs=0.01)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 5
    assert config.mlp_only_layers == summary["layers_left_dense"]
    # The recipe names layers by their numbers in the dense model.
    again = prepare(build(None, read(tmp_path / "out" / "moefy" / "recipe.toml"), []))
    assert [*again.dense.left_dense] == summary["layers_left_dense"]
    assert again.shape == Shape(**{k: v for k, v in summary["shape"].items() if "frac" not in k})


def test_a_plan_counts_what_is_then_written(own_pico, text, tmp_path):
    folder = own_pico("llama", **deep("llama"))
    more = {"drop_layers": "2", "active": 4 / 6 * 56 / 96}
    plan = estimate(prepare(build(None, {**recipe(folder, text), **more}, [])))
    summary = made(folder, text, tmp_path / "out", **more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plan["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert plan["layers_dropped"] == 2 and plan["layers_converted"] == 4
    assert any("measured first" in note for note in plan["notes"])
    assert not any("measured first" in note for note in summary["notes"])
    sizes = evaluate_sizes(model, torch.float32)
    assert plan["parameters_active"] == sizes["parameters_active"]
    assert plan["flops_per_token"] == pytest.approx(sizes["flops_per_token"], rel=0.05)
    ffn = 3 * 32 * summary["shape"]["num_neurons"] * summary["shape"]["active_fraction"]
    assert plan["parameters_floor"] == pytest.approx(sizes["parameters_active"] - 4 * ffn)


@pytest.mark.parametrize(
    ("family", "recipe", "says"),
    [
        ("llama", {"drop_layers": "6"}, "leaves 0 of 6 layers, too few for --active 0.5"),
        ("llama", {"drop_layers": "2", "active": 0.75}, "leaves 4 of 6 layers, too few"),
        (
            "llama",
            {"drop_layers": "7:"},
            "--drop-layers is '7:'; expected a number, or some of the layers 0 to 5",
        ),
        ("llama", {"drop_layers": "most"}, "--drop-layers is 'most'"),
        ("llama", {"drop_layers": "3", "layers": "9"}, "--layers 9"),
        ("llama", {"drop_layers": "3:5", "layers": "4"}, "names only layers that are dropped"),
        ("llama", {"drop_layers": "1", "partition": "llama-moe-v2"}, "gradients of the whole"),
        ("t5", {"drop_layers": "1:2", "target": "moefy"}, "the decoder"),
        ("bert", {"drop_layers": "1", "target": "moefy"}, "no next-token loss to choose by"),
    ],
)
def test_what_cannot_go_is_refused_in_one_line(family, recipe, says, pico, text):
    given = {"model": str(pico(family, num_hidden_layers=LAYERS)), "calibration": str(text)}
    with pytest.raises(MoefyError) as caught:
        prepare(build(None, {**given, **recipe}, []))
    assert caught.value.code == 2
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_loses_the_layers_that_are_named(pico, converted, tmp_path):
    folder = pico("bert", num_hidden_layers=3)
    moe = converted(folder, target="moefy", drop_layers="1:2", active=0.4)
    assert AutoConfig.from_pretrained(moe).dense["num_hidden_layers"] == 2
    assert verify(moe)["passed"]


def test_kinds_of_layers_that_alternate_no_more_are_said(pico, text):
    given = {"model": str(pico("cohere2", **deep("cohere2"))), "calibration": str(text)}
    for drop, said in (("1:2", True), ("0", False)):
        job = prepare(build(None, {**given, "drop_layers": drop}, []))
        assert any("no longer alternate" in note for note in job.notes) == said


def test_the_teacher_has_more_layers_than_the_student(own_pico, converted, text, tmp_path):
    """States are matched to those of the same layer, and the last to the last."""
    folder = own_pico("llama", **deep("llama"))
    run = open_run(converted(folder, drop_layers="1,5", experts=8, active=4 / 6 * 56 / 96))
    assert states_to_match(run, folder) == [0, 2, 3, 5]
    assert states_to_match(run, run.folder) == [0, 1, 2, 3]
    with pytest.raises(MoefyError, match="6 layers of 32; expected one of the run's sizes"):
        states_to_match(open_run(converted(own_pico_of(folder, tmp_path))), folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen = states(model, [0, 2, 3, 5])(ids(2))
    with torch.inference_mode():
        wanted = model.model(ids(2)).last_hidden_state
    assert torch.allclose(seen[-1], wanted.flatten(0, 1)) and len(seen) == 4
    settings = {"tokens": 512, "sequence_length": 64, "batch_size": 2, "validation_tokens": 128}
    settings |= {"data": str(text), "hidden": 1.0, "learning_rate": 1e-3}
    summary = finetune(run.folder, tmp_path / "tuned", finetune_settings(None, settings, []))
    assert summary["validation"]["after"]["loss"] > 0
    assert verify(tmp_path / "tuned")["passed"]


def own_pico_of(folder: Path, place: Path) -> Path:
    """A model with a layer less, of which no run knows that it was dropped."""
    return cut_by_hand(folder, [0], place / "less")
