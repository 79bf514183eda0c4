"""The run in llama.cpp's types: what is rounded, and what rounded routers change."""

import ctypes
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sample_report
import torch
from transformers import AutoModelForCausalLM

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate import ggml, quantized
from moefy.evaluate.run import evaluate
from moefy.report import section_quantized
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows

gguf = pytest.importorskip("gguf")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def by_gguf(kind, source, target, start, rows, columns, importance):
    """`ggml_quantize_chunk` by gguf's own reference in numpy."""
    values = (ctypes.c_float * (rows * columns)).from_address(source)
    values = np.array(values, np.float32).reshape(rows, columns)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
    ctypes.memmove(target, packed.ctypes.data, packed.nbytes)
    return packed.nbytes


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rounded(folder: Path, *, routers: bool):
    """The model with its matrices rounded here; rows that are no multiple of 32 get 16 bits."""
    model = opened(folder)
    for name, parameter in model.named_parameters():
        gate = name.endswith("mlp.gate.weight")
        if (gate and not routers) or re.search("norm|shared_expert_gate", name):
            continue
        if parameter.shape[-1] % 32:
            parameter.data = parameter.data.half().float()
        else:
            rows = parameter.data.reshape(-1, parameter.shape[-1]).numpy()
            back = gguf.quants.dequantize(gguf.quants.quantize(rows, Q8_0), Q8_0)
            parameter.data = torch.from_numpy(back).reshape(parameter.shape)
    return model


def divergence(model, reference, windows) -> float:
    """Mean KL over all places but the last of each window."""
    total, count = 0.0, 0
    for ids_T in windows:
        with torch.inference_mode():
            p, q = (one(ids_T[None]).logits[0, :-1].softmax(-1) for one in (reference, model))
        total += float((p * (p.log() - q.log())).sum())
        count += len(ids_T) - 1
    return total / count


def settings(text: Path, *types: str) -> Settings:
    few = {"tokens": 128, "sequence_length": 64, "effort": "quick", "speed": False}
    return Settings(text=(text,), quantized=types, controls=False, **few)


def test_the_run_in_a_type_is_measured_with_and_without_its_routers(
    pico, converted, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("moefy.evaluate.run.redraw", lambda run: None)  # matplotlib takes long
    monkeypatch.setattr(ggml, "library", lambda: by_gguf)
    monkeypatch.setattr(quantized, "version", lambda name: "0")
    dense = pico("llama")
    run = Path(shutil.copytree(converted(dense), tmp_path / "runs" / "run"))
    report = evaluate(run, settings(text, "Q8_0"))
    assert report["not_run"] == []
    rows = {(row["type"], row["routers"]): row["texts"][0] for row in report["quantized"]["rows"]}
    assert [*rows] == [("", False), ("q8_0", False), ("q8_0", True)]
    windows = text_windows(load_tokenizer(dense), text, num_tokens=128, length=64)
    plain, original = opened(run), opened(dense)
    assert rows["", False]["kl_run"] == 0 and rows["", False]["top1_run"] == 1
    for routers in (False, True):
        model, row = rounded(run, routers=routers), rows["q8_0", routers]
        # 1e-6: what float32 leaves of a sum over the vocabulary.
        for key, other in (("kl_dense", original), ("kl_run", plain)):
            assert row[key] == pytest.approx(divergence(model, other, windows), rel=1e-2, abs=1e-6)
    monkeypatch.setattr(quantized, "compare_with", None)
    assert evaluate(run, settings(text, "q8_0"))["quantized"] == report["quantized"]


def test_rounded_routers_choose_otherwise(pico, converted, monkeypatch):
    monkeypatch.setattr(ggml, "library", lambda: by_gguf)
    folder = converted(pico("llama"))
    stored = opened(folder).state_dict()
    kept, rough = (ggml.quantise(opened(folder), "q8_0", routers=r) for r in (False, True))
    routers = [name for name in stored if name.endswith("mlp.gate.weight")]
    assert routers
    for name, value in stored.items():
        assert torch.equal(kept.state_dict()[name], rough.state_dict()[name]) == (
            name not in routers
        )
        assert name not in routers or torch.equal(kept.state_dict()[name], value)


def test_an_unknown_type(pico, converted, text):
    with pytest.raises(MoefyError, match="--quantized q9_0 is no type; expected one of") as no:
        evaluate(converted(pico("llama")), settings(text, "q8_0", "q9_0"))
    assert no.value.code == 2


def test_the_page_says_what_rounded_routers_change():
    report = sample_report.full()
    section = section_quantized.quantized(report)
    names = [row[0] for row in section.tables[0].rows]
    assert names == ["32 bits", "q8_0", "q8_0, routers, too", "q4_K_M", "q4_K_M, routers, too"]
    assert "from 0.0200 to 0.0400 in q8_0, from 0.0600 to 0.0800 in q4_K_M" in section.lead[1]
    assert "Qwen2MoeForCausalLM" in section.tables[0].caption
    assert not section_quantized.quantized(report | {"quantized": {}})
