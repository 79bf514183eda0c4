"""Every way to compute experts that can compute a model is tried, and the others are named."""

import json

import pytest
import torch
from conftest import PICO
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.errors import MoefyError
from moefy.evaluate import sizes, speed
from moefy.evaluate.speed import IMPLEMENTATIONS, Grid, implementations, measure

SMALL = Grid(((1, 16), (2, 16)), rounds=1, new_tokens=2)
IDS_T = torch.arange(200) % 128


def mixture(width: int):
    """A model whose experts are `width` neurons wide."""
    sizes = {"moe_intermediate_size": width, "shared_expert_intermediate_size": 16}
    config = AutoConfig.for_model(
        "qwen2_moe", num_experts=4, num_experts_per_tok=2, **sizes, **PICO
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("width", [16, 11])
def test_a_width_that_one_way_rejects_is_measured_by_the_others(width):
    """In float32 the rows of 11 neurons are no multiple of the 16 bytes that grouped_mm takes."""
    result = measure({"dense": mixture(16), "moe": mixture(width)}, IDS_T, SMALL)
    ways = {row["way"] for row in result["rows"] if row["label"] == "moe"}
    assert len(result["rows"]) == 2 * 2 * 2 and ways <= {*IMPLEMENTATIONS}
    if width == 16:
        assert result["left_out"] == {}
    else:
        assert [*result["left_out"]["moe"]] == ["grouped_mm"] and "grouped_mm" not in ways
        assert "multiple of 16 bytes" in result["left_out"]["moe"]["grouped_mm"]


def test_a_model_that_no_way_computes_is_no_slow_model(monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(speed, "one_round", broken)
    with pytest.raises(MoefyError, match="eager: RuntimeError: a fault of two lines") as caught:
        implementations(mixture(16), IDS_T, SMALL, lambda: 0.0)
    assert caught.value.code == 6


def test_a_way_that_fails_at_more_sequences_is_left_out_there(monkeypatch):
    def round_(model, ids_T, batch, context, grid, turn, ways, clock):
        if batch == 2 and ways["decode", 2] == "eager":
            raise RuntimeError("too many")
        return 1.0, {"eager": 1.0, "grouped_mm": 1.5, "batched_mm": 9.0}[ways["decode", batch]]

    monkeypatch.setattr(speed, "one_round", round_)
    best, left_out = implementations(mixture(16), IDS_T, SMALL, lambda: 0.0)
    assert best["decode", 1] == "eager" and best["decode", 2] == "grouped_mm"
    assert left_out == {"eager": "RuntimeError: too many"}


def test_peak_memory_is_measured_at_such_a_width_too(tmp_path, capsys):
    mixture(11).save_pretrained(tmp_path)
    sizes._main(str(tmp_path))
    assert json.loads(capsys.readouterr().out)["peak"] >= 0
