"""A fine-tune on one GPU: what eight million tokens recover, how fast, and where the time goes.

    python recipes/benchmarks/gpu.py MODEL --data TEXT --text FILE --text FILE --text FILE --out DIR

It converts MODEL at a half by 16,384 tokens, or takes the conversion `--run RUN`; tries a few steps
of each batch size, as they are and with compiled layers; profiles one step; trains with the fastest
batch, by steps of 16,384 tokens; and prints one table. Each measurement is a line of
DIR/gpu.jsonl at once. Meant for SmolLM2-135M in 12 minutes of an H100. A CPU with tiny sizes tries
the script:

    ... --tokens 4096 --step-tokens 512 --batches 1,2 --trial-steps 3 --eval-tokens 512
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import records
import recovery
import torch
import typer
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from moefy.config.finetune import Settings, build
from moefy.config.presets import own_defaults
from moefy.environment import processor
from moefy.finetune import teacher
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.collapse_guard import CollapseGuard
from moefy.finetune.inputs import (
    Run,
    compute_dtypes,
    load_student,
    load_teacher,
    open_run,
    teacher_folder,
)
from moefy.finetune.router_hooks import Routing
from moefy.finetune.train import arguments, device
from moefy.finetune.trainer import Finetuner, Setup, rows

GPU = torch.cuda.is_available()
OPERATIONS = 12
"""Of the profile that are written, the longest ones."""


class Watch(TrainerCallback):
    """Seconds of each step, split at the update; a profile of the last step."""

    def __init__(self, steps: int) -> None:
        self.compute: list[float] = []
        self.update: list[float] = []
        self.steps, self.profile = (
            steps,
            profile(activities=[*ProfilerActivity.__members__.values()]),
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock, and before the last step the profile."""
        if state.global_step == self.steps - 1:
            self.profile.start()
        self.began = now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Forward and back are done."""
        self.compute.append(now() - self.began)
        self.began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The weights are updated."""
        self.update.append(now() - self.began)
        if state.global_step == self.steps:
            self.profile.stop()


def now() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most that tensors took on the GPU, or this process on a CPU so far."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trial(run: Run, dense: Any, settings: Settings, steps: int, compiled: bool) -> dict[str, Any]:
    """Speed, memory and a profile of a few steps on random ids; what broke, if it did."""
    size, length = settings.batch_size, settings.sequence_length
    settings = dataclasses.replace(
        settings,
        tokens=steps * size * length,
        gradient_accumulation_steps=1,
        measure_every=0,
        guard_restarts=0,
    )
    record: dict[str, Any] = {"batch_size": size, "compiled": compiled}
    computed = compute_dtypes(run, None, settings)
    model = load_student(run, settings, computed.student.dtype).to(device(settings))
    routing = Routing(model, settings, copies=run.copies)
    if compiled:
        for layer in model.get_submodule(run.layer.partition(".{layer}")[0]):
            layer.compile()  # as `--compile` does
    ids_BT = torch.randint(run.vocab_size, (steps * size, length))
    watch = Watch(steps)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            settings,
            routing,
            CollapseGuard(settings),
            teacher.Teacher(teacher.live(dense, settings)),
            Checkpoints(Path(folder)),
        )
        options = arguments(settings, Path(folder)).set_save("no")
        trainer = Finetuner(setup, model=model, args=options, train_dataset=rows(ids_BT))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        try:
            trainer.train()
        except Exception as error:  # a compiler's, or too little memory
            return record | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    compute, update = (statistics.median(one[1:-1]) for one in (watch.compute, watch.update))
    began = now()
    setup.teacher.targets(torch.arange(size), ids_BT[:size].to(device(settings)))
    return record | {
        "tokens_per_second": size * length / (compute + update),
        "compute_seconds": compute,
        "teacher_seconds": now() - began,
        "update_seconds": update,
        "first_step_seconds": watch.compute[0],
        "peak_bytes": peak_bytes(),
        "operations": operations(watch.profile),
    }


def operations(done: profile) -> list[tuple[str, int, float]]:
    """The operations of a step that took longest: names, calls and milliseconds of the device."""
    name = "self_device_time_total" if GPU else "self_cpu_time_total"
    rows = sorted(done.key_averages(), key=lambda row: -getattr(row, name))[:OPERATIONS]
    return [(row.key, row.count, getattr(row, name) / 1e3) for row in rows]


def converted(model: Path, calibration: str, out: Path, settings: list[str]) -> float:
    """Convert at a half by 16,384 tokens, or as the settings say; give the seconds that it took."""
    began = time.perf_counter()
    words = [
        word for setting in ["active=0.5", "tokens=16384", *settings] for word in ("--set", setting)
    ]
    command = [sys.executable, "-m", "moefy", "convert", model, out, "--calibration", calibration]
    subprocess.run([*map(str, command), "--quiet", *words], check=True)
    return time.perf_counter() - began


def main(
    model: Path,
    data: str = typer.Option(..., help="Text to train on, and to calibrate with."),
    text: list[Path] = typer.Option(..., help="Texts to score on."),
    out: Path = typer.Option(..., help="Folder for the records, and the conversion."),
    run: Path | None = typer.Option(None, help="A conversion of MODEL; made without."),
    tokens: int = 8_192_000,
    step_tokens: int = 16_384,
    batches: str = "16,32,64",
    trial_steps: int = 12,
    compile_layers: bool = True,
    eval_tokens: int = 8192,
    convert_settings: list[str] = typer.Option([], "--convert-set"),
    settings: list[str] = typer.Option([], "--set"),
) -> None:
    """Convert, try, profile, train; print a table."""
    out.mkdir(parents=True, exist_ok=True)
    file, began = out / "gpu.jsonl", time.perf_counter()
    where = torch.cuda.get_device_name() if GPU else processor()
    base = {"device": where, "torch": torch.__version__, "model": model.name}

    def keep(kind: str, record: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - began, 1)
        records.append(file, {"kind": kind, **base, "at_seconds": seconds, **record})

    if run is None:
        run = out / "run"
        shutil.rmtree(run, ignore_errors=True)
        keep("conversion", {"seconds": converted(model, data, run, convert_settings)})
    parent = open_run(run)
    chosen = build(
        None, {"data": [data], "tokens": tokens}, settings, own=own_defaults(parent.recipe)
    )
    folder, _ = teacher_folder(parent, chosen)
    dense = load_teacher(folder, chosen, compute_dtypes(parent, folder, chosen).teacher.dtype)
    tried = []
    for size in map(int, batches.split(",")):
        for compiled in (False, True) if compile_layers else (False,):
            torch.compiler.reset()
            asked = dataclasses.replace(chosen, batch_size=size)
            tried.append(trial(parent, dense, asked, trial_steps, compiled))
            keep("trial", tried[-1])
            print(f"batch {size}, compiled {compiled}: {shown(tried[-1])}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    del dense
    whole = [t for t in tried if "failed" not in t]
    most = max(1, step_tokens // chosen.sequence_length)
    fitting = [t for t in whole if t["batch_size"] <= most] or whole
    best = max(fitting, key=lambda t: t["tokens_per_second"])
    print(f"\nOne step of batch {best['batch_size']}, milliseconds of the device:")
    print(
        records.table(
            ["operation", "calls", "ms"], [(a, b, f"{c:.1f}") for a, b, c in best["operations"]]
        )
    )
    size = best["batch_size"]
    accumulate = max(1, most // size)
    words = [f"tokens={tokens}", f"batch_size={size}", f"gradient_accumulation_steps={accumulate}"]
    words += ["compile=true"] * best["compiled"]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    curve = out / "curve.jsonl"
    curve.unlink(missing_ok=True)
    recovery.main(
        run,
        data_source=[data],
        text=text,
        out=curve,
        settings=[*settings, *words],
        halvings=0,
        at=[],
        eval_tokens=eval_tokens,
        control=False,
        without_layers="",
    )
    before, *_, after = records.read(curve)
    keep("training", {"before": before, "after": after, "peak_bytes": peak_bytes()})
    print("\n" + table(before, after, tried, where))
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def shown(one: dict[str, Any]) -> str:
    """A trial in words."""
    if "failed" in one:
        return one["failed"]
    return (
        f"{one['tokens_per_second']:,.0f} tokens/s, {one['peak_bytes'] / 1e9:.1f} GB, "
        f"teacher {one['teacher_seconds'] / one['compute_seconds']:.0%} of forward and back, "
        f"update {one['update_seconds'] * 1e3:.0f} ms"
    )


def table(
    before: dict[str, Any], after: dict[str, Any], tried: list[dict[str, Any]], where: str
) -> str:
    """All figures, the goals of the fine-tune beside those that have one."""
    rows: list[tuple[str, ...]] = [("device", where, "")]
    for name in before["dnll"]:
        dnll, kl = ([one[key][name] for one in (before, after)] for key in ("dnll", "kl"))
        rows.append((f"dNLL, {name}", f"{dnll[0]:.3f}", f"{dnll[1]:.3f}"))
        rows.append((f"KL, {name}", f"{kl[0]:.3f}", f"{kl[1]:.3f} ({1 - kl[1] / kl[0]:.0%} back)"))
    rows.append(("tokens", "0", f"{after['tokens']:,}"))
    rows.append(("tokens a second, training", "", f"{after['tokens_per_second']:,.0f}"))
    for one in tried:
        name = f"trial, batch {one['batch_size']}{', compiled' * one['compiled']}"
        rows.append((name, "", shown(one)))
    return records.table(["", "before", "after"], rows)


if __name__ == "__main__":
    typer.run(main)
