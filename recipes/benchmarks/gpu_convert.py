"""A conversion on one GPU: seconds of a layer, many calibration tokens, the report, the tests.

    python recipes/benchmarks/gpu_convert.py MODEL --calibration TEXT --text FILE ... --out DIR

It runs the tests that want a GPU; converts two layers of a 7B shape with random weights, with few
tokens and with many; converts MODEL whole with as many as a GPU makes cheap, without and with
`--polish`; and reports on both, on the same device. Each step is a line of DIR/gpu_convert.jsonl at
once, so that what was measured stays if time runs out; what has not ended after `--minutes` is
stopped or left out, and said. Meant for SmolLM2-135M in 12 minutes of an H100. A CPU with tiny
sizes tries the script:

    ... --shape 135M --tokens 4096 --whole 4096 --eval-tokens 512
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import records
import scale
import torch
import typer

from moefy.checkpoint.resolve import resolve
from moefy.environment import processor

TESTS = scale.ROOT / "tests/convert/test_gpu.py"


def main(
    model: str,
    calibration: Path = typer.Option(...),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    shape: str = typer.Option("7B", help="Of the two layers; 135M for MODEL's own first two."),
    tokens: str = typer.Option("4096,262144", help="For these layers."),
    whole: int = typer.Option(1_000_448, help="Tokens for the whole model."),
    eval_tokens: int = 20480,
    polish: int = typer.Option(4, help="Passes over the tokens."),
    minutes: float = typer.Option(12, help="What has not ended by then is stopped."),
) -> None:
    """Measure what there is time for; a step that fails is a line as well."""
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], dict[str, Any]]] = {"tests": tests}
    for number in map(int, tokens.split(",")):
        steps[f"two layers of {shape}, {number} tokens"] = partial(
            layers, model, shape, calibration, number, out
        )
    for name, options in {"whole": (), "polished": ("--polish", polish)}.items():
        steps[f"{model} {name}, {whole} tokens"] = partial(
            convert, model, calibration, whole, out / name, options
        )
        steps[f"report of {name}"] = partial(report, text, eval_tokens, out / name)
    began = time.monotonic()
    for name, step in steps.items():
        start = time.monotonic()
        left = 60 * minutes - (start - began)
        result = tried(step, left) if left >= 1 else {"failed": "no time was left"}
        row = {"step": name, "seconds": round(time.monotonic() - start, 1), **result}
        records.append(out / "gpu_convert.jsonl", {**row, "device": device()})
        print(json.dumps(row), flush=True)


def tried(step: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a step gives within so many seconds, or the last line of why it failed."""

    def late(*_: object) -> None:
        raise TimeoutError("it took all the time that was left")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(int(seconds))
    try:
        return step()
    except (subprocess.CalledProcessError, SystemExit, OSError) as error:
        # pytest tells of a failure on standard output, moefy on the other.
        told = [getattr(error, name, "") for name in ("stdout", "stderr")]
        return {"failed": next(filter(None, [*told, str(error)])).strip().splitlines()[-1]}
    finally:
        signal.alarm(0)


def device() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def run(*command: object, **variables: str) -> str:
    """The output of a Python command."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **variables}
    )
    return done.stdout


def tests() -> dict[str, Any]:
    """The last line of those that want a GPU."""
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, MOEFY_TEST_GPU="1")
    return {"told": told.strip().splitlines()[-1]}


def layers(model: str, shape: str, calibration: Path, tokens: int, out: Path) -> dict[str, Any]:
    """Mean seconds of a layer by stage, what was planned, and the memory."""
    dense = resolve(model)
    settings: dict[str, Any] = {"calibration": str(calibration), "tokens": tokens, "layers": ":2"}
    if shape != scale.SMALL:
        size = scale.SIZES[shape]
        if not (out / shape).exists():
            part = out / f"{shape}.part"
            shutil.rmtree(part, ignore_errors=True)
            scale.make(part, dense, size, 2)
            part.rename(out / shape)
        dense, settings["sequence_length"] = out / shape, size.length
    else:
        settings["target"] = "moefy"
    told = scale.measured(dense, out / "layers", settings, None)
    rows = told["summary"]["layers"]
    stages = {
        stage: round(sum(row["stage_seconds"][stage] for row in rows) / len(rows), 3)
        for stage in rows[0]["stage_seconds"]
    }
    return {
        "stage_seconds": stages,
        "layer_seconds": round(sum(stages.values()), 2),
        "tokens": count(told["summary"]),
        "seconds_of_all": told["wall"],
        "planned_seconds_of_all": told["plan"]["seconds"],
        "planned_device_bytes": told["plan"]["device_bytes"],
        "device_bytes": told.get("gpu_bytes", 0),
        "peak_bytes": told["peaks"]["VmHWM"],
    }


def convert(
    model: str, calibration: Path, tokens: int, out: Path, more: Sequence[object]
) -> dict[str, Any]:
    """Seconds of a whole conversion by `moefy convert`, and its shape."""
    options = ("--calibration", calibration, "--tokens", tokens, "--force", "--quiet", *more)
    run("-m", "moefy", "convert", model, out, *options)
    told = json.loads((out / "moefy/conversion.json").read_text())
    facts = {name: told[name] for name in ("shape", "memory")}
    return {"tokens": count(told), "stages": told["seconds"], **facts}


def count(summary: dict[str, Any]) -> int:
    """The calibration tokens that a conversion had: fewer than asked for of a short text."""
    return summary["calibration"]["sequences"] * summary["calibration"]["sequence_length"]


def report(text: list[Path], eval_tokens: int, out: Path) -> dict[str, Any]:
    """dNLL and KL on each text, and the speeds, by `moefy report`."""
    texts = [word for file in text for word in ("--text", file)]
    options = ("--tokens", eval_tokens, "--no-robustness", "--no-llama-cpp", "--quiet")
    run("-m", "moefy", "report", out, *texts, *options)
    told = json.loads((out / "moefy/report.json").read_text())
    scores = {
        name: {label: [row["dnll"], row["kl"]] for label, row in rows.items()}
        for name, rows in told["texts"].items()
    }
    return {"dnll_kl": scores, "speed": told.get("speed")}


if __name__ == "__main__":
    typer.run(main)
