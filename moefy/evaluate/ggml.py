"""A model in llama.cpp's types: the type that each matrix gets, its bytes, and its rounding.

The types are those that llama.cpp's own quantisation chooses (`src/llama-quant.cpp`, November 2026)
without an importance matrix, except that it treats 70B models of Llama in a way of their own.
Judged by llama.cpp's own files, of a dense model in all six types and of one with 8 experts down to
q4_K_M: each tensor has the same type and bytes and, where rows are not permuted, the same values.
Types smaller than q2_K need an importance matrix, so there are none. Rounding is by its library,
which `xllamacpp` holds; `gguf` turns the blocks into values again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moefy.errors import MoefyError
from moefy.models import routing

TYPES = {
    "q8_0": "Q8_0",
    "q6_K": "Q6_K",
    "q5_K_M": "Q5_K",
    "q4_K_M": "Q4_K",
    "q3_K_M": "Q3_K",
    "q2_K": "Q2_K",
}
"""Types of files, the largest first, and the type that most of their matrices have."""

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The type of a matrix whose rows are no multiple of the 256 weights of a block."""

MISSING = "it needs xllamacpp and gguf; run: pip install 'moefy[rivals]'"

ROLES = {
    "value": r"(v_proj|value|qkv_proj|c_attn|query_key_value|Wqkv)\.weight$",
    "key": r"(k_proj|key)\.weight$",
    "attention": r"(o_proj|out_proj|attn\.c_proj|attention\.dense|self_attn\.dense)\.weight$",
    "down": r"(down_proj|down_proj\.weight|(mlp\.c_proj|dense_4h_to_h|fc2|fc_out)\.weight)$",
}
"""The matrices that some types of files round less, by a pattern of their parameters' names."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that is quantised."""

    name: str
    values: Tensor
    """With rows that are multiplied with the input: (..., columns)."""
    role: str
    """A key of `ROLES`, "head", or "" for any other."""
    number: int
    """Of the layer, or for values of those that have one."""
    of: int
    """How many there are."""


def matrices(model: Any, *, routers: bool = False) -> list[Matrix]:
    """What llama.cpp quantises: not norms, biases, routers, and tables of positions.

    With `routers`, these as well: what a careless program would do.
    """
    blocks = () if routers else routing.moe_blocks(model)
    left_out = [p for block in blocks for p in block.router.parameters()]
    vocabulary, head = model.get_input_embeddings(), model.get_output_embeddings()
    head = vocabulary if head is None or head.weight is vocabulary.weight else head
    seen, num_layers = {*map(id, left_out)}, model.config.get_text_config().num_hidden_layers
    result, num_values = [], 0
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}"
            positions = isinstance(module, nn.Embedding) and module is not vocabulary
            flat = sum(size > 1 for size in parameter.shape) < 2
            if flat or positions or re.search("norm|bias", name) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            values = parameter.data.T if isinstance(module, Conv1D) else parameter.data
            roles = (role for role, pattern in ROLES.items() if re.search(pattern, name))
            role = "head" if parameter is head.weight else next(roles, "")
            number = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
            if role == "value":
                number, num_values = num_values, num_values + 1
            result.append(Matrix(name, values, role, number, num_layers))
    counts = {"value": num_values}
    return [Matrix(**{**vars(m), "of": counts.get(m.role, num_layers)}) for m in result]


def types(model: Any, kind: str, *, routers: bool = False) -> list[tuple[Matrix, str]]:
    """Each matrix of a model and the type that it has in a file of the type `kind`."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    experts = max((block.num_experts for block in routing.moe_blocks(model)), default=0)
    return [
        (matrix, _type(matrix, kind, group, experts)) for matrix in matrices(model, routers=routers)
    ]


def _type(matrix: Matrix, kind: str, group: int, experts: int) -> str:
    import gguf

    usual, number, of = TYPES[kind], matrix.number, matrix.of
    columns = matrix.values.shape[-1]

    def fits(name: str) -> bool:
        return columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] == 0

    some = number < of // 8 or number >= 7 * of // 8 or (number - of // 8) % 3 == 2
    finer = dict.fromkeys(("q4_K_M", "q5_K_M"), "Q6_K") if some else {}
    rules: dict[str, Mapping[str, str]] = {
        "value": finer
        | {"q3_K_M": "Q5_K" if number < 2 else "Q4_K", "q2_K": "Q4_K" if group >= 4 else "Q3_K"},
        "down": finer | {"q3_K_M": "Q5_K" if number < of // 16 else "Q4_K", "q2_K": "Q3_K"},
        "attention": {"q3_K_M": "Q4_K", "q2_K": "Q3_K"},
        "head": dict.fromkeys([*TYPES][1:], "Q6_K" if fits(usual) else "Q8_0"),
    }
    if experts == 8:  # as Mixtral has: the little that all tokens share is rounded less
        rules["value"] = rules["key"] = dict.fromkeys(TYPES, "Q8_0")
        rules["attention"] = dict.fromkeys(("q4_K_M", "q3_K_M", "q2_K"), "Q5_K")
    chosen = rules.get(matrix.role, {}).get(kind, usual)
    chosen = chosen if fits(chosen) else FALLBACK.get(chosen, "F16")
    return chosen if fits(chosen) else "F16"


def packed_bytes(model: Any, kind: str) -> dict[int, int]:
    """Bytes of each parameter in a file of the type `kind`, by its `data_ptr()`.

    What is not quantised is in 32 bits.
    """
    import gguf

    result = {p.data_ptr(): 4 * p.numel() for p in model.parameters()}
    for matrix, name in types(model, kind):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        result[matrix.values.data_ptr()] = matrix.values.numel() // block * size
    return result


def counted(model: Any, kind: str) -> dict[str, int]:
    """How many weights have each type in a file of the type `kind`."""
    counts: Counter[str] = Counter()
    for matrix, name in types(model, kind):
        counts[name] += matrix.values.numel()
    return dict(counts.most_common())


def quantise(model: Any, kind: str, *, routers: bool = False) -> Any:
    """The model with the values that it has in a file of the type `kind`, changed in place."""
    rounding = library()
    for matrix, name in types(model, kind, routers=routers):
        matrix.values.copy_(rounded(matrix.values, name, rounding))
    return model


def rounded(values: Tensor, name: str, rounding: Any) -> Tensor:
    """`values` after a round trip through ggml's type `name`."""
    import gguf
    import numpy as np

    if name == "F16":
        return values.half()
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = values.shape[-1]
    rows_RC = values.float().reshape(-1, columns).contiguous().numpy()
    packed_RB = np.empty((len(rows_RC), columns // block * size), np.uint8)
    pointers = rows_RC.ctypes.data, packed_RB.ctypes.data
    written = rounding(int(kind), *pointers, 0, *rows_RC.shape, None)
    assert written == packed_RB.nbytes, "ggml counts the bytes of its blocks as gguf does"
    return torch.from_numpy(gguf.quants.dequantize(packed_RB, kind)).reshape(values.shape)


def library() -> Any:
    """`ggml_quantize_chunk` of llama.cpp's library.

    Raises:
        MoefyError: code 5, if it or gguf is not installed.
    """
    missing: Sequence[str] = [n for n in ("xllamacpp", "gguf") if not importlib.util.find_spec(n)]
    if missing:
        raise MoefyError(f"{' and '.join(missing)} is not installed; {MISSING}", code=5)
    spec = importlib.util.find_spec("xllamacpp")
    places = (spec and spec.submodule_search_locations) or []
    files = [str(f) for place in places for f in Path(place).glob("xllamacpp*.so")]
    try:
        function = ctypes.CDLL(files[0] if files else None).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        reason = f"xllamacpp holds no ggml_quantize_chunk ({error}); {MISSING}"
        raise MoefyError(reason, code=5) from error
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    function.argtypes += [ctypes.c_void_p]
    return function
