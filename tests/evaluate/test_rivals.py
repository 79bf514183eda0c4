"""Rivals: bytes and types as llama.cpp has them, rounding as gguf's, and who beats whom."""

import ctypes
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moefy.config.report import Settings
from moefy.convert import depth
from moefy.errors import MoefyError
from moefy.evaluate import frontier, ggml, rivals, scoring
from moefy.evaluate.advice import advice
from moefy.evaluate.metrics import compare
from moefy.evaluate.run import evaluate
from moefy.evaluate.sizes import sizes
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows

gguf = pytest.importorskip("gguf")
BLOCKS = {"Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_0": (32, 18)}
"""Weights and bytes of a block, from the definition of each type: scales, minima and levels."""


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_gguf(kind, source, target, start, rows, columns, importance):
    """`ggml_quantize_chunk` by gguf's own reference in numpy."""
    assert start == 0 and importance is None
    values = (ctypes.c_float * (rows * columns)).from_address(source)
    packed = gguf.quants.quantize(
        np.array(values, np.float32).reshape(rows, columns), gguf.GGMLQuantizationType(kind)
    )
    ctypes.memmove(target, packed.ctypes.data, packed.nbytes)
    return packed.nbytes


# Types and bytes


@pytest.mark.parametrize(
    ("kind", "usual"), [("q8_0", "Q8_0"), ("q4_K_M", "Q5_0"), ("q2_K", "Q4_0")]
)
def test_bytes_are_those_of_a_count_by_hand(kind, usual, pico):
    """Rows of 32 and 96 are no multiple of 256, so K-quants fall back to types of 32."""
    model = opened(pico("llama"))
    up = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 96 * 32)  # q, o, k, v, gate, up of two layers
    down, norms, table = 2 * 32 * 96, 5 * 32, 128 * 32
    # A third of the layers, the first and the last eighth get finer values and down_proj.
    found = ggml.packed_bytes(model, kind)
    finer = {name: kind for matrix, kind in ggml.types(model, kind) for name in [matrix.name]}
    expected = 4 * norms
    for name, parameter in model.named_parameters():
        if name in finer:
            block, size = BLOCKS[finer[name]]
            expected += parameter.numel() // block * size
    assert sum(found.values()) == expected
    assert finer["model.layers.0.self_attn.q_proj.weight"] == usual
    assert finer["lm_head.weight"] == "Q8_0"
    assert up + down + norms + 2 * table == sum(p.numel() for p in model.parameters())
    # One row of the embedding is read, and all of the head.
    read = sizes(model, torch.float32, found)["bytes_read"]
    block, size = BLOCKS[finer["model.embed_tokens.weight"]]
    assert read == expected - table // block * size + 32 // block * size


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_moe_reads_what_is_always_on_and_the_experts_that_are_chosen(stored, pico, converted):
    model = opened(converted(pico("llama")))
    found = sizes(model, stored)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total, config = sum(p.numel() for p in model.parameters()), model.config
    always = total - experts - 128 * 32 + 32
    chosen = experts * config.num_experts_per_tok // config.num_experts
    assert found["bytes_read"] == (always + chosen) * stored.itemsize
    # The negative control: all experts, as a large batch reads them.
    assert found["weight_bytes"] == total * stored.itemsize > 1.1 * found["bytes_read"]
    # Routers stay in 32 bits, and experts are packed row by row.
    packed = ggml.packed_bytes(model, "q8_0")
    for name, parameter in model.named_parameters():
        per_weight = packed[parameter.data_ptr()] / parameter.numel()
        kept = "norm" in name or "gate.weight" in name or parameter.numel() <= 32
        width = parameter.shape[-1] % 32
        assert per_weight == (4 if kept else 2 if width else 34 / 32), name


class Wide:
    """Shapes in which K-quants fit, as `ggml._type` reads them."""

    values = torch.empty(1, 512, device="meta")


@pytest.mark.parametrize(
    ("role", "kind", "number", "experts", "expected"),
    [
        ("", "q4_K_M", 5, 0, "Q4_K"),
        ("down", "q4_K_M", 0, 0, "Q6_K"),  # the first eighth of 32
        ("down", "q4_K_M", 4, 0, "Q4_K"),
        ("down", "q4_K_M", 6, 0, "Q6_K"),  # and every third behind it
        ("down", "q4_K_M", 28, 0, "Q6_K"),  # and the last eighth
        ("value", "q5_K_M", 31, 0, "Q6_K"),
        ("value", "q3_K_M", 1, 0, "Q5_K"),
        ("value", "q3_K_M", 2, 0, "Q4_K"),
        ("value", "q2_K", 2, 0, "Q4_K"),
        ("value", "q2_K", 2, 8, "Q8_0"),
        ("key", "q2_K", 2, 8, "Q8_0"),
        ("key", "q2_K", 2, 0, "Q2_K"),
        ("attention", "q4_K_M", 2, 8, "Q5_K"),
        ("attention", "q4_K_M", 2, 0, "Q4_K"),
        ("attention", "q2_K", 2, 0, "Q3_K"),
        ("head", "q2_K", 0, 0, "Q6_K"),
        ("head", "q8_0", 0, 0, "Q8_0"),
    ],
)
def test_types_are_those_of_llama_cpps_mixtures(role, kind, number, experts, expected):
    matrix = ggml.Matrix("", Wide.values, role, number, 32)
    assert ggml._type(matrix, kind, 4, experts) == expected
    narrow = ggml.Matrix("", torch.empty(1, 576, device="meta"), role, number, 32)
    usual = "Q8_0" if role == "head" else ggml.FALLBACK.get(expected, expected)
    assert ggml._type(narrow, kind, 4, experts) == usual
    odd = ggml.Matrix("", torch.empty(1, 100, device="meta"), role, number, 32)
    assert ggml._type(odd, kind, 4, experts) == "F16"


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "gemma3_text", "olmo2", "starcoder2"]
)
def test_roles_are_those_of_ggufs_own_names(family, pico):
    names = gguf.TensorNameMap.block_mappings_cfg
    kinds = {
        gguf.MODEL_TENSOR.ATTN_V: "value",
        gguf.MODEL_TENSOR.ATTN_QKV: "value",
        gguf.MODEL_TENSOR.ATTN_K: "key",
        gguf.MODEL_TENSOR.ATTN_OUT: "attention",
        gguf.MODEL_TENSOR.FFN_DOWN: "down",
    }
    matrices = ggml.matrices(opened(pico(family)))
    for matrix in matrices:
        template = matrix.name.removesuffix(".weight").replace(".0.", ".{bid}.")
        template = template.replace(".1.", ".{bid}.")
        tensors = {tensor for tensor, known in names.items() if template in known}
        if "{bid}" in template:
            expected = {kinds.get(tensor, "") for tensor in tensors}
            assert matrix.role in expected, matrix.name
    assert [m.role for m in matrices].count("head") == 1
    assert [m.role for m in matrices].count("down") == 2


# Rounding


def test_a_missing_package_is_one_line(pico, converted, text, monkeypatch):
    run, real = converted(pico("llama")), importlib.util.find_spec
    missing = lambda name, *more: None if name == "xllamacpp" else real(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    for more in ({"rivals": True}, {"against": ("q8_0",)}):
        with pytest.raises(MoefyError, match="xllamacpp is not installed") as refused:
            evaluate(run, Settings(text=(text,), effort="quick", **more))
        assert refused.value.code == 5 and "pip install 'moefy[rivals]'" in str(refused.value)
    rivals.check(Settings(against=("layers-dropped",)))  # it needs neither


@pytest.mark.parametrize("name", BLOCKS)
def test_rounding_equals_ggufs_own(name):
    pytest.importorskip("xllamacpp")
    values = torch.randn(3, 8, 96, generator=torch.Generator().manual_seed(0))
    found = ggml.rounded(values, name, ggml.library())
    assert torch.equal(found, ggml.rounded(values, name, by_gguf))
    assert not torch.equal(found, values)


@pytest.mark.parametrize(("name", "bits"), [("Q6_K", 6), ("Q5_K", 5), ("Q4_K", 4), ("Q3_K", 3)])
def test_k_quants_lose_about_what_their_bits_say(name, bits):
    pytest.importorskip("xllamacpp")
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = (ggml.rounded(values, name, ggml.library()) - values).square().mean()
    assert 0.5 < float(error) * 4.0**bits < 2  # a step of 2^-bits of the block's range
    coarser = ggml.rounded(values, "Q2_K", ggml.library())
    assert (coarser - values).square().mean() > 2 * error


def test_a_model_is_quantised_where_llama_cpp_would_and_nowhere_else(pico, converted, monkeypatch):
    monkeypatch.setattr(ggml, "library", lambda: by_gguf)
    for folder in (pico("llama"), pico("gpt2"), converted(pico("llama"))):
        model, before = opened(folder), opened(folder)
        ggml.quantise(model, "q4_K_M")
        kinds = {matrix.name: kind for matrix, kind in ggml.types(model, "q4_K_M")}
        for (name, found), (_, old) in zip(
            model.named_parameters(), before.named_parameters(), strict=True
        ):
            if name not in kinds:
                assert torch.equal(found, old), name
                continue
            expected = old.T if "gpt2" in str(folder) and ".h." in name else old
            expected = ggml.rounded(expected.detach(), kinds[name], by_gguf)
            assert torch.equal(found.T if found.shape != expected.shape else found, expected) or (
                torch.equal(found.T, expected)
            ), name
        assert any("expert" in name for name in kinds) == ("converted" in str(folder))


@pytest.mark.parametrize("bits", [None, 4, 5, 8])
def test_weights_that_were_quantised_before_are_found(bits, pico):
    from moefy.report.format import flattered

    model = opened(pico("llama")).bfloat16()
    for matrix in ggml.matrices(model) if bits else []:
        blocks_N32 = matrix.values.float().reshape(-1, 32)
        step_N1 = blocks_N32.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
        matrix.values.copy_(((blocks_N32 / step_N1).round() * step_N1).reshape_as(matrix.values))
    assert bool(flattered(rivals.levels(model))) == (bits in (4, 5))


# The report


def test_rivals_are_scored_once_and_by_name(pico, converted, text, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "library", lambda: by_gguf)
    monkeypatch.setattr(rivals, "version", lambda package: "1")
    run = Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))
    few = {"text": (text,), "effort": "quick", "speed": False, "tokens": 200}
    few |= {"sequence_length": 64, "controls": False}
    report = evaluate(run, Settings(**few, rivals=True))
    assert report["not_run"] == []
    rows = report["texts"]["text"]
    labels = ["layers-dropped", *ggml.TYPES, "converted q8_0", "converted q4_K_M"]
    assert list(rows) == ["dense", "converted", *labels]
    assert rows["q8_0"]["kl"] < rows["q4_K_M"]["kl"] < 0.1 and rows["q2_K"]["kl"] > 0.01
    points = {point["label"]: point for point in report["frontier"]}
    assert points["q8_0"]["operations"] == points["dense"]["operations"]
    assert points["converted q8_0"]["operations"] == points["converted"]["operations"]
    assert points["converted q8_0"]["bytes_read"] < points["q8_0"]["bytes_read"]
    assert points["converted"]["better"].keys() == {"bytes_read", "operations"}
    assert points["converted q8_0"]["better"].keys() == {"bytes_read"}
    assert "better" not in points["q8_0"]
    said = [one["sentence"] for one in report["advice"]]
    assert any("at batch 1, where bytes" in sentence for sentence in said)
    assert "converted q4_K_M" in (run / "README.md").read_text().replace("\\", "")
    assert "Loss against cost" in (run / "moefy" / "report.html").read_text()

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(scoring, "score_models", never)
    monkeypatch.setattr(rivals, "sizes", never)
    assert evaluate(run, Settings(**few, rivals=True))["texts"] == report["texts"]
    one = evaluate(run, Settings(**few, against=("q4_K_M",)))
    assert list(one["texts"]["text"]) == ["dense", "converted", "q4_K_M", "converted q4_K_M"]
    # The negative control: what was not measured is.
    monkeypatch.setattr(ggml, "quantise", never)
    again = evaluate(run, Settings(**few, against=("q5_K_M",)))
    assert [row["what"] for row in again["not_run"]] == ["rival converted q5_K_M"]


def test_layers_are_dropped_until_no_more_is_computed(pico, converted, text, tmp_path, monkeypatch):
    dense = pico("llama", num_hidden_layers=6)
    run = Path(shutil.copytree(converted(dense), tmp_path / "run"))
    few = {"text": (text,), "effort": "quick", "speed": False, "tokens": 200}
    few |= {"sequence_length": 64, "controls": False, "against": ("layers-dropped",)}
    with monkeypatch.context() as patch:  # neither package is needed
        patch.setattr(importlib.util, "find_spec", lambda *_: None)
        rivals.check(Settings(**few))
    report = evaluate(run, Settings(**few))
    assert report["not_run"] == []
    models, label = report["models"], "layers-dropped"
    layers = [int(n) for n in re.findall(r"\d+", models[label]["meaning"].split(", which")[0])]
    layer = 2 * (32 * 32 + 16 * 32) + 3 * 96 * 32 + 2 * 32
    operations = {name: model["flops_per_token"] // 2 for name, model in models.items()}
    assert operations[label] == operations["dense"] - len(layers) * layer
    assert operations[label] <= operations["converted"] < operations[label] + layer
    # Judged by transformers' own class, of which the layers are taken by hand.
    model, whole = opened(dense), opened(dense)
    model.model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(model.model.layers) if number not in layers
    )
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)
    windows = text_windows(load_tokenizer(dense), text, num_tokens=200, length=64)
    score = compare(whole, {"cut": model}, windows)["cut"]
    assert report["texts"]["text"][label]["kl"] == pytest.approx(score.kl, rel=1e-3)
    assert score.kl > 1e-4
    monkeypatch.setattr(scoring, "score_models", None)
    monkeypatch.setattr(depth, "_branches", None)
    assert evaluate(run, Settings(**few))["texts"] == report["texts"]


# Who beats whom


def point(label, kl, bytes_read, operations=100, kind="rival", **more):
    own = kind in ("converted", "own")
    row = {"label": label, "kind": "rival" if kind == "own" else kind, "own": own, "kl": kl}
    row |= {"text": "t", "a_model": True, "bytes_read": bytes_read, "operations": operations}
    return row | more


RUN = point("converted", 0.4, 100, 70, "converted")


@pytest.mark.parametrize(
    ("rival", "axis", "wins"),
    [
        (point("q4_K_M", 0.1, 100), "bytes_read", True),
        (point("q4_K_M", 0.1, 104), "bytes_read", True),  # about as many bytes
        (point("q4_K_M", 0.1, 106), "bytes_read", False),
        (point("q4_K_M", 0.39, 100), "bytes_read", False),  # about as much lost
        (point("q4_K_M", 0.41, 90), "bytes_read", True),  # about as much, and clearly fewer bytes
        (point("q4_K_M", 0.43, 10), "bytes_read", False),
        (point("q4_K_M", 0.0, 10), "operations", False),
        (point("layers-dropped", 0.1, 10, 70), "operations", True),
        (point("oracle router", 0.1, 100, 70, a_model=False), "bytes_read", False),
        (point("converted q8_0", 0.1, 50, 70, "own"), "bytes_read", False),
        (point("static", 0.1, None, None, "control"), "bytes_read", False),
    ],
)
def test_a_dominated_run_is_called_so_and_no_other(rival, axis, wins):
    assert (frontier.better(RUN, [RUN, rival], axis) is not None) == wins


def spoken(*points, levels=31.0):
    report = {"frontier": [RUN, *points], "rivals": {"levels": levels}, "texts": {}}
    by_axis = {
        one["because"]["axis"]: one
        for one in advice(report, "converted")
        if "axis" in one["because"]
    }
    return by_axis["bytes_read"], by_axis["operations"]


def test_advice_names_the_rival_and_by_how_much():
    dense = point("dense", 0.0, 200, 100, "dense")
    static = point("static", 0.6, 100, 70, "control")
    by_bytes, by_operations = spoken(dense, static, point("q4_K_M", 0.02, 95))
    assert by_bytes["verdict"] == "does not pay"
    assert by_bytes["sentence"].startswith("NOT a best point at batch 1")
    assert "converted (100 B, KL 0.400, clearly different) is beaten by" in by_bytes["sentence"]
    assert "q4_K_M (95 B, KL 0.020, indistinguishable)" in by_bytes["sentence"]
    assert by_operations["verdict"] == "pays"
    assert by_operations["sentence"].startswith("A best point for prefill and large batches")
    assert "has 0.200 less KL than static" in by_operations["sentence"]
    assert (
        "dense (100 multiply-adds, KL 0.000, indistinguishable) loses less at 1.43 times"
        in (by_operations["sentence"])
    )
    assert "flatter" not in by_bytes["sentence"]
    flattered, _ = spoken(dense, static, point("q4_K_M", 0.02, 95), levels=13.0)
    assert flattered["sentence"].endswith("which may flatter types of 4 and 5 bits.")


def test_a_run_that_is_alone_or_level_does_not_pay():
    dense = point("dense", 0.0, 200, 100, "dense")
    alone, _ = spoken(dense, point("q2_K", 0.1, 120))
    assert alone["verdict"] == "not measured" and "No rival costs as little" in alone["sentence"]
    assert "q2_K (120 B, KL 0.100, noticeable) loses less at 1.20 times" in alone["sentence"]
    level, _ = spoken(dense, point("q2_K", 0.41, 100))
    assert level["verdict"] == "does not pay" and level["sentence"].startswith("NO BETTER than")
    # In another type it may be ahead where it is not as it is.
    ahead, _ = spoken(
        dense,
        point("q8_0", 0.01, 100),
        point("q2_K", 0.9, 40),
        point("converted q4_K_M", 0.5, 40, 70, "own"),
    )
    assert ahead["verdict"] == "pays" and "converted q4_K_M (40 B" in ahead["sentence"]
    assert "converted (100 B, KL 0.400, clearly different) is beaten by" in ahead["sentence"]


def test_without_rivals_there_is_no_word_of_them():
    static = point("static", 0.6, 100, 70, "control")
    told = advice({"frontier": [RUN, static], "texts": {}}, "converted")
    assert not any("axis" in one["because"] for one in told)
