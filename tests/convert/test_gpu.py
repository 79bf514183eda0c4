"""What a GPU computes is what the CPU does.

On a machine with one: MOEFY_TEST_GPU=1 pytest tests/convert/test_gpu.py.
"""

import json
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from moefy.config.finetune import build
from moefy.config.report import Settings
from moefy.evaluate.run import evaluate
from moefy.finetune.run import finetune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or it is hidden")

RECIPES = [{}, {"layers": "auto"}, {"overlap": 2.0}, {"partition": "static"}, {"refit": False}]
SMALL = {"tokens": 8192, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_conversion_is_as_good(recipe, pico, converted):
    """Not the same bytes: k-means and assignment magnify rounding."""
    dense = pico("llama", num_hidden_layers=4)
    found = {}
    for device in ("cpu", "cuda"):
        run = converted(dense, device=device, **recipe)
        told = json.loads((run / "moefy" / "conversion.json").read_text())
        assert (told["machine"]["device"] == "cpu") == (device == "cpu")
        found[device] = fmean(layer["error_before_refit"] for layer in told["layers"])
        AutoModelForCausalLM.from_pretrained(run)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.1)


@pytest.mark.parametrize("cache", [False, True])
def test_a_fine_tune_learns(cache, pico, converted, text, tmp_path):
    settings = {"data": str(text), **SMALL, "learning_rate": 3e-3, "rest_learning_rate": 3e-3}
    if cache:
        settings["teacher_cache"] = str(tmp_path / "cache")
    told = finetune(converted(pico("llama")), tmp_path / "out", build(None, settings, []))
    assert told["validation"]["after"]["kl"] < told["validation"]["before"]["kl"]


def test_a_report_makes_its_controls(pico, converted, text):
    settings = Settings(text=(text,), tokens=512, sequence_length=64, controls=True, speed=False)
    found = evaluate(converted(pico("llama")), settings)
    assert {"static", "random router", "oracle router"} <= set(found["models"])
    assert not found["not_run"]
