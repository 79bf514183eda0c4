"""A fine-tune against its controls at equal tokens: static, cross-entropy, the dense model.

    python recipes/benchmarks/finetune.py RUN STATIC --data TEXT --text FILE --text FILE --out DIR

RUN and STATIC are conversions of one dense model. What is trained or scored already, in DIR, is not
done again; a training that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import records
import typer
from scores import chosen_dtype, scores, stored_model
from transformers import AutoModelForCausalLM

from moefy.checkpoint.resolve import resolve
from moefy.compute_dtype import name_of
from moefy.config.finetune import Settings, build
from moefy.environment import processor
from moefy.evaluate.candidates import load_model
from moefy.files.shards import stored_dtype
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.home import NOT_OF_A_RUN
from moefy.finetune.inputs import compute_dtypes, open_run, teacher_folder, write_text
from moefy.finetune.run import finetune
from moefy.finetune.text import read_text
from moefy.finetune.train import Callbacks, Student, slower
from moefy.finetune.train import train as train_model
from moefy.progress import watching
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows

CHANGES: dict[str, dict[str, Any]] = {
    "ours": {"ce": 0.0},
    "static": {"ce": 0.0},
    "cross-entropy": {"kl": 0.0, "ce": 1.0},
    "both": {"kl": 1.0, "ce": 1.0},
    "static-both": {"kl": 1.0, "ce": 1.0},
    "dense-trained": {"kl": 0.0, "ce": 1.0, "router_z": 0.0},
}
"""What is trained, and how its settings differ. The dense model is trained at a tenth of the
rates: it has nothing to recover, and the others' rates would only harm it."""


def main(
    run: Path,
    static: Path,
    data_source: str = typer.Option(..., "--data"),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    only: str = typer.Option("", help="Names to train, comma-separated; all if empty."),
    settings: list[str] = typer.Option([], "--set"),
    eval_tokens: int = 20480,
    train: bool = typer.Option(True, help="Train what is missing."),
    score: bool = typer.Option(True, help="Score what is there."),
    compute_dtype: str = typer.Option("auto", help="What is scored in; for training, by --set."),
) -> None:
    """Train and score what is missing, then print the table."""
    out.mkdir(parents=True, exist_ok=True)
    cache = str(out / "cache")
    flags = {"data": data_source, "tokens": Settings.tokens, "teacher_cache": cache}
    chosen = [name for name in CHANGES if not only or name in only.split(",")]
    for name in chosen if train else []:
        if (out / name).exists():
            continue
        built = build(None, {**flags, **CHANGES[name]}, settings)
        with watching(quiet=False) as watch:
            if name == "dense-trained":
                tune_dense(run, out / name, built, watch)
            else:
                source = static if name.startswith("static") else run
                finetune(source, out / name, built, watch=watch)
    if score:
        folders = {"ours, before": run, "static, before": static}
        folders |= {name: out / name for name in CHANGES if (out / name).is_dir()}
        source = resolve(open_run(run).recipe.model)
        score_all(folders, source, text, out, compute_dtype, eval_tokens)
    print(markdown(out, eval_tokens))


def tune_dense(run: Path, out: Path, settings: Settings, watch: Callable[..., None]) -> None:
    """Train the dense model itself on the same tokens, and save it."""
    parent = open_run(run)
    folder, digests = teacher_folder(parent, settings)
    dtype = compute_dtypes(parent, None, settings).student.dtype
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=dtype)
    write = partial(write_text, folder, settings, dtype)
    tokens = read_text(parent, settings, 1, write, watch)
    home = out.with_name(f".{out.name}.moefy-finetune")
    home.mkdir(exist_ok=True)
    changed = {name: value for name, value in vars(settings).items() if name not in NOT_OF_A_RUN}
    trained = train_model(
        Student(load),
        tokens,
        slower(settings, 10),
        Checkpoints(home, {"text": tokens.sha256, "teacher": digests, **changed}),
        callbacks=Callbacks(progress=watch),
    )
    trained.model.save_pretrained(out)
    summary = {
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "rate": trained.tokens_per_second,
    }
    (out / "training.json").write_text(json.dumps({**summary, "validation": trained.validation}))
    shutil.rmtree(home)


def score_all(
    folders: dict[str, Path], source: Path, texts: list[Path], out: Path, asked: str, tokens: int
) -> None:
    """Score each model on each text, one at a time and all in one dtype, and record it."""
    compute = chosen_dtype(asked, source)
    log = out / "scores.jsonl"
    (out / "cache").mkdir(exist_ok=True)
    known = {
        (row["model"], row["text"], row["asked"])
        for row in records.read(log)
        if row.get("dtype", name_of(stored_dtype(source))) == compute.name
    }
    tokenizer = load_tokenizer(source)
    for path in texts:
        windows = text_windows(tokenizer, path, num_tokens=tokens, length=1024)
        left = {n: f for n, f in folders.items() if (n, path.stem, tokens) not in known}
        for name, folder in left.items():
            file = out / "cache" / f"dense-{path.stem}-{tokens}.pt"
            start = time.process_time()
            dense = stored_model(source, file, windows, compute.dtype)
            row = {
                "model": name,
                "text": path.stem,
                "asked": tokens,
                "dtype": compute.name,
                "processor": processor(),
                **scores(load_model(folder, compute.dtype), dense, windows),
                "cpu_seconds": round(time.process_time() - start, 1),
            }
            records.append(log, row)
            print(f"{name} on {path.stem}: {cell(row)}", flush=True)


def cell(row: dict[str, Any]) -> str:
    """Perplexity, loss and divergence of a model on a text."""
    return f"{row['perplexity']:.2f}, dNLL {row['dnll']:.3f}, KL {row['kl']:.3f}"


def markdown(out: Path, num_tokens: int) -> str:
    """dNLL of every model on every text, and the share of a conversion's loss that is recovered."""
    rows = {
        (row["model"], row["text"]): row
        for row in records.read(out / "scores.jsonl")
        if row["asked"] == num_tokens
    }
    texts = sorted({text for _, text in rows})
    lines = []
    for model in dict.fromkeys(model for model, _ in rows):
        cells = []
        for text in texts:
            row = rows.get((model, text))
            cells.append(cell(row) if row else "")
            start = "static, before" if model.startswith("static") else "ours, before"
            before = rows.get((start, text))
            if row and before and model in CHANGES and model != "dense-trained":
                cells[-1] += f"; **{1 - row['dnll'] / before['dnll']:.0%}** recovered"
        lines.append([model, *cells])
    dense = {text: row["dense_perplexity"] for (_, text), row in rows.items()}
    lines.append(["dense, not trained", *(f"{dense[text]:.2f}" for text in texts)])
    return records.table(["model", *texts], lines)


if __name__ == "__main__":
    typer.run(main)
