"""Seconds, memory, and what is predicted of them, of converting models of four sizes.

    python recipes/benchmarks/scale.py main [--out DIR] [--sizes 135M,7B,32B,70B] [--tokens 4096]

Of SmolLM2-135M the whole is converted, of the larger ones two layers of random weights: then only
memory and time mean anything, and those of the whole model are extrapolated. The calibration text
is this repository's. Every size runs in a process of its own, whose memory is looked at from
outside.

The floor is what a layer's matrix products, factorisations and triangular solves alone would take:
their operations over the speed of products of the same kind, which are timed in the same process
before the first layer and behind each. Other programs beside this one slow both.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moefy.checkpoint.resolve import resolve
from moefy.config.recipe import build
from moefy.convert.estimate import estimate, operations
from moefy.convert.prepare import Job, prepare
from moefy.environment import processor
from moefy.files.publish import write_json
from moefy.files.shards import CODES, ShardWriter, Slot

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Size:
    """A dense llama: hidden size, FFN neurons, attention heads, those of keys, and layers."""

    hidden: int
    neurons: int
    heads: int
    key_heads: int
    layers: int
    tokens: int
    """To calibrate on, unless asked otherwise. Few, so that a layer takes minutes at most."""
    length: int


SIZES = {
    "7B": Size(4096, 11008, 32, 32, 32, 4096, 512),
    "32B": Size(5120, 27648, 40, 8, 64, 2048, 256),
    "70B": Size(8192, 28672, 64, 8, 80, 2048, 256),
}
SMALL = "135M"
app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[
        Path | None, typer.Option(help="Folder to work in, else a temporary one.")
    ] = None,
    small: Annotated[str, typer.Option(help="SmolLM2-135M.")] = "demo",
    sizes: str = ",".join([SMALL, *SIZES]),
    tokens: Annotated[int | None, typer.Option(help="To calibrate on, at every size.")] = None,
    num_layers: Annotated[int, typer.Option(help="Of the larger ones.")] = 2,
    convert: Annotated[str, typer.Option(help="Layers to convert, as `--layers`.")] = ":",
    memory: Annotated[str | None, typer.Option(help="As `--memory`.")] = None,
) -> None:
    """Print a table for every size."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        text = Path(folder) / "text.txt"
        text.write_text(own_text(), encoding="utf-8")
        for name in sizes.split(","):
            dense = resolve(small) if name == SMALL else Path(folder) / name
            settings = {"calibration": str(text), "tokens": tokens or 4096, "layers": convert}
            if name != SMALL:
                make(dense, resolve(small), SIZES[name], num_layers)
                settings |= {"sequence_length": SIZES[name].length}
                settings |= {"tokens": tokens or SIZES[name].tokens}
            result = measured(dense, Path(folder) / "moe", settings, memory)
            print("\n".join(table(name, result)), flush=True)


def own_text() -> str:
    """The texts and sources of this repository, one behind the other."""
    files = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted(ROOT.glob("moefy/**/*.py"))]
    return "\n\n\n".join(file.read_text(encoding="utf-8") for file in files)


def make(folder: Path, other: Path, size: Size, num_layers: int) -> None:
    """Write a dense checkpoint of random weights with the tokenizer of another."""
    folder.mkdir()
    for file in other.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((other / "config.json").read_text())["vocab_size"]
    keys = size.hidden // size.heads * size.key_heads
    table = (vocabulary, size.hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for part, rows in {"q": size.hidden, "k": keys, "v": keys, "o": size.hidden}.items():
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, size.hidden)
        shapes |= {
            f"{prefix}mlp.{n}_proj.weight": (size.neurons, size.hidden) for n in ("gate", "up")
        }
        shapes[prefix + "mlp.down_proj.weight"] = (size.hidden, size.neurons)
        shapes[prefix + "input_layernorm.weight"] = (size.hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (size.hidden,)
    shapes |= {"model.norm.weight": (size.hidden,), "lm_head.weight": table}
    writer = ShardWriter(folder, {n: Slot(CODES[torch.bfloat16], s) for n, s in shapes.items()})
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 2:
            tensor.normal_(std=shape[1] ** -0.5, generator=generator)
        writer.write(name, tensor)
    writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.neurons,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "num_hidden_layers": num_layers,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)


def measured(
    dense: Path, out: Path, settings: dict[str, Any], memory: str | None
) -> dict[str, Any]:
    """Convert in a process of its own; give what that tells, and the memory that it was seen with.

    Anonymous pages are what a process holds; pages of files are the system's to take back.
    """
    text = json.dumps({"model": str(dense), **settings})
    command = [sys.executable, __file__, "one", text, str(out), "--memory", memory or ""]
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            while run.poll() is None:
                for key, value in resident(run.pid):
                    peaks[key] = max(peaks.get(key, 0), value)
                time.sleep(0.02)
        except TimeoutError:
            run.kill()
            raise
        assert run.stdout
        if run.returncode:
            raise SystemExit(run.returncode)
        return json.loads(run.stdout.read()) | {"peaks": peaks}


def resident(process: int) -> Iterator[tuple[str, int]]:
    """Resident bytes of a process by kind, and the most there were."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return
    for key, value in re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status):
        yield key, 1024 * int(value)


@app.command()
def one(settings: str, out: Path, memory: str = "") -> None:
    """Convert one model and print, as JSON, what it took beside the floor."""
    from moefy.cli.shared import quiet_libraries
    from moefy.config.recipe import num_bytes
    from moefy.convert.run import convert
    from moefy.convert.session import Attempt

    quiet_libraries()
    limit = num_bytes(memory, "--memory") if memory else None
    job = prepare(build(None, json.loads(settings), []))
    plan = estimate(job, limit)
    speeds: dict[str, list[float]] = {}
    of_the_floor = 0.0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal of_the_floor
        if stage.endswith("attention"):  # between two layers
            began = time.perf_counter()
            for kind, speed in products(job).items():
                speeds.setdefault(kind, []).append(speed)
            of_the_floor += time.perf_counter() - began

    start = time.perf_counter()
    summary = convert(job, out, Attempt(force=True, memory=limit), watch=watch)
    seconds = time.perf_counter() - start - of_the_floor
    rates = {kind: statistics.median(values) for kind, values in speeds.items()}
    floor = {
        stage: sum(count / rates[kind] for kind, count in counts.items())
        for stage, counts in operations(job).items()
    }
    result = {"plan": plan, "floor": floor, "rates": rates, "wall": seconds}
    if job.device.type == "cuda":
        result["gpu_bytes"] = torch.cuda.max_memory_allocated()
    result |= {"summary": summary, "threads": torch.get_num_threads(), "processor": processor()}
    json.dump(result, sys.stdout)


def products(job: Job, most: int = 4096) -> dict[str, float]:
    """Operations per second of a product, a factorisation and a triangular solve, of up to `most`
    neurons of the FFN."""
    hidden, neurons, rows = job.size("hidden_size"), min(job.shape.num_neurons, most), 2048
    x_TD, w_FD = (torch.rand(n, hidden, device=job.device) for n in (rows, neurons))
    product = timed(lambda: x_TD @ w_FD.T)
    gram_FF = w_FD @ w_FD.T
    gram_FF.diagonal().add_(float(gram_FF.trace()))
    factor_FF = torch.linalg.cholesky_ex(gram_FF)[0]
    factor = timed(lambda: torch.linalg.cholesky_ex(gram_FF))
    solve = timed(lambda: torch.linalg.solve_triangular(factor_FF, w_FD, upper=False))
    return {
        "product": 2 * rows * hidden * neurons / product,
        "factor": neurons**3 / 3 / factor,
        "solve": neurons**2 * hidden / solve,
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call, the first of which warms up."""
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(name: str, result: dict[str, Any]) -> list[str]:
    """The lines that tell of one size."""
    summary, plan, floor, peaks = (result[key] for key in ("summary", "plan", "floor", "peaks"))
    layers, calibration = summary["layers"], summary["calibration"]
    tokens = calibration["sequences"] * calibration["sequence_length"]
    spent = {
        stage: statistics.fmean(layer["stage_seconds"][stage] for layer in layers)
        for stage in layers[0]["stage_seconds"]
    }
    whole, least = sum(spent.values()), sum(floor.values())
    rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in result["rates"].items())
    device = summary["machine"]["device"]
    device = result["processor"] if device == "cpu" else device
    lines = [
        f"\n## {name}: {plan['shape']['num_neurons']} neurons, {tokens} tokens, "
        f"{result['threads']} thread(s), {device}\n",
        "| stage | s per layer | floor | ratio |\n|---|---:|---:|---:|",
    ]
    for stage, seconds in spent.items():
        ratio = f"{floor[stage]:.2f} | {seconds / floor[stage]:.2f}" if stage in floor else "|"
        lines.append(f"| {stage} | {seconds:.2f} | {ratio} |")
    lines.append(f"| **layer** | **{whole:.2f}** | **{least:.2f}** | **{whole / least:.2f}** |\n")
    other = ", ".join(f"{k} {v:.1f}" for k, v in summary["seconds"].items() if k != "total")
    lines.append(f"floor at 10^9 operations per second: {rates}")
    lines.append(f"seconds in all {summary['seconds']['total']:.1f}: {other} (with the floor's)")
    wall = result["wall"]
    lines.append(f"planned: {plan['seconds']:.0f} s in all; it took {wall:.0f} without the floor's")
    lines.append(
        f"peak memory {peaks['VmHWM'] / 1e9:.2f} GB (held {peaks['RssAnon'] / 1e9:.2f}, pages of "
        f"files {peaks['RssFile'] / 1e9:.2f}), planned {plan['memory_bytes'] / 1e9:.2f} for "
        f"{plan['memory_stage']}: {plan['memory_bytes'] / peaks['VmHWM']:.2f} of it"
    )
    if "gpu_bytes" in result:
        lines.append(f"peak memory of the GPU {result['gpu_bytes'] / 1e9:.2f} GB")
    if plan["file_bytes"]:
        lines.append(f"states in files of {plan['file_bytes'] / 1e9:.2f} GB")
    if name in SIZES:
        count = SIZES[name].layers
        lines.append(f"extrapolated: {count} layers of this shape {whole * count / 60:.0f} min")
    return lines


if __name__ == "__main__":
    app()
