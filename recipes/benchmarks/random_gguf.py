"""GGUF files of random weights, dense or as Qwen2-MoE, of any sizes and type, in a second.

Quantised blocks are random bytes behind a fixed scale: only their time means anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moefy.types import Shape

SCALES = {"bf16": 0, "q8_0": 1, "q4_0": 1, "q4_k": 2}
"""Halves at the start of a block that scale it."""


def write(
    file: Path, sizes: dict[str, int], shape: Shape | None, kind: str, vocabulary: int
) -> None:
    """Write a model of `sizes` (hidden, neurons, heads, key_heads, layers) as `file`."""
    rng = np.random.default_rng(0)
    hidden, neurons, heads = sizes["hidden"], sizes["neurons"], sizes["heads"]
    writer: Any = gguf.GGUFWriter(file, "qwen2moe" if shape else "llama")
    writer.add_context_length(65536)
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(sizes["key_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    if shape:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.expert_width)
        writer.add_expert_shared_feed_forward_length(shape.num_shared)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 0"])

    def matrix(name: str, *axes: int, kind: str = kind) -> None:
        data = _blocks(rng, axes[-1], kind)
        rows = int(np.prod(axes[:-1]))
        data = np.tile(data, (-(-rows // len(data)), 1))[:rows].reshape(*axes[:-1], -1)
        raw = None if kind == "f32" else gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=raw)

    keys = sizes["key_heads"] * hidden // heads
    matrix("token_embd", vocabulary, hidden, kind="q8_0" if kind != "bf16" else kind)
    matrix("output", vocabulary, hidden, kind="q8_0" if kind != "bf16" else kind)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(sizes["layers"]):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{at}{norm}.weight", np.ones(hidden, np.float32))
        matrix(f"{at}attn_q", hidden, hidden)
        matrix(f"{at}attn_k", keys, hidden)
        matrix(f"{at}attn_v", keys, hidden)
        matrix(f"{at}attn_output", hidden, hidden)
        if shape is None:
            _ffn(matrix, at, "", (), hidden, neurons)
            continue
        experts = (shape.num_experts,)
        matrix(f"{at}ffn_gate_inp", *experts, hidden, kind="f32")
        _ffn(matrix, at, "_exps", experts, hidden, shape.expert_width)
        _ffn(matrix, at, "_shexp", (), hidden, shape.num_shared)
        gate = np.zeros(hidden, np.float32)
        writer.add_tensor(f"{at}ffn_gate_inp_shexp.weight", gate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ffn(matrix: Any, at: str, end: str, experts: tuple, hidden: int, width: int) -> None:
    matrix(f"{at}ffn_gate{end}", *experts, width, hidden)
    matrix(f"{at}ffn_up{end}", *experts, width, hidden)
    matrix(f"{at}ffn_down{end}", *experts, hidden, width)


def _blocks(rng: np.random.Generator, columns: int, kind: str) -> np.ndarray:
    """64 random rows: bytes of the type, or float32."""
    values_RC = rng.standard_normal((64, columns), dtype=np.float32) / columns**0.5
    if kind == "f32":
        return values_RC
    if kind == "bf16":
        return (values_RC.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    blocks = rng.integers(0, 255, (64, columns // size, num_bytes), dtype=np.uint8)
    scale = np.array([1e-3] + [0.0] * (SCALES[kind] - 1), np.float16).view(np.uint8)
    blocks[..., : len(scale)] = scale
    return blocks.reshape(64, -1)
