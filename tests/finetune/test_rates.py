"""Learning rates that are not given follow from the size of the weights."""

import dataclasses
from functools import partial

import pytest
import torch
from stopping import stopped_at
from transformers import AutoModelForCausalLM

from moefy.config.finetune import build
from moefy.finetune.lora import adapted
from moefy.finetune.optim import RATES, USUAL_RMS, groups, learning_rates
from moefy.finetune.router_hooks import Routing
from moefy.finetune.run import finetune
from moefy.finetune.train import slower
from moefy.models.targets.target import ROUTER_SCALE


class Small(torch.nn.Module):
    """Weights of the usual size, smaller ones in two layers, and one that begins at zero."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.ModuleDict({"mlp": torch.nn.Linear(64, 64)})
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": torch.nn.Linear(64, 64)}) for _ in "ab"
        )
        self.zero = torch.nn.Linear(64, 64, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.layer["mlp"].weight.normal_(std=USUAL_RMS, generator=generator)
            for layer in self.layers:
                layer["attn"].weight.normal_(std=USUAL_RMS / 10, generator=generator)
            self.zero.weight.zero_()


UNSET = {"router": None, "experts": None, "rest": None}


def test_without_a_rate_a_matrix_learns_by_the_size_of_its_kind():
    """Negative controls: vectors, and parts whose rate is given, which no factor touches."""
    rates = learning_rates(Small(), "all", UNSET, factor=0.5)
    assert rates.keys() == {
        *("layer.mlp.weight", "layer.mlp.bias", "layers.attn.weight", "layers.attn.bias"),
        "zero.weight",
    }
    near = partial(pytest.approx, rel=0.05)
    assert rates["layer.mlp.weight"] == near(RATES["experts"] / 2)
    assert rates["layers.attn.weight"] == near(RATES["rest"] / 2 / 10)
    assert rates["layer.mlp.bias"] == RATES["experts"] / 2
    assert rates["layers.attn.bias"] == rates["zero.weight"] == RATES["rest"] / 2
    given = learning_rates(Small(), "all", {**UNSET, "rest": 1e-5}, factor=0.5)
    assert {given[kind] for kind in given if "mlp" not in kind} == {1e-5}
    assert given["layer.mlp.weight"] == rates["layer.mlp.weight"]


def test_every_weight_that_is_trained_is_in_one_group_of_its_rate():
    model = Small()
    rates = {kind: float(number) for number, kind in enumerate(learning_rates(model, "all", UNSET))}
    found = {id(w): group["lr"] for group in groups(model, "all", rates) for w in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for layer in model.layers:
        assert found[id(layer["attn"].weight)] == rates["layers.attn.weight"]
    assert len(groups(model, "rest", rates)) == 3
    assert not model.layer["mlp"].weight.requires_grad


def test_a_router_is_measured_as_it_is_before_it_is_scaled(pico, converted):
    model = AutoModelForCausalLM.from_pretrained(converted(pico("llama")))
    scale = Routing(model).scale
    assert scale < 1e-2
    ((kind, rate),) = learning_rates(model, "router", UNSET, scale).items()
    rows = [w for name, w in model.named_parameters() if name.endswith(kind.rpartition(".mlp")[2])]
    sizes = [float(row.detach().square().mean().sqrt()) / scale for row in rows]
    assert min(sizes) <= rate / scale / RATES["router"] * USUAL_RMS <= max(sizes)


def test_adapters_have_the_rate_itself(pico, converted):
    """Half of their matrices begin at zero: their size says nothing. Routers have theirs."""
    model = adapted(AutoModelForCausalLM.from_pretrained(converted(pico("llama"))), 4)
    rates = learning_rates(model, "lora", UNSET)
    assert {rate for kind, rate in rates.items() if "lora_" in kind} == {RATES["experts"]}
    (router,) = [rate for kind, rate in rates.items() if "lora_" not in kind]
    assert router != RATES["router"] * ROUTER_SCALE


def test_a_resume_and_a_restart_have_the_rates_of_the_first_start(pico, converted, text, tmp_path):
    """They are of the weights before the training, not of those that a checkpoint holds."""
    run = converted(pico("llama"))
    given = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "save_every": 1}
    asked = build(None, {**given, "data": [str(text)], "rate_factor": 100.0}, [])
    whole = finetune(run, tmp_path / "whole", asked)
    with stopped_at(6):
        finetune(run, tmp_path / "stopped", asked)
    resumed = finetune(run, tmp_path / "stopped", asked)
    assert resumed["rates"] == whole["rates"] and len(set(whole["rates"].values())) > 3
    names = [name for name in whole["outputs"] if name.endswith(".safetensors")]
    assert names and all(resumed["outputs"][name] == whole["outputs"][name] for name in names)
    lower = slower(dataclasses.replace(asked, learning_rate=1e-3), 2)
    assert (lower.learning_rate, lower.rate_factor) == (5e-4, 50.0)
    assert lower.rest_learning_rate is None
