"""What a report measures, and how much of it: the `[report]` table of a recipe, or flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.config.options import COMPUTE_DTYPES, Note, check, key, option
from moefy.errors import MoefyError

TABLE = "report"
"""The table of a recipe that these are."""

TOKENS = {"quick": 2048, "usual": 4096, "full": 20480}
"""Scored on each text, by effort."""

BY_EFFORT = "{usual}; {quick} with --quick, {full} with --full".format(**TOKENS)

SHORTEST_WINDOW = 64
"""Tokens of a window at least, where windows may be that long; shorter ones tell more about how
texts start than about the model."""


@dataclass(frozen=True)
class Settings:
    """What to measure of a run."""

    text: tuple[Path, ...] = option(
        (),
        "File of text, JSON or parquet rows, or chats to evaluate on; may be repeated.",
        unset="Python's own manual",
    )
    text_field: str = option("text", "Field of the rows of --text.")
    dense: str | None = option(None, "Dense model to compare with.", unset="that of the run")
    against: tuple[str, ...] = option(
        (),
        "Folder of another run; another method, which is converted and scored, e.g. "
        "`method=moefication`; or a rival, e.g. `q4_K_M` or `layers-dropped`; may be repeated.",
    )
    effort: str = key("usual", "Amount of measurements.", choices=tuple(TOKENS))
    tokens: int | None = option(None, "Tokens per text.", unset=BY_EFFORT)
    # Fewer tokens in a window tell nothing of a model, and a single one predicts none.
    sequence_length: int = option(1024, "Tokens per window.", least=8)
    controls: bool | None = option(
        None,
        "Conversion and refit of all controls, each as long as the run's own; or no controls.",
        unset="static, and an oracle that is not refitted",
    )
    rivals: bool = option(
        False, "The dense model quantised or with layers dropped, and the run quantised."
    )
    quantized: tuple[str, ...] = option(
        (), "The run in llama.cpp's types, e.g. `q8_0,q4_K_M`, against itself.", separator=","
    )
    tasks: tuple[str, ...] = option((), "Tasks of lm-eval, e.g. `piqa,arc_easy`.", separator=",")
    include_path: Path | None = option(None, "Folder of task files of your own, for --tasks.")
    limit: int | None = option(None, "Samples per task at most.", least=1)
    prompts: Path | None = option(
        None,
        "File of rows with a `prompt`, and an `answer` or none, or of chats, to find regressions; "
        "for --behaviour, too, with `json` true where an answer is to hold it.",
    )
    behaviour: bool | None = option(
        None,
        "Share of answers that loop, stop, and hold the JSON asked for.",
        unset="with --full",
    )
    robustness: bool | None = option(
        None, "Scores on random tokens, cut-off prompts and long contexts.", unset="unless --quick"
    )
    lost_experts: tuple[str, ...] = option(
        (),
        "Loss without an expert, each taken out alone: `all`, or LAYER.EXPERT, e.g. `3.0,3.5`. "
        "Each takes two thirds of a reading of 512 tokens.",
        separator=",",
    )
    speed: bool = option(True, "Tokens per second.")
    llama_cpp: bool | None = option(
        None, "Speed in llama.cpp, too.", unset="if it is installed, unless --quick"
    )
    compute_dtype: str = option(
        "auto",
        "Dtype in which all models compute; `auto` is the stored one, or float32 where the "
        "machine lacks it.",
        choices=COMPUTE_DTYPES,
    )
    device: str = option("auto", "Device of scores and speed: auto, cpu, cuda or cuda:N.")
    fail_if: tuple[str, ...] = option(
        (), "Condition that ends with exit code 1, e.g. `dnll>0.1`; may be repeated."
    )
    grid: Any = None
    """What speed is measured on; by the effort, if not given."""

    @property
    def num_tokens(self) -> int:
        """Scored on each text."""
        return self.tokens or TOKENS[self.effort]

    def wants(self, part: bool | None, efforts: Sequence[str] = ("usual", "full")) -> bool:
        """Whether a part is to be measured that only reports of some `efforts` have by default."""
        return self.effort in efforts if part is None else part

    def as_json(self) -> dict[str, Any]:
        """As `report.json` holds them, so that `moefy run` knows what has been measured."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def build(values: Mapping[str, Any], note: Note = lambda line: None) -> Settings:
    """Checked settings from a `[report]` table or from flags.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    settings = Settings(**check(Settings, values, note, f"[{TABLE}]"))
    least = min(SHORTEST_WINDOW, settings.sequence_length)
    if settings.tokens is not None and settings.tokens < least:
        raise MoefyError(
            f"--tokens is {settings.tokens}; expected at least {least}, which is one window", code=2
        )
    return settings
