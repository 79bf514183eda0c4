"""The last steps of a fine-tune, which learn the dense model's own answers to prompts.

Running text seldom ends. So a model that was trained on it alone may have unlearned to end an
answer, and goes on in a loop. Only what the dense model has written is learned, not the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""Prompts of the kinds that `moefy report --behaviour` measures, none of which it measures."""

MOST = 280
"""How many they are."""

SOURCE = "answers to prompts of moefy"

ANSWER, CONVERSATION = 58, 100
"""Tokens of an answer, and of it with its prompt. SmolLM2-135M answered the prompts of
recipes/results/behaviour.md by 58 on average."""

RATE = 0.25
"""The learning rates at the beginning of the stage, as a share of the highest. They fall to zero.
The schedule before has ended there, and nothing would be learned. Not measured."""


def num_prompts(num_tokens: int) -> int:
    """How many prompts give so many tokens, of those that there are.

    >>> num_prompts(4096), num_prompts(10**6)
    (41, 280)
    """
    return min(MOST, math.ceil(num_tokens / CONVERSATION))


def order(rows: list[int], num_last: int, num_rows: int, seed: int) -> list[int]:
    """`num_rows` of the sequences `rows` in the order in which they are trained on: the last
    `num_last` come last, both in random order, again and again where they are too few."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(some: list[int], count: int) -> list[int]:
        epochs = math.ceil(count / max(1, len(some)))
        order_N = torch.cat([torch.randperm(len(some), generator=generator) for _ in range(epochs)])
        return [some[n] for n in order_N[:count].tolist()]

    first = len(rows) - num_last
    return drawn(rows[:first], num_rows - num_last) + (
        drawn(rows[first:], num_last) if num_last else []
    )


def schedule(before: Callable[[int], float], begin: int, num_steps: int) -> Callable[[int], float]:
    """A schedule that is `before` up to the step `begin`, and the last stage's from there on."""
    return partial(_rate, before, begin, num_steps)


def _rate(before: Callable[[int], float], begin: int, num_steps: int, step: int) -> float:
    return before(step) if step < begin else RATE * max(0.0, 1 - (step - begin) / num_steps)
