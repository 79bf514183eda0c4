"""Benchmarks by lm-eval, with paired significance against the dense model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy import stats

from moefy.config.options import nearest
from moefy.errors import MoefyError
from moefy.evaluate.cache import digest
from moefy.files.publish import sha256

PREFERRED = ("acc", "exact_match", "acc_norm", "f1", "bits_per_byte", "word_perplexity")
"""The metric that is reported for a task, if it has one of these; else its first."""

DRAWS = 2000
"""Samples of the bootstrap."""


def check_tasks(tasks: Sequence[str], include: Path | None) -> Any:
    """lm-eval's task manager, which knows all of `tasks`.

    Raises:
        MoefyError: code 5 when lm-eval is not installed, 2 for a missing folder or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MoefyError("--tasks needs lm-eval; run: pip install 'moefy[eval]'", code=5)
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise MoefyError(f"--include-path {include} is no folder; expected one of tasks", code=2)
    own = TaskManager(include_path=str(include) if include else None, include_defaults=False)
    if set(tasks) <= set(own.all_tasks):
        return own
    known = TaskManager(include_path=str(include) if include else None)
    for task in tasks:
        if task not in known.all_tasks:
            close = nearest(task, own.all_tasks or known.all_tasks)
            raise MoefyError(f"unknown task {task!r} of --tasks; {close}", code=2)
    return known


def run_task(
    model: Any, tokenizer: Any, task: str, manager: Any, limit: int | None
) -> dict[str, Any]:
    """One task's scores by sample: {"metric": ..., "values": {id: value}, ...}.

    A value is a number, or a pair of a sum and the weight that divides it. A group of tasks is
    scored over all samples of its tasks.
    """
    import lm_eval
    from lm_eval.models import huggingface

    # Its classes are decorated in a way that type checkers do not understand.
    harness, models = cast(Any, lm_eval), cast(Any, huggingface)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        result = harness.simple_evaluate(
            model=models.HFLM(
                # Else likelihoods of a bfloat16 model are rounded to a multiple of 8.
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=1,
                softmax_dtype="float32",
            ),
            tasks=[task],
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    names = [name for name in result["samples"] if result["samples"][name]]
    metrics = list(result["samples"][names[0]][0]["metrics"])
    metric = next((name for name in PREFERRED if name in metrics), metrics[0])
    values = {
        f"{name}/{sample['doc_id']}": sample[metric]
        for name in names
        for sample in result["samples"][name]
    }
    direction = result["higher_is_better"].get(names[0], {}).get(metric, True)
    return {"metric": metric, "values": values, "higher_is_better": direction}


def compared(own: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """A model's row of a task: its value, and the paired difference from the dense model.

    Right-or-wrong samples are compared by McNemar's exact test, all others by a bootstrap over the
    samples.
    """
    metric = own["metric"]
    pairs, theirs = (_pairs(scores, sorted(own["values"])) for scores in (own, dense))
    value, base = (float(_score(metric, *array.sum(0))) for array in (pairs, theirs))
    row = {
        "metric": metric,
        "value": value,
        "standard_error": _standard_error(metric, pairs),
        "samples": len(pairs),
        "higher_is_better": own["higher_is_better"],
    }
    if own is dense:
        return row
    return row | {"difference": value - base, "p_value": _p_value(metric, pairs, theirs)}


def _p_value(metric: str, own: np.ndarray, theirs: np.ndarray) -> float:
    if (own[:, 1] == 1).all() and np.isin(np.concatenate([own, theirs])[:, 0], (0, 1)).all():
        won = int((own[:, 0] > theirs[:, 0]).sum())
        lost = int((own[:, 0] < theirs[:, 0]).sum())
        return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    drawn = _bootstrap(metric, own) - _bootstrap(metric, theirs)
    # The share of draws on the other side of no difference, both ways; never below one draw.
    side = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return float(min(1.0, max(2 * side, 1 / DRAWS)))


def _pairs(scores: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Values and weights of the samples, in the order of `names`."""
    if sorted(scores["values"]) != list(names):
        raise MoefyError("lm-eval scored other samples of dense than of the run", code=3)
    rows = [scores["values"][name] for name in names]
    pairs = [row if isinstance(row, list | tuple) else (row, 1.0) for row in rows]
    return np.array(pairs, dtype=float)


def _score(metric: str, total: Any, weight: Any) -> Any:
    """A metric of summed values and weights; likelihoods are in nats.

    >>> round(_score("bits_per_byte", -math.log(2), 1.0), 3)
    1.0
    """
    mean = total / weight
    if metric in ("perplexity", "word_perplexity", "byte_perplexity"):
        return np.exp(-mean)
    return -mean / math.log(2) if metric == "bits_per_byte" else mean


def _bootstrap(metric: str, pairs: np.ndarray) -> np.ndarray:
    """The metric over draws of the samples; the same draws for every model."""
    draws = np.random.default_rng(0).integers(0, len(pairs), (DRAWS, len(pairs)))
    return _score(metric, *pairs[draws].sum(1).T)


def _standard_error(metric: str, pairs: np.ndarray) -> float | None:
    if len(pairs) < 2:
        return None
    if (pairs[:, 1] == 1).all() and metric != "perplexity":
        return float(pairs[:, 0].std(ddof=1) / math.sqrt(len(pairs)))
    return float(_bootstrap(metric, pairs).std())


def content(task: str, manager: Any) -> str:
    """Digest of a local task: its settings and its data files."""
    entry: Any = getattr(manager, "task_index", {}).get(task)
    path = getattr(entry, "yaml_path", None) or (entry or {}).get("yaml_path")
    if not path or not Path(path).is_file():
        return ""
    text = Path(path).read_text("utf-8")
    files = [Path(word) for word in re.findall(r"[^\s'\"\[\],{}]+\.jsonl?\b", text)]
    return digest([text, *(sha256(file) for file in files if file.is_file())])
