"""What a fine-tune recovers against the tokens it has seen: dNLL on texts it never sees.

    python recipes/benchmarks/recovery.py RUN --data TEXT --text FILE --text FILE --out FILE \
        --set tokens=N

RUN is trained as `moefy finetune` trains it. It is scored before, behind the last step, and at
halves, quarters and so on of the tokens. Every score is a line of FILE. What lies between is of one
schedule that has not ended yet: a training of only so many tokens may end lower, but not where
`--set schedule=constant` keeps the rates. `--at TOKENS` adds a score.

With `--dense` the dense model that RUN was made of is trained instead, and compared with itself as
it was. It is the control of copies (recipes/guide/upcycling.md): at equal tokens, at equal
computation (N times the ratio of GFLOPs in `moefy convert --plan`), and at equal time (N times the
ratio of both `tokens_per_second`). These are of training alone with

    --halvings 0 --set measure_every=0

`--without-layers 10,11` trains the dense model less those layers instead, as RUN is trained: by
the same losses, against the whole dense model. `moefy report --rivals` names the layers that cost
least.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import records
import typer

from moefy.checkpoint.cut import open_cut, without
from moefy.config.finetune import Settings, build
from moefy.config.layer_names import chosen_layers
from moefy.config.presets import COPIES, own_defaults
from moefy.config.recipe import Recipe
from moefy.convert.prepare import read_source
from moefy.environment import processor
from moefy.evaluate.metrics import compare
from moefy.finetune import teacher
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.checks import check_machine, check_run
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

UNLIKE = ("preset", "answers", "last_stage", "hidden", "anneal", "refit_after", "log_every")
"""Settings that must be as they are by default."""


def main(
    run: Path,
    data_source: list[str] = typer.Option(..., "--data"),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    settings: list[str] = typer.Option([], "--set"),
    halvings: int = 8,
    at: list[int] = typer.Option([], help="Score after so many tokens, too."),
    eval_tokens: int = 20480,
    control: bool = typer.Option(False, "--dense", help="Train the dense model of RUN instead."),
    without_layers: str = typer.Option("", help="The same, less these layers."),
) -> None:
    """Train, score along the way, and print the curve."""
    parent = open_run(run)
    by_text_alone = control or (parent.copies and not without_layers)
    control = control or bool(without_layers)
    flags = {"data": data_source, "tokens": Settings.tokens}
    own = COPIES if by_text_alone else own_defaults(parent.recipe)
    chosen = build(None, flags, settings, own=own)
    folder, digests = teacher_folder(parent, chosen)
    if unlike := [key for key in UNLIKE if getattr(chosen, key) != getattr(Settings, key)]:
        raise typer.BadParameter(f"{unlike[0]} is for `moefy finetune` alone")
    check_machine(chosen)
    check_run(parent, chosen)
    source = read_source(Recipe(model=str(folder)))
    layers = chosen_layers(without_layers, source.num_layers) if without_layers else []
    name, active = run.name, parent.summary["shape"]["active_fraction"]
    if control:
        name = f"dense model of {run.name}" + f" without layers {without_layers}" * bool(layers)
        active = 1 - len(layers) / source.num_layers
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
    points |= {round(number / tokens_per_step(chosen, 1)) for number in at}
    student: Any = None
    print(f"{computed.student.name}, {processor()}")
    out.parent.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        nonlocal student
        dtype = computed.student.dtype
        if control:
            student = open_cut(without(source.checkpoint, source.family, layers), dtype=dtype)
        else:
            student = load_student(parent, chosen, dtype)
        return student

    def score(step: int, seen: dict[str, Any]) -> None:
        was_training = student.training
        student.eval()
        results = {n: compare(dense, {"student": student}, w) for n, w in windows.items()}
        student.train(was_training)
        row = {
            "run": name,
            "active": active,
            "tokens": step * tokens_per_step(chosen, 1),
            **{key: seen.get(key) for key in ("tokens_per_second", "seconds", "load_cv", "dead")},
            "dtype": computed.student.name,
            "processor": processor(),
            "dnll": {n: f["student"].nll - f["dense"].nll for n, f in results.items()},
            "kl": {n: f["student"].kl for n, f in results.items()},
            "top1": {n: f["student"].agreement for n, f in results.items()},
        }
        records.append(out, row)
        dnll = " ".join(f"{stem} {value:.3f}" for stem, value in row["dnll"].items())
        print(f"{row['tokens']:>12,} tokens: dNLL {dnll}", flush=True)

    def seen(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] in points:
            score(row["step"], row)

    load().to(device(chosen))
    score(0, {})
    targets: Any = None
    if chosen.kl and chosen.teacher_cache:
        cached = teacher.cache_name(digests, tokens.sha256, chosen, computed.teacher.name)
        file = Path(chosen.teacher_cache) / cached
        targets = teacher.cached(file, lambda: dense, tokens.ids_BT, chosen)
    elif chosen.kl:
        targets = teacher.live(dense, chosen)
    with tempfile.TemporaryDirectory(dir=out.parent) as home:
        trained = train(
            Student(load, copies=parent.copies and not control),
            tokens,
            chosen,
            Checkpoints(Path(home)),
            teacher=teacher.Teacher(targets),
            callbacks=Callbacks(log=seen),
        )
    summary = {"settings": vars(chosen), "validation": trained.validation, "guard": trained.guard}
    summary |= {"tokens": trained.tokens, "seconds": trained.seconds, "routing": trained.routing}
    out.with_suffix(".control.json" if control else ".json").write_text(json.dumps(summary))
    print(f"{trained.tokens_per_second:.0f} tokens/s with the scores, guard: {trained.guard}")


if __name__ == "__main__":
    typer.run(main)
