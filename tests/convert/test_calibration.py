"""Calibration text that the model writes: without a tokenizer, in a dtype that the machine has."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stock import auto_class

from moefy import compute_dtype
from moefy.config.recipe import build, read
from moefy.config.report import Settings
from moefy.convert import memory
from moefy.convert.calibration import NO_TOKENIZER, calibration_tokens
from moefy.convert.estimate import estimate
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.errors import MoefyError
from moefy.evaluate.run import evaluate
from moefy.text.self_text import BATCHES

FEW = {"tokens": 512, "sequence_length": 64}


def summary_of(run):
    return json.loads((run / "moefy" / "conversion.json").read_text(encoding="utf-8"))


@pytest.fixture
def stored_in_16_bits(own_pico):
    folder = own_pico("llama")
    model = auto_class(folder).from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def slow_in_16_bits(monkeypatch):
    """A machine without instructions for them."""
    monkeypatch.setattr(compute_dtype, "native", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype, device: 40.0)


@pytest.fixture
def quick_in_16_bits(monkeypatch):
    monkeypatch.setattr(compute_dtype, "native", lambda dtype, device: True)


def a_job(folder, **given):
    return prepare(build(None, {"model": str(folder), **FEW, **given}, []))


def written(job, **more):
    return calibration_tokens(job, lambda *_: None, **more)


# No tokenizer


def test_a_model_without_a_tokenizer_converts_and_says_so(own_pico, tmp_path):
    folder, out = own_pico("llama"), tmp_path / "out"
    for file in folder.glob("*token*"):
        file.unlink()
    convert(a_job(folder), out)
    assert NO_TOKENIZER in summary_of(out)["calibration"]["notes"]
    assert NO_TOKENIZER in (out / "moefy" / "conversion.md").read_text(encoding="utf-8")
    assert not list(out.glob("tokenizer*"))
    auto_class(out).from_pretrained(out)
    # All that follows needs text of the user, and says what is missing.
    text = tmp_path / "text.txt"
    text.write_text("some words " * 400)
    with pytest.raises(MoefyError, match="no tokenizer"):
        evaluate(out, Settings(text=(text,)))


def test_a_broken_tokenizer_is_not_taken_for_none(own_pico, tmp_path):
    folder = own_pico("llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(MoefyError, match="no tokenizer that loads"):
        written(a_job(folder))


# The dtype to compute in


def test_a_dtype_that_the_machine_lacks_is_not_written_in(
    stored_in_16_bits, slow_in_16_bits, tmp_path
):
    convert(a_job(stored_in_16_bits), tmp_path / "out")
    told = summary_of(tmp_path / "out")["calibration"]
    assert told["compute_dtype"] == "float32"
    assert told["notes"] == [
        "calibration text: computes in float32, not in bfloat16 as stored: this machine is 40.0 "
        "times slower in that"
    ]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_a_plan_names_the_dtype_of_text_that_the_model_writes(
    stored_in_16_bits, slow_in_16_bits, text
):
    job, given = a_job(stored_in_16_bits), a_job(stored_in_16_bits, calibration=str(text))
    assert memory.writing(job).notes[0] in estimate(job)["notes"]
    assert not any("calibration text" in note for note in estimate(given)["notes"])


def test_a_dtype_that_the_machine_has_is_written_in_without_a_word(
    stored_in_16_bits, quick_in_16_bits
):
    tokens = written(a_job(stored_in_16_bits))
    assert tokens.compute_dtype == "bfloat16" and tokens.notes == ()


def test_the_dtype_that_was_asked_for_is_written_in(stored_in_16_bits, quick_in_16_bits, tmp_path):
    asked = written(a_job(stored_in_16_bits, compute_dtype="float32"))
    assert asked.compute_dtype == "float32"
    assert asked.notes == ("calibration text: computes in float32, as asked for",)
    assert asked.sha256 != written(a_job(stored_in_16_bits)).sha256
    convert(a_job(stored_in_16_bits, compute_dtype="float32"), tmp_path / "out")
    assert read(tmp_path / "out" / "moefy" / "recipe.toml")["compute_dtype"] == "float32"
    assert summary_of(tmp_path / "out")["calibration"]["sha256"] == asked.sha256


def test_text_of_the_user_is_computed_in_none(pico, text, tmp_path):
    convert(a_job(pico("llama"), calibration=str(text)), tmp_path / "out")
    assert summary_of(tmp_path / "out")["calibration"]["compute_dtype"] is None


def test_an_unknown_dtype_is_refused(pico):
    with pytest.raises(
        MoefyError, match="--compute-dtype is 'float23'; .*did you mean float32"
    ) as e:
        a_job(pico("llama"), compute_dtype="float23")
    assert e.value.code == 2


def test_what_memory_there_is_decides_the_dtype_and_how_many_write_at_a_time(
    stored_in_16_bits, slow_in_16_bits
):
    job = a_job(stored_in_16_bits)
    whole = memory.writing(job)
    assert (whole.compute.name, whole.batch_size) == ("float32", BATCHES[0])
    base = memory.base_bytes(job.checkpoint.folder)
    half = memory.writing(job, base + whole.num_bytes // 2)
    assert half.compute.name == "float32" and half.batch_size < BATCHES[0]
    assert half.num_bytes <= whole.num_bytes // 2
    least = memory.writing(job, base + 1)
    assert (least.compute.name, least.batch_size) == ("bfloat16", BATCHES[-1])
    assert "as stored, 40.0 times slower" in least.compute.note
    with pytest.raises(MoefyError, match="--compute-dtype float32: ") as caught:
        memory.writing(a_job(stored_in_16_bits, compute_dtype="float32"), base + 1)
    assert caught.value.code == 5
    assert memory.predicted(job, {})["calibration"] == base + whole.num_bytes
