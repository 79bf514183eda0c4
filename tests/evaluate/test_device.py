"""Reports on a device: it has figures and sizes of its own, and its memory has an end."""

import pytest
import torch
from pico import PICO
from transformers import AutoConfig, AutoModelForCausalLM

from moefy import pipeline, timing
from moefy.compute_dtype import ComputeDtype
from moefy.errors import MoefyError
from moefy.evaluate import dtypes, engine_speeds
from moefy.evaluate.cache import Cache
from moefy.evaluate.cuda_graphs import Graphed
from moefy.evaluate.dtypes import one_dtype
from moefy.evaluate.prepare import common_key
from moefy.evaluate.speed import GRAPHS, Workload, fastest
from moefy.evaluate.speed import measure as measure_speed
from moefy.evaluate.timed_rounds import GRIDS, Grid, grid_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IDS_T = torch.arange(200) % 128


def test_what_one_kind_of_device_measured_is_not_taken_for_the_other(tmp_path):
    compute = ComputeDtype(torch.float32)
    on = {device: Cache(tmp_path, common_key(compute, device)) for device in (CPU, GPU)}
    on[CPU].put("score", {"model": "m"}, 1.0)
    assert on[CPU].get("score", {"model": "m"}) == 1.0
    assert on[GPU].get("score", {"model": "m"}) is None
    # Two GPUs of one kind round alike.
    assert common_key(compute, torch.device("cuda:1")) == common_key(compute, GPU)


def test_speeds_of_two_gpus_are_two_measurements(monkeypatch):
    keys = []
    for name in ("NVIDIA A", "NVIDIA B", "NVIDIA B"):
        monkeypatch.setattr(engine_speeds, "device_name", lambda device, name=name: name)
        keys.append(engine_speeds.key_of([], IDS_T, Grid(()), GPU))
    assert keys[0] != keys[1] == keys[2]


def test_a_gpu_is_measured_at_larger_batches_and_longer_prompts():
    for effort, grid in GRIDS.items():
        assert grid_for(effort, "cpu", 8192) == grid and not grid.graphs and not grid.warm
    short = grid_for("full", "cpu", 144)  # one that takes fewer tokens than are asked for
    assert short.work == ((1, 128), (8, 128), (32, 128))
    grid = grid_for("full", "cuda", 8192)
    assert (256, 4096) in grid.work and grid.warm and 0 < grid.graphs < 256
    assert grid.batches == grid_for("usual", "cuda", 8192).batches == [1, 8, 32, 128, 256]
    assert grid_for("quick", "cuda", 8192).batches == [1]
    # No prompt is longer than the model takes, with what is written after it.
    short = grid_for("full", "cuda", 1024)
    assert {context for _, context in short.work} == {512, 1024 - short.new_tokens}


def test_a_device_is_part_of_a_recipe_too(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('model = "demo"\n[report]\ndevice = "cuda:1"\n', encoding="utf-8")
    assert pipeline.declared(file).report.device == "cuda:1"


def test_models_that_do_not_fit_on_a_gpu_are_refused_with_what_to_do(pico, monkeypatch):
    folders = [pico("llama")] * 2
    takes = dtypes.num_bytes(folders, torch.float32)
    monkeypatch.setattr(dtypes, "room", lambda device: takes - 1)
    with pytest.raises(MoefyError, match="2 models in float32 take.*--device cpu") as caught:
        one_dtype("auto", folders, GPU)
    assert caught.value.code == 5
    # A processor has disk behind its memory, and says so where it refuses.
    assert one_dtype("auto", folders, CPU).dtype == torch.float32
    monkeypatch.setattr(dtypes, "room", lambda device: takes)
    assert one_dtype("auto", folders, GPU).dtype == torch.float32


def test_the_clock_waits_for_a_gpu_and_for_nothing_else(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert timing.now(CPU) <= timing.now(GPU) and waited == [GPU]


class Full:
    """A dense model whose memory holds `most` tokens at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.cache, self.clock = most, self, 0.0

    def __call__(self, ids_BT, **_):
        self.clock += 1.0
        if ids_BT.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return self


def speeds(*models: Full, work):
    grid = Grid(work, rounds=1, new_tokens=2, trial=16, most_tried=16, warm=True)
    clock = lambda: sum(model.clock for model in models)  # noqa: E731
    opened = {f"model {n}": lambda _, model=model: model for n, model in enumerate(models)}
    return measure_speed(opened, IDS_T, grid, dtypes=[torch.float32, torch.float64], clock=clock)


def test_what_memory_does_not_hold_is_left_out_of_all_models():
    work = ((1, 16), (1, 64), (4, 16), (8, 16))
    result = speeds(Full(10**6), Full(100), work=work)
    assert {(row["batch"], row["context"]) for row in result["rows"]} == {*work[:3]}
    assert result["too_large"] == [(8, 16)] and result["left_out"] == {}
    result = speeds(Full(10**6), Full(60), work=work)
    assert result["too_large"] == [(1, 64), (4, 16), (8, 16)]
    assert speeds(Full(10**6), Full(10**6), work=work)["too_large"] == []
    with pytest.raises(MoefyError, match="memory holds none of the batches") as caught:
        speeds(Full(8), work=work)
    assert caught.value.code == 5


def mixture():
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = AutoConfig.for_model(
        "qwen2_moe", num_experts=4, num_experts_per_tok=2, **sizes, **PICO
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_static_cache_and_a_compiled_call_compute_the_same():
    """The same path as on a GPU, but for the compiler behind it, which records graphs there."""
    model, ids_BT = mixture(), IDS_T[:36].reshape(2, 18)
    graphed = Graphed(model, new_tokens=2, backend="eager")
    graphed.set_experts_implementation("batched_mm")
    with torch.inference_mode():
        for order in ([0, 1], [1, 0]):  # the second prompt shares the first one's cache
            rows_BT = ids_BT[order]
            out = graphed(rows_BT[:, :16], use_cache=True, logits_to_keep=1)
            steps = [
                graphed(rows_BT[:, t : t + 1], cache=out.cache, use_cache=True).logits.clone()
                for t in (16, 17)
            ]
            whole_BTV = model(rows_BT, use_cache=False).logits
            assert torch.allclose(torch.cat(steps, 1), whole_BTV[:, 16:], atol=1e-5)
            assert not torch.allclose(torch.cat(steps, 1), whole_BTV.flip(0)[:, 16:], atol=1e-3)
    assert len(graphed.caches) == 1


def test_graphs_are_tried_for_decoding_small_batches_and_are_left_out_where_they_fail(monkeypatch):
    tried = []

    def round_(model, workload, run, prefill, decode):
        graphs = isinstance(model, Graphed)
        tried.append((graphs, run[0], decode))
        if graphs and decode == "batched_mm":
            raise RuntimeError("cannot be captured")
        return 1.0, 0.1 if graphs else 1.0

    monkeypatch.setattr("moefy.evaluate.speed.one_round", round_)
    grid = Grid(((1, 16), (2, 16), (4, 16)), rounds=1, new_tokens=2, graphs=2)
    result = fastest(lambda dtype: mixture(), [torch.float32], Workload(IDS_T, grid, lambda: 0.0))
    ways = {work: way.name for work, way in result.best.items()}
    assert ways["decode", 1] == ways["decode", 2] == f"grouped_mm with {GRAPHS}"
    assert GRAPHS not in ways["decode", 4] and GRAPHS not in ways["prefill", 1]
    assert not any(graphs and (batch > 2 or decode == "eager") for graphs, batch, decode in tried)
    failed = f"batched_mm with {GRAPHS} in float32"
    assert result.left_out == {failed: "RuntimeError: cannot be captured"}
    assert {*result.models} == {(torch.float32, False), (torch.float32, True)}
