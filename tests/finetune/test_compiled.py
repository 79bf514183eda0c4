"""Compiled layers learn what plain ones do, hooks on routers and experts included."""

import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.finetune.checks import check_machine
from moefy.finetune.run import finetune

SMALL = {"tokens": 512, "sequence_length": 64, "validation_tokens": 512, "batch_size": 2}


def test_compiled_layers_learn_what_plain_ones_do(pico, converted, text, tmp_path, monkeypatch):
    """Traced, with autograd compiled, but no code written, which takes minutes."""
    run, compile = converted(pico("llama")), torch.nn.Module.compile
    traced = functools.partialmethod(compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch.compiler.reset()
    counters.clear()
    summaries = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        asked = build(None, {**SMALL, "data": [str(text)], "compile": compiled}, [])
        summaries[name] = finetune(run, tmp_path / name, asked)
        assert bool(counters["stats"]["unique_graphs"]) == compiled
    assert not counters["graph_break"]
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in summaries)
    before = load_file(run / "model.safetensors")
    moved = max(float((old[name] - before[name]).abs().max()) for name in old)
    assert max(float((old[name] - new[name]).abs().max()) for name in old) < 1e-3 * moved
    assert moved > 0 and any(".gate." in name for name in old)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    for other in (
        {"fsdp": 2},
        {"anneal": 0.3},
        {"gradient_checkpointing": True},
        {"refit_after": True},
    ):
        with pytest.raises(MoefyError, match="--compile with") as caught:
            build(None, {"compile": True, **other}, [])
        assert caught.value.code == 4
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MoefyError, match="--compile needs a C\\+\\+ compiler") as caught:
        check_machine(build(None, {"compile": True, "device": "cpu"}, []))
    assert caught.value.code == 5
