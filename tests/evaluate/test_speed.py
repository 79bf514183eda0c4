"""Every experts implementation that can compute a model is tried, and the others are named."""

import json

import pytest
import torch
from pico import PICO
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.errors import MoefyError
from moefy.evaluate import llama_cpp, sizes, speed
from moefy.evaluate.speed import IMPLEMENTATIONS, Workload, fastest, measure
from moefy.evaluate.timed_rounds import Grid

SMALL = Grid(((1, 16), (2, 16)), rounds=1, new_tokens=2)
IDS_T = torch.arange(200) % 128
WORKLOAD = Workload(IDS_T, SMALL, lambda: 0.0)


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
    models = {"dense": lambda dtype: mixture(16), "moe": lambda dtype: mixture(width)}
    result = measure(models, IDS_T, SMALL, dtypes=[torch.float32])
    used = {row["way"] for row in result["rows"] if row["label"] == "moe"}
    assert len(result["rows"]) == 2 * 2 * 2 and used <= {*IMPLEMENTATIONS}
    if width == 16:
        assert result["left_out"] == {}
    else:
        left_out = result["left_out"]["moe"]
        assert [*left_out] == ["grouped_mm in float32"] and "grouped_mm" not in used
        assert "multiple of 16 bytes" in left_out["grouped_mm in float32"]


def test_a_model_that_no_way_computes_is_no_slow_model(monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(speed, "one_round", broken)
    fault = "eager in float32: RuntimeError: a fault of two lines"
    with pytest.raises(MoefyError, match=fault) as caught:
        fastest(lambda dtype: mixture(16), [torch.float32], WORKLOAD)
    assert caught.value.code == 6


def test_a_way_that_fails_at_more_sequences_is_left_out_there(monkeypatch):
    def round_(model, workload, run, prefill, decode):
        if run[0] == 2 and decode == "eager":
            raise RuntimeError("too many")
        return 1.0, {"eager": 1.0, "grouped_mm": 1.5, "batched_mm": 9.0}[decode]

    monkeypatch.setattr(speed, "one_round", round_)
    result = fastest(lambda dtype: mixture(16), [torch.float32], WORKLOAD)
    assert result.best["decode", 1].implementation == "eager"
    assert result.best["decode", 2].implementation == "grouped_mm"
    assert result.left_out == {"eager in float32": "RuntimeError: too many"}


def test_peak_memory_is_measured_at_such_a_width_too(tmp_path, capsys):
    mixture(11).save_pretrained(tmp_path)
    sizes._main(str(tmp_path), "float32", "cpu")
    assert json.loads(capsys.readouterr().out)["peak"] >= 0


class Timed:
    """A dense model that takes `prefill` or `decode` seconds, whatever it is given."""

    def __init__(self, clock: list[float], prefill: float, decode: float) -> None:
        self.clock, self.prefill, self.decode, self.batches = clock, prefill, decode, []
        self.cache = self

    def __call__(self, ids_BT, **_):
        self.batches.append(len(ids_BT))
        self.clock[0] += self.prefill if ids_BT.shape[1] > 1 else self.decode
        return self


def in_dtypes(seconds):
    """Models that take these seconds by label and dtype, and what measures them."""
    clock = [0.0]
    models = {
        label: {dtype: Timed(clock, *values) for dtype, values in by_dtype.items()}
        for label, by_dtype in seconds.items()
    }
    result = measure(
        {label: by_dtype.__getitem__ for label, by_dtype in models.items()},
        IDS_T,
        SMALL,
        dtypes=[torch.bfloat16, torch.float32],
        clock=lambda: clock[0],
    )
    return models, result, {(r["label"], r["phase"], r["batch"]): r for r in result["rows"]}


def test_the_best_dtype_of_dense_stands_against_the_best_of_the_other():
    half, whole = torch.bfloat16, torch.float32
    _, result, rows = in_dtypes(
        {
            "dense": {half: (1.0, 6.0), whole: (1.5, 4.0)},
            "moe": {half: (9.0, 9.0), whole: (2.0, 2.0)},
        }
    )
    for batch in (1, 2):
        assert rows["dense", "prefill", batch]["dtype"] == "bfloat16"
        assert rows["dense", "decode", batch]["dtype"] == "float32"
        assert rows["moe", "prefill", batch]["dtype"] == "float32"
        assert rows["moe", "prefill", batch]["ratio"] == 1.0 / 2.0
        assert rows["moe", "decode", batch]["ratio"] == 4.0 / 2.0
    assert result["dtype"] == {"dense": "prefill bfloat16; decode float32", "moe": "float32"}


def test_two_dtypes_are_measured_only_where_the_second_is_clearly_faster():
    half, whole = torch.bfloat16, torch.float32
    models, result, _ = in_dtypes({"dense": {half: (1.0, 1.0), whole: (1.0, 0.96)}})
    assert result["dtype"] == {"dense": "bfloat16"}
    alone = len(models["dense"][whole].batches)
    models, result, _ = in_dtypes({"dense": {half: (1.0, 1.0), whole: (1.0, 0.9)}})
    assert result["dtype"] == {"dense": "prefill bfloat16; decode float32"}
    assert len(models["dense"][whole].batches) > alone


def test_a_hopeless_dtype_is_not_tried_at_more_sequences():
    half, whole = torch.bfloat16, torch.float32
    models, _, _ = in_dtypes({"dense": {half: (1.0, 1.0), whole: (3.0, 3.0)}})
    assert set(models["dense"][whole].batches) == {1}
    # The negative control: one that may be faster there is.
    models, _, _ = in_dtypes({"dense": {half: (1.0, 1.0), whole: (1.5, 3.0)}})
    assert set(models["dense"][whole].batches) == {1, 2}


def test_a_dtype_in_which_a_model_cannot_be_computed_is_left_out():
    class Broken(Timed):
        def __call__(self, ids_BT, **_):
            raise RuntimeError("not implemented for Half")

    clock = [0.0]

    def opened(dtype):
        return (Timed if dtype == torch.float32 else Broken)(clock, 1.0, 1.0)

    dtypes = [torch.float16, torch.float32]
    result = measure({"dense": opened}, IDS_T, SMALL, dtypes=dtypes, clock=lambda: clock[0])
    assert {row["dtype"] for row in result["rows"]} == {"float32"}
    assert "not implemented for Half" in result["left_out"]["dense"]["float16"]
    with pytest.raises(MoefyError, match="nothing can compute this model .float16: RuntimeError"):
        dtypes = [torch.float16, torch.bfloat16]
        measure({"dense": opened}, IDS_T, SMALL, dtypes=dtypes, clock=lambda: clock[0])


class Server:
    """llama.cpp that takes `seconds` to read a token, and ten times that to write one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def handle_completions(self, request):
        prompt, count = len(request["prompt"]), request["n_predict"]
        milliseconds = 1000 * self.seconds
        times = {"prompt_ms": prompt * milliseconds, "predicted_ms": 10 * count * milliseconds}
        return {"timings": times | {"predicted_n": count}}


def test_a_planted_slow_model_is_slow_in_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "export", lambda folder, file, kind: file.write_bytes(b"file"))
    servers = iter([Server(0.001), Server(0.002)])
    monkeypatch.setattr(llama_cpp, "serve", lambda *_, **__: next(servers))
    folders = {label: tmp_path / label for label in ("dense", "moe")}
    result = llama_cpp.measure(folders, tmp_path, IDS_T, SMALL, threads=1)
    rows = {(r["label"], r["phase"], r["batch"], r["context"]): r for r in result["rows"]}
    speeds = {key[1:]: row["tokens_per_second"] for key, row in rows.items() if key[0] == "moe"}
    assert speeds == pytest.approx(
        {("prefill", 1, 16): 500, ("decode", 1, 16): 50, ("decode", 2, 16): 100}
    )
    assert all(row["ratio"] == pytest.approx(0.5) for key, row in rows.items() if key[0] == "moe")
    assert all(row["rounds"] == SMALL.rounds for row in rows.values())  # without the warm-up
