"""Token batches from text; `self_text` makes those that the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.text.documents import MOST_IDS, TEXT, id_rows, shuffled, stratified
from moefy.text.tokenizer import encode, first_ids, require_rows

LEAST_SEQUENCES = 8  # one held out and seven to fit on: fits on fewer mean nothing
IDS = "input_ids"  # the field of rows that are tokenised already


@dataclass(frozen=True)
class Amount:
    """How many tokens to take, in sequences of how many, by which seed.

    `heldout` is the share of the sequences that is for validation.
    """

    num_tokens: int
    length: int
    seed: int = 0
    heldout: float = 1 / 8


@dataclass(frozen=True)
class Part:
    """What one source gives to a mix."""

    name: str
    source: str
    share: float
    documents: int
    sequences: int
    """Different ones to train on."""
    epochs: float
    """How often each of them is trained on."""
    heldout_sequences: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """Packed sequences of token ids, the last `num_heldout` of them for validation.

    `ids_BT` is int64, num_sequences x length; `sha256` is the digest of its bytes; `num_documents`
    counts the documents that its tokens come from; `notes` are one-line warnings. `compute_dtype`
    names the dtype that the model computed in where it wrote them itself. A mix has `parts`, whose
    held-out sequences follow one another, and trains on the rows `fit_N`, in which sequences of a
    short source are repeated.
    """

    ids_BT: Tensor
    num_heldout: int
    source: str
    sha256: str
    num_documents: int
    notes: tuple[str, ...]
    compute_dtype: str | None = None
    parts: tuple[Part, ...] = ()
    fit_N: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """The sequences to train on, by their numbers."""
        if self.fit_N is not None:
            return self.fit_N.tolist()
        return list(range(len(self.ids_BT) - self.num_heldout))

    @property
    def heldout(self) -> dict[str, range]:
        """The held-out sequences of each source, by their numbers, under its name."""
        counts = {part.name: part.heldout_sequences for part in self.parts}
        result, start = {}, len(self.ids_BT) - self.num_heldout
        for source, count in (counts or {self.source: self.num_heldout}).items():
            result[source] = range(start, start + count)
            start += count
        return result

    @property
    def trained(self) -> str:
        """The digest of all that decides what is trained on."""
        return self.sha256 if self.fit_N is None else digest(self.ids_BT, self.fit_N)

    def figures(self) -> dict[str, Any]:
        """What the written summaries say of the text."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "documents": self.num_documents,
            "sequences": len(self.ids_BT),
            "heldout_sequences": self.num_heldout,
            "sequence_length": self.ids_BT.shape[1],
            "notes": list(self.notes),
            **({"parts": [vars(part) for part in self.parts]} if self.parts else {}),
        }


def load(
    tokenizer: Any,
    source: str,
    amount: Amount,
    *,
    text_field: str = TEXT,
    vocab_size: int | None = None,
    stratify: bool = False,
) -> Tokens:
    """Pack the documents of `source` into sequences of tokens.

    Exact duplicates among the documents (see `documents`) are dropped. The others are shuffled,
    tokenised and joined with the end-of-text token between them. With `stratify` their order gives
    each kind of text about its share, however few are used (`stratify.spread`). Every sequence
    starts with the beginning-of-text token if the tokenizer puts one before a text. No document
    gives more than 4 * `length` tokens unless the others have run out. The held-out sequences, at
    least one, come last. They start with a document of their own if the text has enough documents.
    A short text gives fewer sequences and a note. `vocab_size` is the number of the model's
    embeddings, if the ids are to be checked against it.

    Raises:
        MoefyError: code 2 for a request of fewer than 8 sequences; code 3 for a text that gives
            fewer, for a bad source, and for a tokenizer with ids beyond `vocab_size`.
    """
    share, bos = 4 * amount.length, first_ids(tokenizer)
    # More than is used, so that the held-out part can skip to the start of a document.
    enough = count_sequences(amount) * (amount.length - len(bos)) + share
    texts, notes = shuffled(
        source, amount.num_tokens, amount.seed, text_field=text_field, tokenizer=tokenizer
    )
    if stratify:
        texts = stratified(texts, amount.num_tokens, share=share)
    parts = _gather(tokenizer, texts, share=share, enough=enough)
    return _packed(source, parts, bos, amount, notes, vocab_size)


def load_ids(source: str, amount: Amount, *, vocab_size: int | None = None) -> Tokens:
    """Pack rows of token ids, under `IDS`, as `load` packs texts; they need no tokenizer.

    The rows are shuffled and joined as they are, without special tokens between them.

    Raises:
        MoefyError: as `load`.
    """
    used = count_sequences(amount) * amount.length
    rows, num_read, notes = [], 0, []
    for row in id_rows(source, IDS):
        if num_read >= MOST_IDS:
            notes.append(f"only the first {num_read:,} ids were read")
            break
        rows.append(row)
        num_read += len(row)
    generator = torch.Generator().manual_seed(amount.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    # As many as are used; one more, so that the held-out part can skip to the start of a row.
    enough = used + max(map(len, rows))
    ends = accumulate(len(rows[index]) for index in order)
    parts = [
        rows[index]
        for index, end in zip(order, ends, strict=True)
        if end - len(rows[index]) < enough
    ]
    return _packed(source, parts, [], amount, notes, vocab_size)


def count_sequences(amount: Amount) -> int:
    """The number of sequences in an amount.

    Raises:
        MoefyError: code 2 for fewer than `LEAST_SEQUENCES`.
    """
    if amount.length < 2 or amount.num_tokens // amount.length < LEAST_SEQUENCES:
        raise MoefyError(
            f"{amount.num_tokens:,} tokens in sequences of {amount.length} asked for; expected at "
            f"least {LEAST_SEQUENCES} sequences of 2 tokens or more; ask for more tokens",
            code=2,
        )
    return amount.num_tokens // amount.length


def _packed(
    source: str,
    parts: list[list[int]],
    bos: list[int],
    amount: Amount,
    notes: list[str],
    vocab_size: int | None,
) -> Tokens:
    """As many sequences as the documents make and were asked for, each behind the ids `bos`."""
    num_sequences, total = count_sequences(amount), sum(len(ids) for ids in parts)
    room = amount.length - len(bos)
    usable = min(num_sequences, total // room)
    if usable < LEAST_SEQUENCES:
        raise MoefyError(
            f"{source}: {total:,} tokens in {len(parts):,} documents make {usable} sequences "
            f"of {room}; expected at least {LEAST_SEQUENCES} (7 to fit on, 1 held out); give "
            "more text or a shorter length"
        )
    few = f"asked for {amount.num_tokens:,} tokens, the text gave {total:,}"
    notes = notes + [few] * (usable < num_sequences)
    num_heldout = count_heldout(usable, amount.heldout)
    ids_BN, num_documents, shared = pack(parts, room, usable - num_heldout, num_heldout)
    require_rows(ids_BN, vocab_size)
    ids_BT = torch.cat([torch.tensor(bos, dtype=torch.int64).expand(usable, -1), ids_BN], 1)
    notes += shared
    return Tokens(ids_BT, num_heldout, source, digest(ids_BT), num_documents, tuple(notes))


def count_heldout(num_sequences: int, heldout: float) -> int:
    """The number of held-out sequences: at least one, and never all."""
    return min(max(1, round(heldout * num_sequences)), num_sequences - 1)


def _gather(tokenizer: Any, texts: list[str], *, share: int, enough: int) -> list[list[int]]:
    """Take `share` tokens of every document in turn until there are `enough`.

    Gives the ids of each document, in the order of `texts`, end-of-text token included.
    """
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    end = [token for token in ends if token is not None][:1]
    readers = {index: _shares(tokenizer, text, share) for index, text in enumerate(texts)}
    taken: dict[int, list[int]] = {}
    num_taken = 0
    while readers and num_taken < enough:
        for index, reader in list(readers.items()):
            ids = next(reader, None)
            if ids is None:
                del readers[index]
                continue
            taken.setdefault(index, []).extend(ids)
            num_taken += len(ids)
            if num_taken >= enough:
                break
    return [ids + end for ids in taken.values()]


def _shares(tokenizer: Any, text: str, share: int) -> Iterator[list[int]]:
    """Yield the ids of a document, `share` at a time, tokenising no further than was asked for."""
    ids: list[int] = []
    at = 0
    while at < len(text):
        end = at + 4 * share
        if end < len(text):
            # Cut before a space or line end: most tokenizers join these to the word that follows.
            spaces = (text.rfind(" ", at + 1, end), text.rfind("\n", at + 1, end))
            end = max(spaces) if max(spaces) > 0 else end
        ids += encode(tokenizer, text[at:end])
        at = end
        while len(ids) >= share:
            yield ids[:share]
            ids = ids[share:]
    if ids:
        yield ids


def pack(
    parts: list[list[int]], room: int, num_fit: int, num_heldout: int
) -> tuple[Tensor, int, list[str]]:
    """Sequences of `room` ids from joined documents; the held-out ones come last.

    The held-out part starts at the first document that the others leave whole, or as late as the
    text allows. Gives the sequences, the number of documents in them, and a note if one is in both.
    """
    starts = torch.tensor([0] + [len(ids) for ids in parts]).cumsum(0)[:-1]
    stream = torch.tensor([token for ids in parts for token in ids], dtype=torch.int64)
    cut = num_fit * room
    latest = len(stream) - num_heldout * room
    begin = min([start for start in starts.tolist() if start >= cut] + [latest])
    end = begin + num_heldout * room
    ids_BN = torch.cat([stream[:cut], stream[begin:end]]).view(-1, room)
    shared = "held-out and other sequences share a document: the text has few documents"
    return ids_BN, int((starts < end).sum()), [] if begin in starts.tolist() else [shared]


def digest(*numbers: Tensor) -> str:
    """The SHA-256 of ids, and of other numbers, as little-endian 64-bit integers."""
    result = hashlib.sha256()
    for tensor in numbers:
        result.update(tensor.numpy().astype("<i8").tobytes())
    return result.hexdigest()
