"""The text of a fine-tune: one source, or a mix of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moefy.config.finetune import Settings
from moefy.config.sources import sources
from moefy.errors import MoefyError
from moefy.finetune.answers import Answers
from moefy.finetune.inputs import Run
from moefy.finetune.train import num_steps, sequences_per_step
from moefy.progress import Watch
from moefy.text import packing
from moefy.text.mix import mix, split
from moefy.text.tokenizer import load_tokenizer
from moefy.text.tokens import Tokens


def read_text(
    run: Run,
    settings: Settings,
    world: int,
    write: Callable[..., Tokens],
    watch: Watch,
    answer: Callable[[Path], Answers] | None = None,
) -> Tokens:
    """The tokens to train and to measure on. `write` gives text that the dense model writes, if
    the settings ask for that: see `self_text.sample` for its arguments. `answer` gives the answers
    to the prompts of a file.

    Raises:
        MoefyError: code 2 for a share of fewer than 8 sequences; code 3 for a text that is too
            short, or a tokenizer that does not match.
    """
    length, chosen = settings.sequence_length, sources(settings.data, settings.answers)
    shares = [source.share for source in chosen]
    step = sequences_per_step(settings, world)
    num_rows = num_steps(settings, world) * step
    num_heldout = settings.validation_tokens // length
    amounts = []
    for source, rows, heldout in zip(
        chosen, split(num_rows, shares), split(num_heldout, shares), strict=True
    ):
        total = rows + max(1, heldout)
        if len(chosen) > 1 and (not rows or total < packing.LEAST_SEQUENCES):
            raise MoefyError(
                f"{source.flag} {source.place}: its share of {source.share:.2g} is {total} "
                f"sequences of {length} tokens; expected at least {packing.LEAST_SEQUENCES}; raise "
                "the share or --tokens",
                code=2,
            )
        part = packing.Amount(total * length, length, settings.seed, max(1, heldout) / total)
        amounts.append(part)
    texts = []
    for source, amount in zip(chosen, amounts, strict=True):
        if source.prompts:
            assert answer is not None
            texts.append(_answered(run, answer(Path(source.place)), source.place, settings, amount))
        else:
            texts.append(_read(run, source.place, settings, amount, write, watch))
    tokens = mix(texts, shares, num_rows) if len(texts) > 1 else texts[0]
    if settings.answers_only and tokens.learned_BT is None:
        raise MoefyError(
            f"--answers-only, and {tokens.source} has no conversation; expected rows with turns in "
            "'messages' or 'conversations'"
        )
    if len(tokens.rows) < step:
        raise MoefyError(
            f"{tokens.source}: {len(tokens.rows)} sequences of {length} tokens to train on, and a "
            f"step takes {step}; give more text, or lower --batch-size or "
            "--gradient-accumulation-steps"
        )
    return tokens


def _answered(
    run: Run, answers: Answers, place: str, settings: Settings, amount: packing.Amount
) -> Tokens:
    """So much of the answers to the prompts of `place`."""
    tokens = packing.load(
        load_tokenizer(run.folder),
        str(answers.file),
        amount,
        vocab_size=run.vocab_size,
        answers_only=settings.answers_only,
    )
    return dataclasses.replace(tokens, source=place, notes=(*answers.notes, *tokens.notes))


def _read(
    run: Run,
    place: str,
    settings: Settings,
    amount: packing.Amount,
    write: Callable[..., Tokens],
    watch: Watch,
) -> Tokens:
    """So much of one source."""
    if place == "self":
        return write(amount, progress=partial(watch, "write text"))
    if settings.text_field == packing.IDS:
        return packing.load_ids(place, amount, vocab_size=run.vocab_size)
    watch("read text", 0, 1)
    return packing.load(
        load_tokenizer(run.folder),
        place,
        amount,
        text_field=settings.text_field,
        vocab_size=run.vocab_size,
        answers_only=settings.answers_only,
    )
