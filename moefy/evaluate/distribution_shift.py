"""Shifted text: where a model may break although its perplexity on plain text is good."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.text.tokens import Tokens

SHORT = 24
"""Tokens of a truncated prompt."""

LONG = 4
"""Length of a long context, in windows of the usual length."""

MEANING = {
    "in-domain": "held-out calibration text, for which the routers were fitted",
    "random tokens": "tokens drawn uniformly from the vocabulary",
    "truncated prompts": f"{SHORT} tokens of text that start and end in the middle of a word",
    "long context": f"the last tokens of windows {LONG} times as long, or as long as the model "
    "takes; only these are scored",
}


Shift = tuple[list[Tensor], int | None]
"""Windows of shifted text, and how many of the last tokens of each are scored; None for all."""


def reference(tokens: Tokens, num_tokens: int) -> list[Tensor]:
    """Calibration sequences that the routers were fitted on, about `num_tokens` in all.

    Routing on other text is compared with routing on these; the drift of the held-out sequences is
    the noise.
    """
    fitted_BT = tokens.ids_BT[: len(tokens.ids_BT) - tokens.num_heldout]
    return list(fitted_BT[: max(1, num_tokens // fitted_BT.shape[1])])


def shifts(
    tokens: Tokens,
    text: str,
    tokenizer: Any,
    *,
    vocabulary: int,
    longest: int,
    num_tokens: int,
    length: int,
) -> tuple[dict[str, Shift], dict[str, str]]:
    """The shifts by name, and the reason for each one that is impossible.

    `longest` is the longest context of the models, `length` that of the usual windows.
    """
    generator = torch.Generator().manual_seed(0)
    count = max(1, num_tokens // length)
    size = (count, min(length, longest))
    result: dict[str, Shift] = {
        "in-domain": (list(tokens.ids_BT[-tokens.num_heldout :][:count]), None),
        "random tokens": (list(torch.randint(vocabulary, size, generator=generator)), None),
    }
    impossible: dict[str, str] = {}
    if prompts := truncated(text, tokenizer, count=count * 8, generator=generator):
        result["truncated prompts"] = (prompts, None)
    else:
        impossible["truncated prompts"] = "the texts are too short"
    ids = tokenizer(text, verbose=False)["input_ids"]
    long = min(LONG * length, longest, len(ids))
    if long > length:
        result["long context"] = ([torch.tensor(ids[:long])], min(length, long - length))
    else:
        impossible["long context"] = (
            f"the texts have {len(ids):,} tokens and the model takes {longest:,}; expected both "
            f"above the usual {length:,}"
        )
    return result, impossible


def truncated(text: str, tokenizer: Any, *, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` pieces of `SHORT` tokens of `text`, most of which start and end within a word."""
    span = 12 * SHORT  # characters: more than enough for SHORT tokens
    if len(text) < 2 * span:
        return []
    starts = torch.randint(1, len(text) - span, (count,), generator=generator).tolist()
    pieces = [tokenizer(text[at : at + span])["input_ids"][:SHORT] for at in starts]
    return [torch.tensor(ids) for ids in pieces if len(ids) > 2]
