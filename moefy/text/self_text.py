"""Text that a model writes itself, to calibrate on where there is none of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.files.safetensors_header import Entry
from moefy.text.documents import documents
from moefy.text.packing import Amount, Tokens, count_heldout, count_sequences, digest, pack
from moefy.text.tokenizer import encode, first_ids

OPENINGS = Path(__file__).with_name("openings.txt")
"""Beginnings of documents, written for this package; those of a kind stand side by side."""

DOCUMENT = 64
"""Tokens of a document, its opening included: many short ones are better to calibrate on than few
long ones (recipes/results/negative-results.md)."""

TEMPERATURE = 1.0
"""What draws less than the model's whole distribution is worse to calibrate on (there, too)."""

MOST_OPENING = 2  # an opening takes at most one part in this many of its document

BATCHES = (128, 64, 32, 16, 8, 4, 2, 1)
"""How many documents are written at a time: the first of these for which there is memory."""


@dataclass(frozen=True)
class WriterSizes:
    """A dense model that writes text: its tensors, and its configuration in transformers' keys."""

    entries: Collection[Entry]
    config: Mapping[str, Any]
    num_layers: int
    length: int = DOCUMENT
    """Tokens of a text."""

    def num_bytes(self, itemsize: int, batch_size: int) -> int:
        """Bytes of the files, the weights, the keys and values, and the chances of all ids."""
        heads = int(self.config["num_attention_heads"])
        head_dim = int(self.config.get("head_dim") or self.config["hidden_size"] // heads)
        groups = int(self.config.get("num_key_value_heads") or heads)
        token = 2 * self.num_layers * groups * head_dim * itemsize
        document = self.length * token + 16 * int(self.config["vocab_size"])
        weights = sum(entry.num_bytes + itemsize * entry.num_elements for entry in self.entries)
        return weights + batch_size * document

    def batch_size(self, itemsize: int, room: int) -> int:
        """The most documents at a time that fit in `room` bytes, of `BATCHES`."""
        fitting = (number for number in BATCHES if self.num_bytes(itemsize, number) <= room)
        return next(fitting, BATCHES[-1])


def sample(
    model: Any,
    tokenizer: Any | None,
    amount: Amount,
    *,
    batch_size: int = BATCHES[0],
    temperature: float = TEMPERATURE,
    document: int = DOCUMENT,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Tokens:
    """Sequences of tokens that the model writes itself.

    It writes documents of `document` tokens, packed as `packing.load` packs those of a text. Each
    starts with one of `OPENINGS`, of every kind about its share. Draws from the model's whole
    distribution at `temperature` follow. Where the model ends a text, the next opening follows.
    Without a tokenizer a random token stands for an opening. The result depends on the seed and on
    `batch_size`; global random state is neither read nor changed. `progress` gets the tokens done
    and the tokens in all.

    `model.generate` would end a sequence at an end-of-text token, or ban it; it cannot go on with
    another opening.

    Source: self-generated calibration text as in LLM-QAT (Liu et al., 2023, arXiv:2305.17888),
    which starts from random tokens.

    Raises:
        MoefyError: code 2 for a request of fewer than 8 sequences, 6 if logits are not finite.
    """
    num_sequences = count_sequences(amount)
    num_heldout = count_heldout(num_sequences, amount.heldout)
    first = first_ids(tokenizer) if tokenizer else []
    end = [tokenizer.eos_token_id] if tokenizer and tokenizer.eos_token_id is not None else []
    room = amount.length - len(first)
    size = min(document, room)
    # The held-out sequences start with a document of their own.
    num_documents = sum(
        -(-num * room // size) for num in (num_sequences - num_heldout, num_heldout)
    )
    rows = model.get_input_embeddings().weight.shape[0]
    writer = Writer(
        model,
        _openings(tokenizer, rows, max(1, size // MOST_OPENING), amount.seed),
        first,
        end,
        size,
        temperature,
        torch.Generator(model.device).manual_seed(amount.seed),
    )
    parts: list[list[int]] = []
    while len(parts) < num_documents:
        num = min(batch_size, num_documents - len(parts))
        done = len(parts) * size
        parts += writer.write(
            num,
            lambda step, num=num, done=done: progress(done + step * num, num_documents * size),
        )
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


@dataclass(frozen=True)
class Writer:
    """A model that writes documents."""

    model: Any
    openings: Iterator[list[int]]
    first: list[int]  # ids before every document, and not of it
    end: list[int]  # ids behind every document
    size: int  # ids of a document, its end included
    temperature: float
    generator: torch.Generator

    @torch.no_grad()
    def write(self, num: int, tick: Callable[[int], None]) -> list[list[int]]:
        """Write `num` documents at once; `tick` gets the ids of each that are done."""
        openings = [next(self.openings) for _ in range(num)]
        shortest = min(map(len, openings))
        documents = [ids[:shortest] for ids in openings]
        # The rest of each row's opening, last id first.
        rests = [ids[shortest:][::-1] for ids in openings]
        ids_BT = torch.tensor([self.first + ids for ids in documents], device=self.model.device)
        cache = None
        while True:
            tick(len(documents[0]))
            if len(documents[0]) >= self.size - len(self.end):
                break
            output = self.model(input_ids=ids_BT, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            logits_BV = output.logits[:, -1].float() / self.temperature
            for row, token in enumerate(_drawn(logits_BV, self.generator).tolist()):
                documents[row].append(rests[row].pop() if rests[row] else token)
                if documents[row][-1:] == self.end and not rests[row]:
                    rests[row] = next(self.openings)[::-1]
            ids_BT = torch.tensor([ids[-1:] for ids in documents], device=self.model.device)
        tick(self.size)
        return [ids + self.end for ids in documents]


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
