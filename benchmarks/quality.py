"""Quality at several active fractions: ours against dense and the controls, over seeds.

    python benchmarks/quality.py MODEL --calibration FILE --text FILE --text FILE --out DIR

Every finished (active, seed, method) is one line of DIR/quality.jsonl; a second run continues.
Models are evaluated in the dtype they are stored in, dense ones alike.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import torch
import typer

from moefy import data
from moefy.convert import calibration_tokens, convert
from moefy.evaluate.controls import changed, control_jobs, controls, load_model
from moefy.evaluate.run import standard_error
from moefy.evaluate.text import compare
from moefy.job import prepare
from moefy.recipe import Recipe


def main(
    model: str,
    calibration: str = typer.Option(...),
    text: list[Path] = typer.Option(...),
    out: Path = typer.Option(...),
    active: str = "0.75,0.5,0.25",
    seeds: str = "0,1,2",
    methods: str = "ours,static,random router,oracle router,static; no refit",
    tokens: int = 16384,
    eval_tokens: int = 20480,
    table: bool = False,
) -> None:
    """Fill in what is missing in the table, then print it (`--table`: only print it).

    A method is "ours", a control, or settings: `partition=weights refit=false`.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "quality.jsonl"
    wanted = [
        (float(fraction), int(seed), method.strip().replace(";", ","))
        for method in methods.split(",")
        for seed in seeds.split(",")
        for fraction in active.split(",")
    ]
    for fraction, seed, method in [] if table else wanted:
        if (fraction, seed, method) in {(r["active"], r["seed"], r["method"]) for r in rows(log)}:
            continue
        recipe = Recipe(model, active=fraction, seed=seed, calibration=calibration, tokens=tokens)
        record = measure(recipe, method, text, out, eval_tokens)
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps({k: v for k, v in record.items() if k != "layers"}), flush=True)
    print(markdown(rows(log)))


def measure(recipe: Recipe, method: str, texts: list[Path], out: Path, num_tokens: int) -> dict:
    """Convert by one method and score the result on every text."""
    ours = prepare(recipe)
    known = {"ours": recipe, **controls(recipe)}
    chosen = known[method] if method in known else changed(recipe, method)
    job = control_jobs(recipe, {method: chosen})[method]
    start = time.perf_counter()
    folder = out / f"{recipe.active}-{recipe.seed}-{method.replace(' ', '_').replace(',', '')}"
    summary = convert(job, folder, tokens=calibration_tokens(ours, lambda *_: None), force=True)
    seconds = time.perf_counter() - start
    tokenizer = data.load_tokenizer(ours.checkpoint.folder)
    models = {method: load_model(folder)}
    scores = {}
    for path in texts:
        windows = data.text_windows(tokenizer, path, num_tokens=num_tokens, length=1024)
        kept = out / f"dense-logits-{path.stem}-{num_tokens}.pt"
        found = compare(remembered(ours.checkpoint.folder, kept, windows), models, windows)
        score, base = found[method], found["dense"]
        scores[path.stem] = {
            "dense_perplexity": base.perplexity,
            "perplexity": score.perplexity,
            "dnll": score.nll - base.nll,
            "dnll_standard_error": standard_error(score, base),
            "kl": score.kl,
            "top1": score.agreement,
            "tokens": score.num_tokens,
        }
    shutil.rmtree(folder)
    return {
        "active": recipe.active,
        "seed": recipe.seed,
        "method": method,
        "shape": str(ours.shape),
        "convert_seconds": round(seconds, 1),
        "peak_bytes": summary["peak_resident_bytes"],
        "scores": scores,
        "layers": summary["layers"],
    }


def remembered(folder: Path, file: Path, windows: list[torch.Tensor]):
    """A function from a window to the dense model's log-probabilities on it.

    The dense model's logits are kept in `file`, in the dtype it computes them in.
    """
    if not file.exists():
        dense = load_model(folder)
        with torch.inference_mode():
            kept = [dense(w[None], use_cache=False).logits[0, :-1].clone() for w in windows]
        torch.save(kept, file)
    logits = dict(zip(map(id, windows), torch.load(file, mmap=True), strict=True))

    def log_probabilities(ids_T: torch.Tensor) -> torch.Tensor:
        return logits[id(ids_T)].float().log_softmax(-1)

    return log_probabilities


def rows(log: Path) -> list[dict]:
    """The records measured so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def markdown(records: list[dict]) -> str:
    """Mean over seeds, and their standard deviation where there are several."""
    if not records:
        return "nothing measured yet"
    texts = list(records[0]["scores"])
    lines = [
        "| active | method | seeds | " + " | ".join(f"{t}: ppl, dNLL, KL" for t in texts) + " |"
    ]
    lines.append("|" + "---|" * (3 + len(texts)))
    keys = sorted({(r["active"], r["method"]) for r in records}, key=lambda key: (-key[0], key[1]))
    for active, method in keys:
        group = [r for r in records if (r["active"], r["method"]) == (active, method)]
        cells = []
        for text in texts:
            found = [r["scores"][text] for r in group]
            dnll = [score["dnll"] for score in found]
            spread = f" ± {statistics.stdev(dnll):.3f}" if len(dnll) > 1 else ""
            perplexity = statistics.fmean(score["perplexity"] for score in found)
            kl = statistics.fmean(score["kl"] for score in found)
            cells.append(f"{perplexity:.2f}, {statistics.fmean(dnll):.3f}{spread}, {kl:.3f}")
        lines.append(f"| {active} | {method} | {len(group)} | " + " | ".join(cells) + " |")
    dense = {t: records[0]["scores"][t]["dense_perplexity"] for t in texts}
    lines.append("| 1.0 | dense | | " + " | ".join(f"{dense[t]:.2f}, 0, 0" for t in texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
