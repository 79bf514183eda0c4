"""What a GPU computes is what the CPU does.

On a machine with one: MOEFY_TEST_GPU=1 pytest tests/convert/test_gpu.py.
"""

import json
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from moefy.config.finetune import build
from moefy.config.recipe import build as build_recipe
from moefy.config.report import Settings
from moefy.convert import memory
from moefy.convert.assign import assign_balanced
from moefy.convert.assign_on_device import assign, assign_on_device
from moefy.convert.kmeans import kmeans
from moefy.convert.prepare import prepare
from moefy.convert.probe import speeds
from moefy.convert.run import convert
from moefy.evaluate.run import evaluate
from moefy.evaluate.timed_rounds import Grid
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


def test_where_the_states_lie_changes_no_byte(pico, text, tmp_path, monkeypatch):
    """On the GPU with all activations, on it without, in the host's memory, in files."""
    given = {"model": str(pico("llama")), "calibration": str(text), "tokens": 4352}
    job = prepare(build_recipe(None, {**given, "sequence_length": 64, "device": "cuda"}, []))
    digests = set()
    for number, place in enumerate(memory.PLACES["cuda"]):
        monkeypatch.setattr(memory, "PLACES", {"cuda": (place,)})
        convert(job, tmp_path / f"{number}")
        digests.add((tmp_path / f"{number}" / "model.safetensors").read_bytes())
    assert len(digests) == 1


def test_an_assignment_is_that_of_the_same_steps_on_the_cpu():
    dice = torch.Generator().manual_seed(0)
    for value_FE in (torch.randn(2048, 16, generator=dice).exp(), torch.ones(800, 8)):
        width = value_FE.shape[0] // value_FE.shape[1]
        column_F = assign(value_FE.cuda(), width)
        assert column_F.is_cuda and torch.equal(column_F.cpu(), assign_on_device(value_FE, width))
        exact_F = torch.as_tensor(assign_balanced(value_FE.numpy(), width))
        sums = [value_FE.double().gather(1, c[:, None]).sum() for c in (column_F.cpu(), exact_F)]
        assert sums[0] >= 0.999 * sums[1]


def test_clusters_are_as_tight_and_the_same_again():
    point_RQ = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    inertia = {}
    for device in ("cpu", "cuda"):
        where = point_RQ.to(device)
        centre_EQ, cluster_R = kmeans(where, 16, 0, restarts=3)
        inertia[device] = float((where - centre_EQ[cluster_R]).square().sum())
    assert inertia["cuda"] == pytest.approx(inertia["cpu"], rel=0.01)
    assert torch.equal(cluster_R, kmeans(where, 16, 0, restarts=3)[1])


def test_two_processes_make_the_bytes_of_one(pico, converted, text, tmp_path):
    """By NCCL where there are two GPUs; else they share one, and gloo sums."""
    model, given = pico("llama"), {"tokens": 5120, "sequence_length": 64, "device": "cuda"}
    one, two = converted(model, **given), tmp_path / "two"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "moefy", "convert", str(model), str(two), f"--calibration={text}", *options]
    subprocess.run([*launch, *command], check=True, timeout=300)
    names = "model.safetensors"
    assert (two / names).read_bytes() == (one / names).read_bytes()


@pytest.mark.parametrize("cache", [False, True])
def test_a_fine_tune_learns(cache, pico, converted, text, tmp_path):
    settings = {"data": str(text), **SMALL, "learning_rate": 3e-3, "rest_learning_rate": 3e-3}
    if cache:
        settings["teacher_cache"] = str(tmp_path / "cache")
    told = finetune(converted(pico("llama")), tmp_path / "out", build(None, settings, []))
    assert told["validation"]["after"]["kl"] < told["validation"]["before"]["kl"]


def test_the_plan_probes_it(pico, text):
    given = {"model": str(pico("llama")), "calibration": str(text), "device": "cuda"}
    job = prepare(build_recipe(None, given, []))
    assert job.recipe.tokens >= 262_144
    rates = speeds(job.device, job.shape)
    assert all(rate > 0 for rate in rates.values())
    assert rates["factor"] < rates["product"] > speeds(torch.device("cpu"), job.shape)["product"]


def test_a_report_scores_as_on_the_processor(pico, converted, text):
    settings = {"effort": "quick", "speed": False, "tokens": 512, "sequence_length": 64}
    run, nll = converted(pico("llama")), {}
    for device in ("cpu", "cuda"):
        found = evaluate(run, Settings(text=(text,), device=device, **settings))
        assert (found["compute"]["device"] == "cpu") == (device == "cpu") and not found["not_run"]
        nll[device] = found["texts"]["text"]["converted"]["nll"]
    assert nll["cuda"] == pytest.approx(nll["cpu"], rel=1e-3) and nll["cuda"] != nll["cpu"]


def test_speed_is_measured_by_cuda_graphs_too(pico, converted, text):
    grid = Grid(((1, 16), (4, 16)), rounds=1, new_tokens=8, graphs=4, warm=True)
    settings = {"effort": "quick", "tokens": 512, "sequence_length": 64, "grid": grid}
    found = evaluate(converted(pico("llama")), Settings(text=(text,), device="cuda", **settings))
    speed = found["speed"]["transformers"]
    assert speed["device"] == torch.cuda.get_device_name() and not speed["too_large"]
    decoding = [row for row in speed["rows"] if row["phase"] == "decode"]
    # So small a model waits for its kernels to start.
    assert all("CUDA graphs" in row["way"] for row in decoding), speed["left_out"]


def test_a_report_makes_its_controls(pico, converted, text):
    settings = Settings(text=(text,), tokens=512, sequence_length=64, controls=True, speed=False)
    found = evaluate(converted(pico("llama")), settings)
    assert {"static", "random router", "oracle router"} <= set(found["models"])
    assert not found["not_run"]
