"""Learning rates that are not given follow from the size of the weights."""

import torch
from transformers import AutoModelForCausalLM

from moefy.finetune.lora import adapted
from moefy.finetune.optim import RATES, USUAL_RMS, groups
from moefy.finetune.router_hooks import Routing


def test_without_a_rate_a_matrix_learns_by_its_size():
    """As fast as weights of the usual size, relative to its own: to a power of two. Negative
    controls: vectors, and parts whose rate is given."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.ModuleDict({"mlp": torch.nn.Linear(64, 64)})
            self.small = torch.nn.Linear(64, 64)
            self.zero = torch.nn.Linear(64, 64, bias=False)

    model = Model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, size in ((model.layer["mlp"], USUAL_RMS), (model.small, USUAL_RMS / 15)):
            layer.weight.normal_(std=size, generator=generator)
        model.zero.weight.zero_()

    def found(**rates):
        given = {"router": None, "experts": None, "rest": None, **rates}
        made = groups(model, "all", given, factor=0.5)
        return {id(weight): group["lr"] for group in made for weight in group["params"]}

    by_size = found()
    assert (
        by_size[id(model.layer["mlp"].weight)]
        == by_size[id(model.layer["mlp"].bias)]
        == RATES["experts"] / 2
    )
    assert by_size[id(model.small.weight)] == RATES["rest"] / 2 / 16
    assert by_size[id(model.small.bias)] == by_size[id(model.zero.weight)] == RATES["rest"] / 2
    given = found(rest=1e-5)
    assert given[id(model.small.weight)] == given[id(model.small.bias)] == 0.5e-5
    assert given[id(model.layer["mlp"].weight)] == RATES["experts"] / 2


def test_a_router_is_measured_as_it_is_before_it_is_scaled(pico, converted):
    model = AutoModelForCausalLM.from_pretrained(converted(pico("llama")))
    scale = Routing(model).scale
    assert scale < 1e-2
    for group in groups(model, "router", {"router": None}, scale):
        for weight in group["params"]:
            rms = float(weight.detach().square().mean().sqrt()) / scale / USUAL_RMS
            assert 0.7 < group["lr"] / (RATES["router"] * scale * rms) < 1.42


def test_adapters_have_the_rate_itself(pico, converted):
    """Half of their matrices begin at zero, so that their size says nothing."""
    model = adapted(AutoModelForCausalLM.from_pretrained(converted(pico("llama"))), 4)
    made = groups(model, "lora", dict.fromkeys(("router", "experts")))
    assert {group["lr"] for group in made if group["part"] == "experts"} == {RATES["experts"]}
