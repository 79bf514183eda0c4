"""What a fine-tune recovers against the tokens it has seen: dNLL on texts it never sees.

    python recipes/benchmarks/recovery.py RUN --data TEXT --text FILE --text FILE --out FILE \
        --set tokens=N

RUN is trained as `moefy finetune` trains it, and scored before, behind the last step, and at
halves, quarters and so on of the tokens. Every score is a line of FILE. What lies between is of one
schedule that has not ended yet: a training of only so many tokens may end lower.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import records
import typer

from moefy.config.finetune import build
from moefy.environment import processor
from moefy.evaluate.metrics import compare
from moefy.finetune import teacher
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.inputs import (
    compute_dtypes,
    load_student,
    load_teacher,
    open_run,
    teacher_folder,
    write_text,
)
from moefy.finetune.text import read_text
from moefy.finetune.train import Callbacks, Student, device, num_steps, tokens_per_step, train
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows


def main(
    run: Path,
    data_source: str = typer.Option(..., "--data"),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    settings: list[str] = typer.Option([], "--set"),
    halvings: int = 8,
    eval_tokens: int = 20480,
) -> None:
    """Train, score along the way, and print the curve."""
    parent = open_run(run)
    chosen = build(None, {"data": data_source}, settings)
    folder, _ = teacher_folder(parent, chosen)
    computed = compute_dtypes(parent, folder, chosen)
    dense = load_teacher(folder, chosen, computed.teacher.dtype)
    write = partial(write_text, folder, chosen, computed.teacher.dtype)
    tokens = read_text(parent, chosen, 1, write, lambda *_: None)
    tokenizer = load_tokenizer(folder)
    windows = {
        path.stem: text_windows(tokenizer, path, num_tokens=eval_tokens, length=1024)
        for path in text
    }
    steps = num_steps(chosen, 1)
    points = {-(-steps // 2**halving) for halving in range(halvings + 1)}
    student: Any = None
    print(f"{computed.student.name}, {processor()}")
    out.parent.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        nonlocal student
        student = load_student(parent, chosen, computed.student.dtype)
        return student

    def score(step: int, rate: float | None) -> None:
        was_training = student.training
        student.eval()
        results = {n: compare(dense, {"student": student}, w) for n, w in windows.items()}
        student.train(was_training)
        row = {
            "run": run.name,
            "active": parent.summary["shape"]["active_fraction"],
            "tokens": step * tokens_per_step(chosen, 1),
            "tokens_per_second": rate,
            "dtype": computed.student.name,
            "processor": processor(),
            "dnll": {n: f["student"].nll - f["dense"].nll for n, f in results.items()},
            "kl": {n: f["student"].kl for n, f in results.items()},
            "top1": {n: f["student"].agreement for n, f in results.items()},
        }
        records.append(out, row)
        dnll = " ".join(f"{name} {value:.3f}" for name, value in row["dnll"].items())
        print(f"{row['tokens']:>12,} tokens: dNLL {dnll}", flush=True)

    def seen(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] in points:
            score(row["step"], row["tokens_per_second"])

    load().to(device(chosen))
    score(0, None)
    targets = teacher.live(dense, chosen) if chosen.kl else None
    with tempfile.TemporaryDirectory(dir=out.parent) as home:
        trained = train(
            Student(load, copies=parent.copies),
            tokens,
            chosen,
            Checkpoints(Path(home)),
            teacher=teacher.Teacher(targets),
            callbacks=Callbacks(log=seen),
        )
    summary = {"settings": vars(chosen), "validation": trained.validation, "guard": trained.guard}
    summary |= {"tokens": trained.tokens, "seconds": trained.seconds, "routing": trained.routing}
    out.with_suffix(".json").write_text(json.dumps(summary))
    print(f"{trained.tokens_per_second:.0f} tokens/s with the scores, guard: {trained.guard}")


if __name__ == "__main__":
    typer.run(main)
