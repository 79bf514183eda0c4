"""Dropped layers are those that the stock model misses least, and the rest is a whole model."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILY
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.checkpoint.cut import num_parameters, open_cut, without
from moefy.checkpoint.tensors import Checkpoint
from moefy.checkpoint.validate import check_tensors, open_checkpoint
from moefy.convert.depth import Drop, drops
from moefy.errors import MoefyError
from moefy.models import families

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


@pytest.mark.parametrize("idle", [[3], [1, 4]])
def test_layers_that_add_nothing_go_first_and_cost_nothing(idle, own_pico):
    folder = own_pico("llama", **deep("llama"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer, part in itertools.product(idle, WRITES):
        (name,) = (n for n in tensors if f"layers.{layer}." in n and part in n)
        tensors[name].zero_()
    save_file(tensors, file, {"format": "pt"})
    order = chosen(folder, len(idle) + 1)
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


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "lfm2", "qwen3_5_text"])
def test_the_rest_is_the_model_that_is_saved_without_them(family, pico, tmp_path):
    """A smaller checkpoint is written by hand: tensors renamed, lists in config.json cut."""
    folder, dropped = pico(family, **deep(family)), [1, 4]
    kept = [layer for layer in range(LAYERS) if layer not in dropped]
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if match := re.search(r"(?<=layers\.)\d+", name):
            if int(match[0]) in dropped:
                continue
            name = f"{name[: match.start()]}{kept.index(int(match[0]))}{name[match.end() :]}"
        tensors[name] = tensor
    config |= {"num_hidden_layers": 4}
    config |= {key: [config[key][layer] for layer in kept] for key in LISTS if key in config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
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
