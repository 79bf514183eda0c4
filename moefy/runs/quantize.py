"""A GGUF file of 16-bit weights as one of fewer bits, by the `gguf` package's own rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WRITTEN_ANEW = ("general.architecture", "general.file_type")


def pack(source: Path, out: Path, kind: str) -> None:
    """Write a copy of `source` whose 16-bit matrices are in blocks of `kind`, such as q4_0.

    What the converter keeps in 32 bits (norms, biases, routers) stays so, and the head, or the
    embedding in its place, gets 8 bits: there rounding costs most. One tensor is in memory at a
    time.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    block = gguf.GGMLQuantizationType[kind.upper()]
    reader = gguf.GGUFReader(source)
    writer = _copied(reader, out, gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    types = _types(reader, block)
    for tensor in reader.tensors:
        shape, kind_out = tensor.shape.tolist()[::-1], types[tensor.name]
        values, size = gguf.GGML_QUANT_SIZES[kind_out]
        # The dtype only says that the shape counts weights, not bytes.
        num_bytes = tensor.n_elements // values * size
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes, kind_out)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        kind_out, data = types[tensor.name], tensor.data
        if kind_out != tensor.tensor_type:
            data = quantize(dequantize(data, tensor.tensor_type), kind_out)
        writer.write_tensor_data(data)
    writer.close()


def _types(reader: Any, block: Any) -> dict[str, Any]:
    """The type that each tensor gets, by its name."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    stored = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    head = "output.weight" if "output.weight" in stored else "token_embd.weight"
    packed = {name: block for name, kind in stored.items() if kind in (kinds.F16, kinds.BF16)}
    return {**stored, **packed, head: kinds.Q8_0}


def _copied(reader: Any, out: Path, file_type: int) -> Any:
    """A writer to `out` that has all of the reader's metadata, and this file type."""
    import gguf

    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in WRITTEN_ANEW:
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    writer.add_key_value("general.file_type", int(file_type), gguf.GGUFValueType.UINT32)
    return writer
