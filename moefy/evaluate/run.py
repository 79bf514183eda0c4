"""Measure a finished run against its dense model and its controls."""

from __future__ import annotations

import json
import pydoc_data.topics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy import __version__, data, families
from moefy.errors import MoefyError
from moefy.evaluate.controls import (
    CHANGED,
    MEANING,
    SHOWN,
    calibration_tokens,
    changed,
    control_jobs,
    controls,
    load_model,
    make_control,
)
from moefy.evaluate.text import Score, compare
from moefy.job import Watch
from moefy.publish import write_json, write_text
from moefy.recipe import Recipe, read
from moefy.report import report_page
from moefy.source import resolve

PROMPT = "The main reason why the sea is salty is that"


def evaluate(
    run: Path,
    texts: list[Path],
    *,
    dense: str | None = None,
    num_tokens: int = 8192,
    length: int = 1024,
    with_controls: bool = True,
    against: Sequence[str] = (),
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Score dense, converted and control models on `texts`; write `report.json` and `report.md`.

    Without texts, the standard library's own manual and sources are read. All models run in the
    dtype they are stored in, on the CPU. The controls, and the methods `against` which the run is
    to be held (see `changed`), are converted anew with the run's own calibration tokens, and
    deleted.

    Raises:
        MoefyError: code 2 when a method cannot be, code 3 when `run` is no whole run of moefy, or a
            text is too short.
    """
    summary = open_run(run)
    if "ForCausalLM" not in families.load(summary["family"]).tasks:
        raise MoefyError(
            f"{summary['family']} has no next-token perplexity on plain text, by which models are "
            "compared here; what each layer lost is in moefy/conversion.md",
            code=4,
        )
    recipe = Recipe(**read(run / "moefy" / "recipe.toml"))
    others = controls(recipe) if with_controls else {}
    others = {name: other for name, other in others.items() if name in SHOWN}
    others |= {changes: changed(recipe, changes) for changes in against}
    jobs = control_jobs(recipe, others)
    source = resolve(dense or recipe.model, revision=recipe.revision)
    tokenizer = data.load_tokenizer(source)
    with tempfile.TemporaryDirectory(prefix=".moefy-report-", dir=run.resolve().parent) as place:
        paths = texts or _own_texts(Path(place))
        stems = [path.stem for path in paths]
        windows = {
            path.stem if stems.count(path.stem) == 1 else str(path): data.text_windows(
                tokenizer, path, num_tokens=num_tokens, length=length
            )
            for path in paths
        }
        models: dict[str, Any] = {"moe": load_model(run)}
        tokens = calibration_tokens(run, summary)
        for name, job in jobs.items():
            out = Path(place) / str(len(models))
            models[name] = make_control(job, out, tokens, _named(watch, name))
        reference = load_model(source)
        scores = {
            name: compare(reference, models, parts, watch=_on(watch, name))
            for name, parts in windows.items()
        }
        report = {
            "moefy": __version__,
            "run": summary,
            "controls": {name: MEANING.get(name, CHANGED) for name in jobs},
            "texts": {name: _rows(rows) for name, rows in scores.items()},
            "seen_in_calibration": {
                name: data.overlap(tokens.ids_BT, parts) for name, parts in windows.items()
            },
            "generation": {
                "prompt": PROMPT,
                "dense": continuation(reference, tokenizer, PROMPT),
                "moe": continuation(models["moe"], tokenizer, PROMPT),
            },
        }
    write_text(run / "moefy" / "report.md", report_page(report))
    write_json(run / "moefy" / "report.json", report)
    return report


def open_run(run: Path) -> dict[str, Any]:
    """The conversion report of a finished run.

    Raises:
        MoefyError: code 3, when the folder holds none.
    """
    file = run / "moefy" / "conversion.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MoefyError(
            f"{run} is not a whole run of moefy (no readable {file.name} in its moefy/ folder); "
            "expected a folder that `moefy convert` wrote"
        ) from None


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 32) -> str:
    """What a model writes after `prompt`, greedily, on one line."""
    ids_1T = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return " ".join(tokenizer.decode(out[0, ids_1T.shape[1] :], skip_special_tokens=True).split())


def standard_error(score: Score, dense: Score) -> float | None:
    """Standard error of the mean difference in NLL from dense, over several windows (paired)."""
    tokens_W = torch.tensor(score.tokens_W, dtype=torch.float64)
    difference_W = torch.tensor(score.nll_W, dtype=torch.float64)
    difference_W -= torch.tensor(dense.nll_W, dtype=torch.float64)
    count = len(tokens_W)
    if count < 2:
        return None
    residual_W: Tensor = difference_W - tokens_W * (difference_W.sum() / tokens_W.sum())
    return float(residual_W.square().sum().mul(count / (count - 1)).sqrt() / tokens_W.sum())


def _rows(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    dense = scores["dense"]
    return {
        name: {
            "perplexity": score.perplexity,
            "dnll": score.nll - dense.nll,
            "dnll_standard_error": standard_error(score, dense),
            "kl": score.kl,
            "top1_agreement": score.agreement,
            "tokens": score.num_tokens,
        }
        for name, score in scores.items()
    }


def _own_texts(place: Path) -> list[Path]:
    """Prose and code that every Python carries: its manual's topics, and a few of its modules."""
    manual = place / "python-manual.txt"
    write_text(manual, "\n\n\n".join(pydoc_data.topics.topics.values()))
    library = Path(pydoc_data.__file__).parent.parent
    modules = [library / name for name in ("argparse.py", "csv.py", "textwrap.py", "heapq.py")]
    code = place / "python-library.txt"
    write_text(code, "\n\n\n".join(path.read_text("utf-8") for path in modules if path.is_file()))
    return [manual, code]


def _named(watch: Watch, name: str) -> Watch:
    return lambda stage, done, total: watch(f"{name}: {stage}", done, total)


def _on(watch: Watch, name: str) -> Any:
    return lambda done, total: watch(f"evaluate on {name}", done, total)
