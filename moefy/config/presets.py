"""Presets of a fine-tune: how long it may take, and what follows from that and from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moefy.config import methods
from moefy.config.recipe import Recipe

COPIES: Mapping[str, Any] = {"kl": 0.0, "ce": 1.0}
"""Defaults for copies. Their teacher is where they start, and they are to leave it behind: arXiv
2212.05055, 2410.07524 and 2502.19261 train by cross-entropy and balance, with no teacher."""

OVERLAPPING: Mapping[str, Any] = {"ce": 0.0, "router_gradient": "chosen"}
"""Defaults for experts that overlap. They start so close to the teacher that cross-entropy leads
away from it (recipes/results/finetune.md); measured with `--overlap 4`."""

PRESETS: Mapping[str, float] = {"fast": 10 * 60, "good": 3600, "best": 10 * 3600}
"""Seconds that each may take: minutes, an hour, a night."""

DEFAULT = "good"
"""Where neither a preset nor a number of tokens is given."""

OPEN = -1
"""Stands for what a preset has still to choose, once model and machine are known."""

CHOSEN = ("tokens", "batch_size", "gradient_accumulation_steps", "last_stage")
"""Settings that a preset chooses where they are not given."""

STEPS, LEAST_STEP, MOST_STEP = 250, 1024, 16384
"""Steps to aim at, and tokens of a step. Measured: 176 steps of 1,024 tokens on a CPU, where steps
of 512 ended alike, and 500 of 16,384 on a GPU (recipes/results/finetune.md)."""


LAST_SHARE, LAST_TOKENS = 0.1, 50_000
"""Of the last stage: its share of the tokens, and how many at most. The package's prompts and their
answers are about 28,000. Not measured."""


def own_defaults(recipe: Recipe) -> Mapping[str, Any]:
    """The defaults of a fine-tune that are of the run's own kind, by its recipe."""
    if recipe.partition == methods.COPIES:
        return COPIES
    # No other partition makes experts that overlap.
    overlaps = recipe.overlap > 1 and recipe.partition == Recipe.partition
    return OVERLAPPING if overlaps else {}


def last_share(tokens: float) -> float:
    """The share of the last stage where so many tokens are trained on.

    >>> last_share(50_000), last_share(1_000_000)
    (0.1, 0.05)
    """
    return min(LAST_SHARE, LAST_TOKENS / max(1.0, tokens))


def step_tokens(tokens: float) -> int:
    """Tokens of a step, a power of two, where so many are trained on.

    >>> step_tokens(50_000), step_tokens(1_000_000), step_tokens(1e9)
    (1024, 4096, 16384)
    """
    aim = 2 ** round(math.log2(max(1.0, tokens / STEPS)))
    return min(MOST_STEP, max(LEAST_STEP, aim))


def round_tokens(tokens: float) -> int:
    """The largest of 1, 2, 5, 10, 20 ... tokens that is not above this.

    >>> round_tokens(49_000), round_tokens(200_000), round_tokens(999_999)
    (20000, 200000, 500000)
    """
    unit = 10 ** math.floor(math.log10(max(1.0, tokens)))
    return max(unit * count for count in (1, 2, 5) if unit * count <= max(1.0, tokens))
