"""All models of a report compute in one dtype, which the machine has, and the report names it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pico import PICO
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moefy import compute_dtype
from moefy.config.report import Settings, build
from moefy.errors import MoefyError
from moefy.evaluate import candidates, controls, dtypes, scoring
from moefy.evaluate.dtypes import dtypes_to_try, num_bytes, one_dtype
from moefy.evaluate.run import evaluate
from moefy.evaluate.sizes import sizes
from moefy.evaluate.timed_rounds import Grid
from moefy.files.shards import stored_dtype
from moefy.report.format import computed_in

HALF, WHOLE = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Sets whether the processor has bfloat16."""

    def sets(*, native: bool) -> None:
        listed = {"architecture": "x86_64", "avx512_bf16": native}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed)
        slow = 0.4 if native else 200.0
        monkeypatch.setattr(compute_dtype, "_seconds", lambda dtype: slow if dtype == HALF else 1.0)

    return sets


def in_bfloat16(source: Path, out: Path) -> Path:
    """A folder of the same weights, stored in bfloat16."""
    shutil.copytree(source, out)
    file = out / "model.safetensors"
    save_file({n: t.to(HALF) for n, t in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return out


@pytest.fixture
def pair(pico, converted, tmp_path) -> tuple[Path, Path]:
    """A dense model and a run, stored in bfloat16."""
    dense = in_bfloat16(pico("llama"), tmp_path / "dense")
    return dense, Path(shutil.copytree(converted(dense), tmp_path / "run"))


@pytest.fixture
def opened(monkeypatch) -> list[torch.dtype]:
    """The dtypes in which models are opened."""
    seen = []
    load = controls.load_model

    def load_model(folder, dtype):
        seen.append(dtype)
        return load(folder, dtype)

    for module in (controls, candidates):
        monkeypatch.setattr(module, "load_model", load_model)
    return seen


def settings(pair, text, **more) -> Settings:
    basic = {"effort": "quick", "speed": False, "tokens": 200, "sequence_length": 64}
    basic["device"] = "cpu"
    return Settings(text=(text,), dense=str(pair[0]), **{**basic, **more})


@pytest.mark.parametrize("native", [True, False])
def test_all_models_compute_in_one_dtype_that_the_machine_has(native, pair, text, machine, opened):
    machine(native=native)
    report = evaluate(pair[1], settings(pair, text, against=("partition=shuffle",)))
    name = "bfloat16" if native else "float32"
    assert len(opened) == 3 and set(opened) == {HALF if native else WHOLE}
    assert report["compute"] | {"processor": ""} == {
        "dtype": name,
        "stored": "bfloat16",
        "note": report["compute"]["note"],
        "processor": "",
        "device": "cpu",
    }
    assert report["compute"]["processor"] and computed_in(report) == f", in {name}"
    notes = [note for note in report["notes"] if "this machine is 200.0 times slower" in note]
    assert len(notes) == (not native)
    # Stored bytes count in the stored dtype.
    values = sum(t.numel() for t in load_file(pair[0] / "model.safetensors").values())
    assert report["models"]["dense"]["weight_bytes"] == 2 * values
    assert report["models"]["dense"]["dtype"] == "bfloat16"


def test_what_was_measured_in_another_dtype_is_measured_again(pair, text, machine, monkeypatch):
    machine(native=True)
    first = evaluate(pair[1], settings(pair, text))
    other = evaluate(pair[1], settings(pair, text, compute_dtype="float32"))
    rows = [one["texts"]["text"]["converted"]["nll"] for one in (first, other)]
    assert rows[0] != rows[1] and rows[0] == pytest.approx(rows[1], rel=1e-2)
    assert other["compute"]["dtype"] == "float32"

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(scoring, "score_models", never)
    assert evaluate(pair[1], settings(pair, text))["texts"] == first["texts"]
    machine(native=False)  # by itself it comes to float32 now, which was measured
    assert evaluate(pair[1], settings(pair, text))["texts"] == other["texts"]


def test_speed_is_tried_in_both_dtypes_where_both_are_native(pair, text, machine, opened):
    grid = Grid(((1, 16), (2, 16)), rounds=1, new_tokens=2)
    machine(native=True)
    report = evaluate(pair[1], settings(pair, text, speed=True, grid=grid, llama_cpp=False))
    speed = report["speed"]["transformers"]
    assert opened.count(HALF) == opened.count(WHOLE) == 2 and speed["processor"]
    assert {row["dtype"] for row in speed["rows"]} <= {"bfloat16", "float32"}
    assert len(speed["rows"]) == 8
    opened.clear()
    machine(native=False)
    report = evaluate(pair[1], settings(pair, text, speed=True, grid=grid, llama_cpp=False))
    assert set(opened) == {WHOLE}
    assert {row["dtype"] for row in report["speed"]["transformers"]["rows"]} == {"float32"}
    assert any(
        "speed in bfloat16 was not tried: a product takes 200.0" in n for n in report["notes"]
    )
    assert any("float32), reading" in one["sentence"] for one in report["advice"])


def test_every_open_model_counts_and_what_does_not_fit_stays_as_stored(pair, machine, monkeypatch):
    machine(native=False)
    folders = [pair[0], pair[1], pair[1]]
    takes = num_bytes(folders, WHOLE)
    assert takes == num_bytes(folders[:1], WHOLE) + 2 * num_bytes(folders[1:2], WHOLE)
    monkeypatch.setattr(dtypes, "room", lambda _: takes)
    assert one_dtype("auto", folders, CPU).dtype == WHOLE
    monkeypatch.setattr(dtypes, "room", lambda _: takes - 1)
    result = one_dtype("auto", folders, CPU)
    assert result.dtype == HALF and "200.0 times slower than in float32" in result.note
    with pytest.raises(MoefyError, match="--compute-dtype float32") as error:
        one_dtype("float32", folders, CPU)
    assert error.value.code == 5


def test_dtypes_whose_speed_is_tried(pair, machine, monkeypatch):
    machine(native=True)
    both = num_bytes(pair, HALF) + num_bytes(pair, WHOLE)
    monkeypatch.setattr(dtypes, "room", lambda _: both)
    assert dtypes_to_try("auto", HALF, HALF, pair, CPU) == ([HALF, WHOLE], {})
    assert dtypes_to_try("auto", WHOLE, WHOLE, pair, CPU) == ([WHOLE], {})
    assert dtypes_to_try("bfloat16", HALF, HALF, pair, CPU) == ([HALF], {})
    monkeypatch.setattr(dtypes, "room", lambda _: both - 1)
    tried, left_out = dtypes_to_try("auto", HALF, HALF, pair, CPU)
    assert tried == [HALF] and "GB that are left" in left_out["float32"]
    machine(native=False)
    tried, left_out = dtypes_to_try("auto", HALF, WHOLE, pair, CPU)
    assert tried == [WHOLE] and "200.0 times as long" in left_out["bfloat16"]


def test_bytes_are_those_of_the_stored_dtype():
    config = AutoConfig.for_model("qwen2_moe", num_experts=4, num_experts_per_tok=2, **PICO)
    rows = [
        sizes(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), HALF)
        for dtype in (HALF, WHOLE)
    ]
    assert rows[0] == rows[1]


def test_the_stored_dtype_is_the_one_that_is_named_or_that_of_most_values(pair, pico):
    assert stored_dtype(pair[0]) == HALF and stored_dtype(pico("llama")) == WHOLE
    file = pair[0] / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))
    assert stored_dtype(pair[0]) == HALF


def test_an_unknown_dtype_is_refused():
    with pytest.raises(MoefyError, match="--compute-dtype is 'half'") as error:
        build({"compute_dtype": "half"})
    assert error.value.code == 2
    assert build({"compute_dtype": "float32"}).compute_dtype == "float32"
    with pytest.raises(MoefyError, match="float3.*expected one of.* float32"):
        build({"compute_dtype": "float3"})
