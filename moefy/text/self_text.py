"""Text that a model writes itself, to calibrate on where there is none of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.text.documents import documents
from moefy.text.packing import Tokens, count_heldout, count_sequences, digest, pack
from moefy.text.tokenizer import encode, first_ids

OPENINGS = Path(__file__).with_name("openings.txt")
"""Beginnings of documents, written for this package; those of a kind stand side by side."""

DOCUMENT = 64
"""Tokens of a document, its opening included: many short ones are better to calibrate on than few
long ones (recipes/results/negative-results.md)."""

TEMPERATURE = 1.0
"""What draws less than the model's whole distribution is worse to calibrate on (there, too)."""

MOST_OPENING = 2
"""An opening takes at most one part in this many of its document."""

BATCHES = (128, 64, 32, 16, 8, 4, 2, 1)
"""How many documents are written at a time: the first of these for which there is memory."""


def sample(
    model: Any,
    tokenizer: Any | None,
    *,
    num_tokens: int,
    length: int,
    seed: int,
    batch_size: int = BATCHES[0],
    heldout: float = 1 / 8,
    temperature: float = TEMPERATURE,
    document: int = DOCUMENT,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Let the model write `num_tokens // length` sequences of `length` tokens.

    It writes documents of `document` tokens, which are packed as `data.load` packs those of a text.
    Each starts with one of `OPENINGS`, drawn so that each kind of them has its share, and goes on
    with draws from the model's whole distribution at `temperature`. Where the model ends a text,
    the next opening follows. Without a tokenizer a random token stands for an opening. The result
    depends on `seed` and `batch_size`; global random state is neither read nor changed. `progress`
    is called with the tokens done and the tokens in all.

    `model.generate` would end a sequence at an end-of-text token, or ban it; it cannot go on with
    another opening.

    Source: self-generated calibration text as in LLM-QAT (Liu et al., 2023, arXiv:2305.17888),
    which starts from random tokens.

    Raises:
        MoefyError: code 2 for a request of fewer than 8 sequences, 6 if logits are not finite.
    """
    num_sequences = count_sequences(num_tokens, length)
    num_heldout = count_heldout(num_sequences, heldout)
    first = first_ids(tokenizer) if tokenizer else []
    end = [tokenizer.eos_token_id] if tokenizer and tokenizer.eos_token_id is not None else []
    room = length - len(first)
    size = min(document, room)
    # The held-out sequences start with a document of their own.
    num_documents = sum(
        -(-num * room // size) for num in (num_sequences - num_heldout, num_heldout)
    )
    generator = torch.Generator(model.device).manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    openings = _openings(tokenizer, rows, max(1, size // MOST_OPENING), seed)
    parts: list[list[int]] = []
    while len(parts) < num_documents:
        num = min(batch_size, num_documents - len(parts))
        done = len(parts) * size

        def tick(step: int, num: int = num, done: int = done) -> None:
            if progress:
                progress(done + step * num, num_documents * size)

        parts += _written(model, num, first, openings, end, size, temperature, generator, tick)
    ids_BN, _, notes = pack(parts, room, num_sequences - num_heldout, num_heldout)
    ids_BT = torch.cat([torch.tensor(first).long().expand(num_sequences, -1), ids_BN], 1)
    return Tokens(ids_BT, num_heldout, "self", digest(ids_BT), num_documents, tuple(notes))


def _openings(tokenizer: Any | None, rows: int, most: int, seed: int) -> Iterator[list[int]]:
    """Yield the ids of openings without end, each at most `most`; random ids if none can be read.

    Steps of the golden ratio through the file give every kind about its share of any beginning.
    """
    generator = torch.Generator().manual_seed(seed)
    readable: list[list[int]] = []
    if tokenizer:
        all_ids = [encode(tokenizer, text)[:most] for text in documents(str(OPENINGS))]
        unknown = tokenizer.unk_token_id
        readable = [ids for ids in all_ids if ids and unknown not in ids and max(ids) < rows]
    num = len(readable)
    if not num:
        while True:
            yield torch.randint(rows, (1,), generator=generator).tolist()
    at = int(torch.randint(num, (), generator=generator))
    step = next(step for step in range(round(0.618 * num), num + 2) if math.gcd(step, num) == 1)
    while True:
        yield readable[at]
        at = (at + step) % num


@torch.no_grad()
def _written(
    model: Any,
    num: int,
    first: list[int],
    openings: Iterator[list[int]],
    end: list[int],
    size: int,
    temperature: float,
    generator: torch.Generator,
    tick: Callable[[int], None],
) -> list[list[int]]:
    """Let the model write `num` documents of `size` ids each, `end` included and `first` not."""
    given = [next(openings) for _ in range(num)]
    shortest = min(map(len, given))
    written = [ids[:shortest] for ids in given]
    # What is left of each row's opening, last id first.
    given = [ids[shortest:][::-1] for ids in given]
    ids_BT = torch.tensor([first + ids for ids in written], device=model.device)
    cache = None
    while True:
        tick(len(written[0]))
        if len(written[0]) >= size - len(end):
            break
        output = model(input_ids=ids_BT, cache=cache, use_cache=True, logits_to_keep=1)
        cache = output.cache
        drawn_B = _drawn(output.logits[:, -1].float() / temperature, generator).tolist()
        for row, token in enumerate(drawn_B):
            written[row].append(given[row].pop() if given[row] else token)
            if written[row][-1:] == end and not given[row]:
                given[row] = next(openings)[::-1]
        ids_BT = torch.tensor([ids[-1:] for ids in written], device=model.device)
    tick(size)
    return [ids + end for ids in written]


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an id of every row, shape (B,).

    By the running sum of chances: `torch.multinomial`, which draws a number per id, takes five
    times as long.
    """
    sum_BV = logits_BV.softmax(-1).cumsum(-1)
    whole_B1 = sum_BV[:, -1:]
    if not whole_B1.isfinite().all():
        raise MoefyError(
            "the model's logits are not finite while it writes calibration text; its dtype "
            "overflows; give a text as --calibration",
            code=6,
        )
    point_B1 = whole_B1 * torch.rand(whole_B1.shape, generator=generator, device=whole_B1.device)
    # The first sum above the point, for an id of no chance adds nothing.
    drawn_B1 = torch.searchsorted(sum_BV, point_B1, right=True)
    return drawn_B1[:, 0].clamp(max=sum_BV.shape[1] - 1)
