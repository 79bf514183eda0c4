"""What every measurement of a report needs: models, texts, the cache, and a list of failures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.compute_dtype import ComputeDtype
from moefy.errors import MoefyError
from moefy.evaluate.cache import Cache
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.scoring import TextResult, scored
from moefy.evaluate.sizes import sizes
from moefy.progress import Watch
from moefy.text import packing

LONGEST = 8192
"""Longest context, in tokens, of a model that names no limit."""


@dataclass(frozen=True)
class Session:
    """What every measurement of a report needs, checked; models are loaded when first used."""

    summary: Mapping[str, Any]
    """conversion.json of the run."""
    candidates: list[Candidate]
    """Dense first, then the run's own stages, then other runs."""
    controls: list[Candidate]
    """Controls and methods of `--against`, which are only scored on texts."""
    main: str
    """Label of the run's last stage."""
    tokenizer: Any
    texts: dict[str, Path]
    windows: dict[str, list[Tensor]]
    """Token ids of each text, (T,) each."""
    prompts: list[dict[str, Any]]
    tokens: packing.Tokens
    """The calibration tokens of the run."""
    cache: Cache
    stored: torch.dtype
    """Dtype of the dense model's file."""
    compute: ComputeDtype
    """Dtype that all models compute in, so that only their weights differ."""
    device: torch.device
    """Where they compute."""
    place: Path
    """Folder for temporary files."""
    watch: Watch
    not_run: list[dict[str, str]] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    """Exit code of a part that failed with a `MoefyError`."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Wall-clock and processor seconds of each part."""
    loaded: dict[str, Any] = field(default_factory=dict)
    """Models in the dtype of the report, by label."""

    @property
    def labels(self) -> list[str]:
        """Labels of dense and of every stage of every run."""
        return [candidate.label for candidate in self.candidates]

    @property
    def all_candidates(self) -> list[Candidate]:
        """All models, the controls included."""
        return [*self.candidates, *self.controls]

    def score(
        self,
        candidates: list[Candidate],
        name: str,
        windows: list[Tensor],
        keep: int | None = None,
    ) -> dict[str, TextResult]:
        """The results of candidates, dense first, on the text `name`; see `scored`."""
        watch = partial(self.watch, f"evaluate on {name}")
        return scored(candidates, windows, self.cache, self.model, keep=keep, watch=watch)

    def model(self, candidate: Candidate, dtype: torch.dtype | None = None) -> Any:
        """The model of a candidate, in the dtype of the report or another one.

        Models without a folder and models in another dtype do not stay in memory. The sizes of the
        former are measured at once: opening one again may take a conversion.
        """
        if candidate.folder is None:
            model = candidate.open(dtype or self.compute.dtype).to(self.device)
            self.cache.once("sizes", {"model": candidate.digest}, lambda: sizes(model, self.stored))
            return model
        if dtype not in (None, self.compute.dtype):
            return candidate.open(dtype).to(self.device)
        if candidate.label not in self.loaded:
            model = candidate.open(self.compute.dtype)
            self.loaded[candidate.label] = model.to(self.device)
        return self.loaded[candidate.label]

    def cached(
        self, kind: str, candidate: Candidate, measure: Callable[[Any], Any], **key: Any
    ) -> Any:
        """`measure` of the candidate's model, or its cached value under the candidate and `key`."""
        key = {"model": candidate.digest, **key}
        return self.cache.once(kind, key, lambda: measure(self.model(candidate)))

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Record a failure of the block under `not_run`, and go on."""
        start, spent = time.perf_counter(), time.process_time()
        try:
            yield
        except MoefyError as error:
            self.not_run.append({"what": what, "reason": str(error)})
            self.codes[what] = error.code
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # a fault of a library must not stop the other parts
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.not_run.append({"what": what, "reason": reason})
        finally:
            self.seconds[what] = {
                "wall": round(time.perf_counter() - start, 1),
                "processor": round(time.process_time() - spent, 1),
            }
