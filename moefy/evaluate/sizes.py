"""Sizes of a model: parameters, operations, weights, cache and peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.compute_dtype import name_of
from moefy.errors import MoefyError
from moefy.models import routing
from moefy.models.load import open_model, runnable

PROBE = 32
"""Tokens in the measured cache: fewer than any sliding window."""

PREFILL, DECODE = 512, 8
"""Tokens read and written during the measurement of the peak."""


def sizes(
    model: Any, stored: torch.dtype, packed: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """Parameters, FLOPs per token, and bytes of a loaded model.

    Bytes count the `stored` dtype, whatever dtype the model was loaded in, or what `packed` says of
    a parameter, by its `data_ptr()`. FLOPs count two operations for each active weight of a
    product, the head included; the embedding and the products of attention, which grow with the
    context, are left out. `bytes_read` is what one token reads at batch 1: weights that are always
    on, the experts that are chosen, and one row of an embedding that is not the head. The cache is
    measured after a few tokens, so a recurrent state counts as if it grew.
    """
    parameters = {p.data_ptr(): p for p in model.parameters()}.values()
    total = sum(p.numel() for p in parameters)
    vocabulary = model.get_input_embeddings().weight

    def num_bytes(tensor: Tensor) -> int:
        if packed and tensor.data_ptr() in packed:
            return packed[tensor.data_ptr()]
        size = stored.itemsize if tensor.dtype == vocabulary.dtype else tensor.element_size()
        return tensor.numel() * size

    ids_1T = torch.arange(PROBE, device=model.device)[None] % vocabulary.shape[0]
    with torch.inference_mode(), routing.recorded(model) as seen:
        cache = model(ids_1T, use_cache=True, logits_to_keep=1).cache
    idle, idle_bytes, expected = 0, 0, {}
    for block in routing.moe_blocks(model):
        count, chosen = block.num_experts, seen[block.layer][0].shape[1]
        weights = sum(p.numel() for p in block.experts.parameters())
        idle += weights * (count - chosen) // count
        idle_bytes += sum(map(num_bytes, block.experts.parameters())) * (count - chosen) // count
        expected[block.layer] = (weights, count, chosen)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == vocabulary.data_ptr()
    active, weight_bytes = total - idle, sum(map(num_bytes, parameters))
    embedding_bytes = 0 if tied else num_bytes(vocabulary)
    return {
        "class": type(model).__name__,
        "parameters_total": total,
        "parameters_active": active,
        "flops_per_token": 2 * (active - (0 if tied else vocabulary.numel())),
        "weight_bytes": weight_bytes,
        "weight_bytes_active": weight_bytes - idle_bytes,
        "embedding_bytes": embedding_bytes,
        "bytes_read": weight_bytes
        - idle_bytes
        - embedding_bytes
        + embedding_bytes // vocabulary.shape[0],
        "experts": [*next(iter(expected.values()))[1:]] if expected else None,
        "kv_bytes_per_token": sum(map(num_bytes, _tensors(cache))) // PROBE,
        "dtype": name_of(stored),
        "longest": getattr(model.config.get_text_config(), "max_position_embeddings", None),
        "vocabulary": vocabulary.shape[0],
    }


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a cache, whatever kind its layers are."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, depth)
    elif depth < 3 and hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _tensors(part, depth + 1)


def ideals(
    sizes: Mapping[str, Mapping[str, Any]], batches: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The speed relative to dense that arithmetic and memory traffic allow, by label.

    Prefill is bound by operations: FLOPs of dense over own. Decoding is bound by the weights that
    one step reads: those that are always on, and 1 - (1 - K/E)^B of the experts for a batch of B,
    on average, if tokens choose evenly and independently.
    """
    dense = next(iter(sizes.values()))
    result = {}
    for label, own in sizes.items():
        decode = {
            str(batch): _read_bytes(dense, batch) / _read_bytes(own, batch) for batch in batches
        }
        prefill = dense["flops_per_token"] / own["flops_per_token"]
        result[label] = {"prefill": prefill, "decode": decode}
    return result


def _read_bytes(sizes: Mapping[str, Any], batch: int) -> float:
    """Bytes of weights that one decoding step of a batch reads."""
    fixed = sizes["weight_bytes"] - sizes["embedding_bytes"]
    if not sizes["experts"]:
        return fixed
    count, chosen = sizes["experts"]
    idle = sizes["weight_bytes"] - sizes["weight_bytes_active"]
    routed = idle * count / (count - chosen) if count > chosen else 0
    return fixed - routed * (1 - chosen / count) ** batch


def peak_bytes(folder: Path, dtype: str, device: torch.device, threads: int = 1) -> int:
    """Peak memory of loading a model in `dtype`, reading 512 tokens and writing 8.

    Measured in a process of its own, less what Python and the libraries take before; of a GPU, what
    torch holds there.

    Raises:
        MoefyError: code 5, when that process fails.
    """
    process = subprocess.run(
        [sys.executable, "-m", "moefy.evaluate.sizes", str(folder), dtype, str(device)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ
        | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        | {"OMP_NUM_THREADS": str(threads)},
    )
    try:
        return int(json.loads(process.stdout.splitlines()[-1])["peak"])
    except (ValueError, LookupError):
        last = (process.stderr.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        raise MoefyError(
            f"peak memory of {folder} was not measured: {last[:200]}", code=5
        ) from None


def _resident(name: str) -> int:
    """Resident bytes of this process: now (`VmRSS`), or the peak so far (`VmHWM`).

    `getrusage` is the second choice: its peak of a child includes that of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if name in fields:
            return 1024 * int(fields[name].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main(folder: str, dtype: str, device: str) -> None:
    before = _resident("VmRSS")
    model = runnable(open_model(Path(folder), dtype=dtype)[0].eval()).to(device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_1T = torch.arange(PREFILL, device=device)[None] % vocabulary
    with torch.inference_mode():
        out = model(ids_1T, use_cache=True, logits_to_keep=1)
        for _ in range(DECODE):
            token_11 = out.logits[:, -1:].argmax(-1)
            out = model(token_11, cache=out.cache, use_cache=True)
    peak = _resident("VmHWM") - before
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
