"""Everything that measurements need, checked and opened before the first of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.compute import ComputeDtype
from moefy.config.report import Settings
from moefy.convert.prepare import Watch
from moefy.errors import MoefyError
from moefy.evaluate.cache import Cache
from moefy.evaluate.candidates import Candidate, check_tokenizer, dense_candidate, run_candidates
from moefy.evaluate.controls import (
    SHOWN,
    as_written,
    calibration_tokens,
    changed,
    control_candidates,
    controls,
)
from moefy.evaluate.dtypes import one_dtype
from moefy.evaluate.prompts import read_prompts
from moefy.evaluate.scoring import Scorer
from moefy.evaluate.texts import own_texts
from moefy.files.shards import stored_dtype
from moefy.runs.folder import DenseModel, check_folder, dense_model, read_recipe
from moefy.text import packing
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows


@dataclass(frozen=True)
class Session:
    """Everything that measurements need, checked and opened."""

    summary: Mapping[str, Any]
    stages: list[Candidate]
    """Dense first, then the run's own, then other runs."""
    others: list[Candidate]
    """Controls and methods, which are only scored on texts."""
    main: str
    """The label of the run's last stage."""
    tokenizer: Any
    texts: dict[str, Path]
    prompts: list[dict[str, Any]]
    windows: dict[str, list[Tensor]]
    tokens: packing.Tokens
    cache: Cache
    stored: torch.dtype
    """Of the dense model."""
    compute: ComputeDtype
    """What all models are computed in, so that nothing but their weights differs."""
    opened: Callable[[str], Any]
    """The model of a label, in that dtype."""
    opened_in: Callable[[str, torch.dtype], Any]
    """The same in any dtype."""
    place: Path
    watch: Watch
    not_run: list[dict[str, str]] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    """Exit code of a part that failed for a reason of the user's."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each part took, by the clock and of the processor."""

    @property
    def scorer(self) -> Scorer:
        """The models that are scored on texts."""
        return Scorer(self.cache, [*self.stages, *self.others], self.opened)

    @property
    def labels(self) -> list[str]:
        """Dense and every stage of every run."""
        return [stage.label for stage in self.stages]

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Tell under `not_run` what fails in the block, and go on."""
        start, spent = time.perf_counter(), time.process_time()
        try:
            yield
        except MoefyError as error:
            self.not_run.append({"what": what, "reason": str(error)})
            self.codes[what] = error.code
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # a library's own fault must not take the other parts with it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.not_run.append({"what": what, "reason": reason})
        finally:
            self.seconds[what] = {
                "wall": round(time.perf_counter() - start, 1),
                "processor": round(time.process_time() - spent, 1),
            }


def prepare(
    run: Path, summary: dict[str, Any], settings: Settings, place: Path, watch: Watch
) -> Session:
    """Check all that can be checked without a model, and give what is left to measure with.

    Raises:
        MoefyError: code 2 for methods that cannot be, 3 for runs that are not whole, tokenizers
            that differ, and texts that are too short.
    """
    folders = [Path(name) for name in settings.against if _is_folder(name)]
    recipe = read_recipe(run)
    model = dense_model(run, summary, recipe, settings.dense, "--dense")
    # What is made anew is made from there, and here, wherever the run was made.
    recipe = dataclasses.replace(recipe, model=str(model.folder), revision=None, device="auto")
    methods = {name: changed(recipe, name) for name in settings.against if not _is_folder(name)}
    check_folder(model.folder)
    converted = model.made(summary)
    dense = dense_candidate(model, converted=converted)
    own, missing = run_candidates(run)
    stages, names = [dense, *own], [folder.resolve().name for folder in folders]
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        unique = names.count(name) == 1 and name not in ("dense", "converted", "finetuned")
        found, more = run_candidates(folder, name if unique else f"{name} ({number + 1})")
        stages, missing = [*stages, *found], [*missing, *more]
    tokenizer = load_tokenizer(model.folder)
    for stage in stages[1:]:
        check_tokenizer(tokenizer, stage)
    prompts = read_prompts(settings.prompts, tokenizer) if settings.prompts else []
    notes = _other_weights(model, stages[1:], given=settings.dense is not None)
    tokens = calibration_tokens(run, summary)
    wanted = controls(recipe) if settings.controls else {}
    if settings.controls is None and settings.effort != "quick":
        wanted = {"static": controls(recipe)["static"]}
    wanted = {name: other for name, other in wanted.items() if name in SHOWN} | methods
    if wanted and not converted:
        if methods or settings.controls:
            raise MoefyError(
                f"{model.folder} is not the model that {run} was converted from, from which "
                "controls and methods of --against are made; give that one by --dense, or "
                "--no-controls",
                code=2,
            )
        missing.append(f"controls are made from the model that was converted, not {model.folder}")
        wanted = {}
    others = control_candidates(recipe, wanted, dense, tokens, place, watch)
    if settings.wants(settings.controls) and summary["shape"]["num_experts"]:
        others += as_written(own[-1])
    paths = list(settings.text) or own_texts(place)
    stems = [path.stem for path in paths]
    texts = {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}
    windows = {
        name: text_windows(
            tokenizer,
            path,
            num_tokens=settings.num_tokens,
            length=settings.sequence_length,
            text_field=settings.text_field,
        )
        for name, path in texts.items()
    }
    by_label = {stage.label: stage for stage in (*stages, *others)}
    # A control is as large as the run at most. All are open at once while a text is read.
    opened_at_once = [stage.folder or run for stage in by_label.values()]
    compute = one_dtype(settings.compute_dtype, opened_at_once)
    notes += [f"this report {compute.note}"] if compute.note else []
    kept = functools.cache(lambda label: by_label[label].open(compute.dtype))
    passing = {stage.label for stage in others}  # controls do not stay in memory

    def opened_in(label: str, dtype: torch.dtype) -> Any:
        if dtype != compute.dtype or label in passing:
            return by_label[label].open(dtype)
        return kept(label)

    return Session(
        summary,
        stages,
        others,
        own[-1].label,
        tokenizer,
        texts,
        prompts,
        windows,
        tokens,
        Cache(run / "moefy" / "measured", {"dtype": compute.name}),
        stored_dtype(model.folder),
        compute,
        lambda label: opened_in(label, compute.dtype),
        opened_in,
        place,
        watch,
        not_run=[{"what": "a stage of the run", "reason": reason} for reason in missing],
        notes=notes,
    )


def _other_weights(model: DenseModel, stages: Sequence[Candidate], *, given: bool) -> list[str]:
    """What is to be said of runs that were converted from other weights than those of `model`.

    Raises:
        MoefyError: code 3, where there are some and the model was not given.
    """
    notes = []
    for stage in stages:
        if stage.summary is None or model.made(stage.summary):
            continue
        if not given:
            raise MoefyError(
                f"{stage.folder} was not converted from {model.folder}: its weights differ; "
                "expected runs of one model, or give the one to compare all with by --dense"
            )
        notes.append(
            f"{stage.label} was not converted from {model.folder}, which --dense names: its loss "
            "against dense is that against another model"
        )
    return notes


def _is_folder(name: str) -> bool:
    """Whether `--against` names a run rather than a method.

    Raises:
        MoefyError: code 2, when it is neither.
    """
    if Path(name).is_dir():
        return True
    if "=" not in name:
        raise MoefyError(
            f"--against {name!r} is no folder of a run and no method; expected a run, or settings "
            "as key=value such as 'partition=weights refit=false'",
            code=2,
        )
    return False
