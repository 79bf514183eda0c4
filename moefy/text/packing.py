"""Token batches from text; `self_text` makes those that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.text.documents import MOST_IDS, TEXT, Document, id_rows, shuffled, stratified
from moefy.text.tokenizer import encode, first_ids, require_rows
from moefy.text.tokens import Tokens, digest

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


def load(
    tokenizer: Any,
    source: str,
    amount: Amount,
    *,
    text_field: str = TEXT,
    vocab_size: int | None = None,
    stratify: bool = False,
    answers_only: bool = False,
) -> Tokens:
    """Pack the documents of `source` into sequences of tokens.

    Exact duplicates among the documents (see `documents`) are dropped. The others are shuffled,
    tokenised and joined with the end-of-text token between them. With `stratify` their order gives
    each kind of text about its share, however few are used (`stratify.spread`). Every sequence
    starts with the beginning-of-text token if the tokenizer puts one before a text. No document
    gives more than 4 * `length` tokens unless the others have run out. The held-out sequences, at
    least one, come last. They start with a document of their own if the text has enough documents.
    A short text gives fewer sequences and a note. `vocab_size` is the number of the model's
    embeddings, if the ids are to be checked against it. With `answers_only` what a conversation's
    assistant does not write is marked as not learned, by the rule of `return_assistant_tokens_mask`
    in transformers: a token counts that has a part in an answer.

    Raises:
        MoefyError: code 2 for a request of fewer than 8 sequences; code 3 for a text that gives
            fewer, for a bad source, and for a tokenizer with ids beyond `vocab_size`; code 4 for
            answers and a tokenizer that does not tell the place of a token.
    """
    if answers_only and not tokenizer.is_fast:
        raise MoefyError(
            f"--answers-only: {type(tokenizer).__name__} does not tell which characters a token "
            "stands for; expected a fast tokenizer; leave out --answers-only",
            code=4,
        )
    share, bos = 4 * amount.length, first_ids(tokenizer)
    # More than is used, so that the held-out part can skip to the start of a document.
    enough = count_sequences(amount) * (amount.length - len(bos)) + share
    texts, notes = shuffled(
        source,
        amount.num_tokens,
        amount.seed,
        text_field=text_field,
        tokenizer=tokenizer,
        answers_only=answers_only,
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
    ids_BT = torch.cat([torch.tensor(bos, dtype=torch.int64).expand(usable, -1), ids_BN], 1)
    learned_BT = ids_BT >= 0
    ids_BT = torch.where(learned_BT, ids_BT, ~ids_BT)
    require_rows(ids_BT, vocab_size)
    return Tokens(
        ids_BT,
        num_heldout,
        source,
        digest(ids_BT),
        num_documents,
        notes=tuple(notes + shared),
        learned_BT=None if learned_BT.all() else learned_BT,
    )


def count_heldout(num_sequences: int, heldout: float) -> int:
    """The number of held-out sequences: at least one, and never all."""
    return min(max(1, round(heldout * num_sequences)), num_sequences - 1)


def _gather(tokenizer: Any, texts: list[Document], *, share: int, enough: int) -> list[list[int]]:
    """Take `share` tokens of every document in turn until there are `enough`.

    Gives the ids of each document, in the order of `texts`, end-of-text token included. Where an id
    is not to be learned its complement stands, ~id, which is negative.
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
    return [ids + [token if ids[-1] >= 0 else ~token for token in end] for ids in taken.values()]


def _shares(tokenizer: Any, document: Document, share: int) -> Iterator[list[int]]:
    """Yield the ids of a document, `share` at a time, tokenising no further than was asked for."""
    text, ids = document.text, []
    at = 0
    while at < len(text):
        end = at + 4 * share
        if end < len(text):
            # Cut before a space or line end: most tokenizers join these to the word that follows.
            spaces = (text.rfind(" ", at + 1, end), text.rfind("\n", at + 1, end))
            end = max(spaces) if max(spaces) > 0 else end
        ids += _encoded(tokenizer, document, at, end)
        at = end
        while len(ids) >= share:
            yield ids[:share]
            ids = ids[share:]
    if ids:
        yield ids


def _encoded(tokenizer: Any, document: Document, at: int, end: int) -> list[int]:
    """The ids of a piece of a document, the complements of those that are not to be learned."""
    text, answers = document.text[at:end], document.answers
    if answers is None:
        return encode(tokenizer, text)
    out = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    learned = torch.zeros(len(text), dtype=torch.bool)
    for first, last in answers:
        learned[max(0, first - at) : max(0, last - at)] = True
    return [
        token if learned[first:last].any() else ~token
        for token, (first, last) in zip(out["input_ids"], out["offset_mapping"], strict=True)
    ]


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
