"""Quality at several active fractions: ours against dense, the controls and published methods.

    python recipes/benchmarks/quality.py MODEL --calibration FILE --text FILE --text FILE --out DIR

Every finished (active, seed, method) is one line of DIR/quality.jsonl; a second run continues, and
several may work on one DIR. All models are evaluated in one dtype, that of `--compute-dtype`: a
line names it, and a DIR holds lines of one alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import records
import torch
import typer
from scores import chosen_dtype, scores, stored_model

from moefy.checkpoint.resolve import resolve
from moefy.compute_dtype import name_of
from moefy.config.methods import PARTS
from moefy.config.recipe import Recipe, build
from moefy.convert.prepare import prepare
from moefy.convert.run import calibration_tokens, convert
from moefy.convert.session import Attempt
from moefy.environment import processor
from moefy.errors import MoefyError
from moefy.evaluate.candidates import load_model
from moefy.files.shards import stored_dtype
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows

STATIC: dict[str, Any] = {"partition": "static", "layers": ":", "overlap": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, all layers": {"layers": ":"},
    "ours, dense layers": {"layers": "auto"},
    "ours, total 2": {"overlap": 2.0, "layers": ":"},
    "ours, total 2, dense layers": {"overlap": 2.0, "layers": "auto"},
    "ours, total 4": {"overlap": 4.0, "layers": ":"},
    "ours, total 4, dense layers": {"overlap": 4.0, "layers": "auto"},
    "static": STATIC,
    "static, refit without drift": {**STATIC, "drift": 0.0},
    "static, no refit": {**STATIC, "refit": False},
    "random router": {"router": "random"},
    "oracle router": {"router": "oracle"},
    "random router, dense layers": {"router": "random", "layers": "auto"},
    "oracle router, dense layers": {"router": "oracle", "layers": "auto"},
    "CMoE": {"method": "cmoe", "layers": ":"},
    "MoEfication": {"method": "moefication", "layers": ":"},
    "LLaMA-MoE v2": {"method": "llama-moe-v2", "layers": ":"},
    "ExpertWeaver": {"method": "expertweaver", "layers": ":"},
    "FLAP": {"method": "flap", "layers": ":", "overlap": 1.0},
}
"""What each changes in the recipe. "static" is what the others are compared with."""

WITH = " with "
"""Between a method's name and more settings: `ours with experts=40 shared_fraction=0.2`."""

USUAL = "ours,ours; all layers,ours; total 4; dense layers,static,random router,oracle router"
DRAWS = 10_000
"""Of windows, for an interval."""


def main(
    model: str,
    calibration: str = typer.Option(...),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    active: str = "0.875,0.75,0.625,0.5,0.25",
    seeds: str = "0,1,2",
    methods: str = typer.Option(USUAL, help="Of a name, `;` stands for its commas."),
    target: str = "auto",
    tokens: int = 32768,
    eval_tokens: int = 20480,
    quick: bool = typer.Option(False, help="One seed, 0.5 and few tokens: minutes."),
    keep: bool = typer.Option(False, help="Keep the converted models in DIR, each in a folder."),
    compute_dtype: str = "auto",
    table: bool = typer.Option(False, help="Only print the table."),
) -> None:
    """Fill in what is missing in the table, then print it."""
    if quick:
        active, seeds, tokens, eval_tokens = "0.5", "0", 8192, 4096
        methods = "ours,static"
    out.mkdir(parents=True, exist_ok=True)
    log = out / "quality.jsonl"
    points = [
        (float(fraction), int(seed), method.strip().replace(";", ","))
        for seed in seeds.split(",")
        for fraction in active.split(",")
        for method in methods.split(",")
    ]
    source = resolve(model)
    compute = chosen_dtype(compute_dtype, source)
    stored = name_of(stored_dtype(source))
    others = {row.get("dtype", stored) for row in records.read(log)} - {compute.name}
    if others and not table:
        raise MoefyError(
            f"{log} holds scores in {', '.join(others)}, these would be in {compute.name}; give "
            "another --out or that --compute-dtype",
            code=2,
        )
    for fraction, seed, method in [] if table else points:
        if (fraction, seed, method) in {
            (r["active"], r["seed"], r["method"]) for r in records.read(log)
        }:
            continue
        recipe = Recipe(
            model, active=fraction, seed=seed, calibration=calibration, tokens=tokens, target=target
        )
        record = measure(recipe, method, text, out, eval_tokens, compute.dtype, keep=keep)
        records.append(log, record)
        shown = {key: value for key, value in record.items() if key not in ("layers", "scores")}
        shown["dnll"] = {name: round(s["dnll"], 3) for name, s in record["scores"].items()}
        print(json.dumps(shown), flush=True)
    print(markdown(records.read(log)))


def measure(
    recipe: Recipe,
    method: str,
    texts: list[Path],
    out: Path,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> dict:
    """Convert by one method and score the result, in `dtype`, on every text."""
    name, _, more = method.partition(WITH)
    values = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in PARTS}
    chosen = build(None, {**values, **METHODS[name]}, more.split())
    if chosen.partition == "static":
        chosen = dataclasses.replace(chosen, target="auto")
    job = prepare(chosen, control=True)
    start = time.perf_counter()
    folder = out / f"{recipe.active}-{recipe.seed}-{method.replace(' ', '_').replace(',', '')}"
    tokens = calibration_tokens(job, lambda *_: None)
    summary = convert(job, folder, Attempt(force=True), tokens=tokens)
    seconds = time.perf_counter() - start
    tokenizer = load_tokenizer(job.checkpoint.folder)
    model = load_model(folder, dtype)
    by_text = {}
    for path in texts:
        windows = text_windows(tokenizer, path, num_tokens=num_tokens, length=1024)
        file = out / f"dense-logits-{path.stem}-{num_tokens}.pt"
        dense = stored_model(job.checkpoint.folder, file, windows, dtype)
        by_text[path.stem] = scores(model, dense, windows)
    if not keep:
        shutil.rmtree(folder)
    left_dense = summary["layers_left_dense"]
    share = summary["shape"]["active_fraction"]
    return {
        "active": recipe.active,
        "seed": recipe.seed,
        "method": method,
        "shape": {key: summary["shape"][key] for key in summary["shape"]},
        "dense_layers": left_dense,
        "active_of_all_layers": (len(left_dense) + (job.num_layers - len(left_dense)) * share)
        / job.num_layers,
        "parameters_dense": summary["parameters_dense"],
        "calibration_tokens": recipe.tokens,
        "dtype": name_of(dtype),
        "processor": processor(),
        "convert_seconds": round(seconds, 1),
        "peak_bytes": summary["peak_resident_bytes"],
        "scores": by_text,
        "layers": summary["layers"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and how much less is lost than with static pruning of the same seeds.

    Seeds whose static record is missing are left out of the comparison. The interval is 95 % of a
    bootstrap over windows, which all seeds and both methods share.
    """
    if not rows:
        return "nothing measured yet"
    texts = list(rows[0]["scores"])
    lines = []
    keys = sorted({(r["active"], r["method"]) for r in rows}, key=lambda key: (-key[0], key[1]))
    for active, method in keys:
        group = {r["seed"]: r for r in rows if (r["active"], r["method"]) == (active, method)}
        static = {r["seed"]: r for r in rows if (r["active"], r["method"]) == (active, "static")}
        cells = []
        for text in texts:
            seeds = [r["scores"][text] for r in group.values()]
            dnll = [score["dnll"] for score in seeds]
            spread = f" ± {statistics.stdev(dnll):.3f}" if len(dnll) > 1 else ""
            cell = (
                f"{statistics.fmean(s['perplexity'] for s in seeds):.2f}, "
                f"dNLL {statistics.fmean(dnll):.3f}{spread}, "
                f"KL {statistics.fmean(s['kl'] for s in seeds):.3f}, "
                f"top-1 {statistics.fmean(s['top1'] for s in seeds):.3f}"
            )
            both = [(group[s], static[s]) for s in sorted(group) if s in static]
            if method != "static" and both:
                least, middle, most = saving(both, text)
                cell += f"; **{middle:+.0%}** ({least:+.0%} to {most:+.0%})"
            cells.append(cell)
        lines.append([active, method, len(group), *cells])
    dense = {t: rows[0]["scores"][t]["dense_perplexity"] for t in texts}
    lines.append([1.0, "dense", "", *(f"{dense[text]:.2f}" for text in texts)])
    return records.table(["active", "method", "seeds", *texts], lines)


def saving(both: list[tuple[dict, dict]], text: str) -> tuple[float, float, float]:
    """dNLL of the first over that of the second, less one: 2.5 %, mean and 97.5 %."""
    ours_W, base_W = (
        torch.tensor([pair[place]["scores"][text]["window_dnll"] for pair in both]).double().sum(0)
        for place in (0, 1)
    )
    drawn = torch.randint(
        len(ours_W), (DRAWS, len(ours_W)), generator=torch.Generator().manual_seed(0)
    )
    ratio_R = ours_W[drawn].sum(1) / base_W[drawn].sum(1) - 1
    least, most = ratio_R.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return least, float(ours_W.sum() / base_W.sum()) - 1, most


if __name__ == "__main__":
    typer.run(main)
