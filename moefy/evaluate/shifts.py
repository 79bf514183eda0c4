"""Where a model may break that perplexity on plain text does not show: conditions as windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.text.packing import Tokens

SHORT = 24
"""Tokens of a prompt that is cut off."""

LONG = 4
"""A long context is so many times the length of the usual windows."""

MEANING = {
    "in-domain": "calibration text that was held out: what the routers are made for",
    "random tokens": "tokens drawn evenly from the vocabulary",
    "truncated prompts": f"{SHORT} tokens of text that start and end in the middle of a word",
    "long context": f"the last tokens of windows {LONG} times as long, or as long as the model "
    "takes; only these are scored",
}


@dataclass(frozen=True)
class Shift:
    """Windows to read, of which only the last `keep` tokens are scored."""

    windows: list[Tensor]
    keep: int | None = None


def reference(tokens: Tokens, num_tokens: int) -> list[Tensor]:
    """Calibration sequences that the routers were fitted on, about `num_tokens` in all.

    Routing is held against that on these, so what the held-out ones drift is the noise.
    """
    fitted_BT = tokens.ids_BT[: len(tokens.ids_BT) - tokens.num_heldout]
    return list(fitted_BT[: max(1, num_tokens // fitted_BT.shape[1])])


def shifts(
    tokens: Tokens,
    texts: Mapping[str, str],
    tokenizer: Any,
    *,
    vocabulary: int,
    longest: int,
    num_tokens: int,
    length: int,
    seed: int = 0,
) -> tuple[dict[str, Shift], dict[str, str]]:
    """The conditions by name, and for those that cannot be made the reason.

    `texts` are strings; `longest` is the longest context of the models.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, num_tokens // length)
    made = {"in-domain": Shift(list(tokens.ids_BT[-tokens.num_heldout :][:count]))}
    size = (count, min(length, longest))
    random_WT = torch.randint(vocabulary, size, generator=generator)
    made["random tokens"] = Shift(list(random_WT))
    lacking: dict[str, str] = {}
    cut = truncated("\n\n".join(texts.values()), tokenizer, count=count * 8, generator=generator)
    if cut:
        made["truncated prompts"] = Shift(cut)
    else:
        lacking["truncated prompts"] = "the texts are too short"
    ids = tokenizer("\n\n".join(texts.values()), verbose=False)["input_ids"]
    long = min(LONG * length, longest, len(ids))
    if long > length:
        made["long context"] = Shift([torch.tensor(ids[:long])], min(length, long - length))
    else:
        lacking["long context"] = (
            f"texts of {len(ids):,} tokens and a model of {longest:,} give no context longer than "
            f"the usual {length:,}"
        )
    return made, lacking


def truncated(text: str, tokenizer: Any, *, count: int, generator: torch.Generator) -> list[Tensor]:
    """Pieces of `text` that start and end anywhere, mostly within words, each `SHORT` tokens."""
    span = 12 * SHORT  # characters: more than enough for so many tokens
    if len(text) < 2 * span:
        return []
    starts = torch.randint(1, len(text) - span, (count,), generator=generator).tolist()
    pieces = [tokenizer(text[at : at + span])["input_ids"][:SHORT] for at in starts]
    return [torch.tensor(ids) for ids in pieces if len(ids) > 2]
