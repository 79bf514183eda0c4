"""Speed of MoE folders in vLLM against the dense model that they were made from.

    python recipes/benchmarks/vllm_speed.py DENSE MOE... --python .venv-vllm/bin/python

`make test-engines` builds that environment. Each measurement is a process of its own; every round
measures all models in turn, and the ratio to dense is taken within the round; medians over rounds
are printed. Models are compiled, as vLLM does by default: the first round takes minutes longer, and
`--eager` slows decoding down, a MoE more than a dense model.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from statistics import median

import records
import typer

from moefy.environment import processor

WORKER = Path(__file__).with_name("vllm_worker.py")


def main(
    dense: Path,
    moes: list[Path],
    python: Path = typer.Option(..., help="Interpreter that has vLLM."),
    prefill: int = typer.Option(512, help="Tokens of the prompt that is timed."),
    steps: int = typer.Option(64, help="Decode steps that are timed."),
    repeats: int = typer.Option(3, help="Of each timing within a process."),
    rounds: int = 3,
    threads: int = 1,
    dtype: str = "bfloat16",
    eager: bool = typer.Option(False, "--eager", help="Do not compile."),
    cache_mib: int = typer.Option(1024, help="Memory for keys and values."),
    batches: list[int] = typer.Option([1, 8], "--batch", help="Sequences that decode at a time."),
) -> None:
    """Print tokens per second in decode and prefill, and the ratios to dense."""
    options = {"dtype": dtype, "eager": eager, "cache_mib": cache_mib}
    options |= {"prefill": prefill, "steps": steps, "repeats": repeats, "batches": batches}
    turns = []
    for turn in range(rounds):
        typer.echo(f"round {turn + 1} of {rounds}", err=True)
        turns.append([measure(python, threads, folder, options) for folder in (dense, *moes)])
    mode = "eager" if eager else "compiled"
    print(f"vLLM, {mode}, {dtype}, {threads} thread(s), {processor()}: tokens/s (ratio)")
    print()
    print(table([folder.name for folder in (dense, *moes)], turns))


def measure(python: Path, threads: int, folder: Path, options: dict) -> dict[str, float]:
    """Tokens per second by task, from a new process."""
    # Not bound to cores: a second benchmark would be bound to the same ones.
    limits = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [str(python), str(WORKER), json.dumps({"folder": str(folder), **options})]
    run = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | limits
    )
    return json.loads(run.stdout)


def table(names: list[str], turns: list[list[dict[str, float]]]) -> str:
    """A Markdown table of medians over turns; the first model of each turn is the dense one."""
    tasks = list(turns[0][0])
    rows = []
    for place, name in enumerate(names):
        cells = []
        for task in tasks:
            speed = median(turn[place][task] for turn in turns)
            ratio = median(turn[place][task] / turn[0][task] for turn in turns)
            cells.append(f"{speed:.1f} ({ratio:.2f})")
        rows.append([name, *cells])
    return records.table(["model", *tasks], rows)


if __name__ == "__main__":
    typer.run(main)
