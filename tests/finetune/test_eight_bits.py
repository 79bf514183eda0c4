"""An optimizer whose moments have 8 bits: what it learns, what it takes, how it goes on."""

import dataclasses
import importlib.util

import pytest
import torch
from stopping import stopped_at

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.finetune import memory
from moefy.finetune.checks import check_machine
from moefy.finetune.inputs import load_student
from moefy.finetune.memory import Inputs
from moefy.finetune.optim import adamw, groups, learning_rates, state_tensors
from moefy.finetune.prepare import open_inputs
from moefy.finetune.probe import Cost, Probe
from moefy.finetune.run import finetune

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}
EIGHT = {"optimizer": "adamw-8bit", "learning_rate": 3e-3, "rest_learning_rate": 3e-3}
installed = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.fixture(autouse=True)
def not_compiled():
    """Compiling every shape takes minutes, and changes roundings alone."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"), dtype="bfloat16")


def settings(text, **more):
    return build(None, {**SMALL, "data": [str(text)], "compute_dtype": "bfloat16", **more}, [])


@installed
def test_it_learns_as_with_whole_moments_and_goes_on_when_it_was_stopped(run, text, tmp_path):
    asked = settings(text, **EIGHT, save_every=3)
    whole = finetune(run, tmp_path / "whole", asked)
    plain = finetune(run, tmp_path / "plain", dataclasses.replace(asked, optimizer="adamw"))
    before, after, other = (
        one["validation"][when]["loss"]
        for one, when in ((whole, "before"), (whole, "after"), (plain, "after"))
    )
    assert after < before and abs(after - other) < 0.1 * (before - other)
    with stopped_at(5):
        finetune(run, tmp_path / "out", asked)
    with pytest.raises(MoefyError, match="optimizer was adamw-8bit, is adamw") as caught:
        finetune(run, tmp_path / "out", dataclasses.replace(asked, optimizer="adamw"))
    assert caught.value.code == 7
    finetune(run, tmp_path / "out", asked)
    files = [tmp_path / out / "model.safetensors" for out in ("whole", "out", "plain")]
    one, two, three = (file.read_bytes() for file in files)
    assert one == two != three


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_holds_is_what_the_plan_counts(run, text, dtype):
    start = open_inputs(run, settings(text, optimizer="adamw-8bit", compute_dtype=dtype))
    model = load_student(start.run, start.settings, start.dtypes.student.dtype)
    rates = dict.fromkeys(("router", "experts", "rest"), 1e-3)
    parameters = groups(model, "all", learning_rates(model, "all", rates))
    optimizer = adamw(parameters, "adamw-8bit", lr=1e-3)
    fresh = {name: t.shape for name, t in state_tensors(optimizer, model).items()}
    large = [p for p in model.parameters() if p.requires_grad and p.numel() >= 4096]
    for weight in [p for p in model.parameters() if p.requires_grad]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = state_tensors(optimizer, model)
    assert {name: t.shape for name, t in tensors.items()} == fresh  # what a resume fills
    names = {n for n, p in model.named_parameters() if any(p is one for one in large)}
    held = sum(
        t.numel() * t.element_size()
        for name, t in tensors.items()
        if name.endswith(tuple(f".{one}" for one in names)) and ".scale." not in name and t.ndim
    )
    cost = Probe(Cost(num_trained=1), 0, Cost())
    inputs = Inputs(start.run, None, start.settings, start.dtypes, cost)
    assert len(large) >= 2 and held == memory.state_bytes(inputs) * sum(p.numel() for p in large)


def test_without_the_package_it_is_refused(text, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name)
    )
    with pytest.raises(MoefyError, match=r"pip install 'moefy\[8bit\]'") as caught:
        check_machine(settings(text, optimizer="adamw-8bit"))
    assert caught.value.code == 5
    with pytest.raises(MoefyError, match="fsdp with --optimizer adamw-8bit") as caught:
        settings(text, optimizer="adamw-8bit", fsdp=2)
    assert caught.value.code == 4
