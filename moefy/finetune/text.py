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
from moefy.finetune.last_stage import PROMPTS, SOURCE, num_prompts
from moefy.finetune.train import num_last_steps, num_steps, sequences_per_step
from moefy.progress import Watch
from moefy.text import chat, packing
from moefy.text.mix import mix, split
from moefy.text.rows import rows as stored
from moefy.text.tokenizer import encode, load_tokenizer
from moefy.text.tokens import Tokens

Answer = Callable[[Path, int | None], Answers]
"""Gives the answers to the prompts of a file, or to its first few."""


def read_text(
    run: Run,
    settings: Settings,
    world: int,
    write: Callable[..., Tokens],
    watch: Watch,
    answer: Answer | None = None,
) -> Tokens:
    """The tokens to train and to measure on. `write` gives text that the dense model writes, if
    the settings ask for that: see `self_text.sample` for its arguments.

    Raises:
        MoefyError: code 2 for a share of fewer than 8 sequences; code 3 for a text that is too
            short, or a tokenizer that does not match.
    """
    length, chosen = settings.sequence_length, sources(settings.data, settings.answers)
    step = sequences_per_step(settings, world)
    num_rows = num_steps(settings, world) * step
    num_heldout = settings.validation_tokens // length
    num_last, last, notes = num_last_steps(settings, world) * step, None, ()
    if num_last:
        assert answer is not None
        last, notes = _last(run, settings, num_last, num_heldout * num_last // num_rows, answer)
        num_last = num_last if last else 0
    shares = _shares(settings, num_last / num_rows)
    texts = []
    for source, amount in zip(chosen, amounts(settings, world, num_last), strict=True):
        if source.prompts:
            assert answer is not None
            answers = answer(Path(source.place), None)
            texts.append(_answered(run, answers, source.place, settings, amount))
        else:
            texts.append(_read(run, source.place, settings, amount, write, watch))
    if settings.answers_only and all(text.learned_BT is None for text in texts):
        names = ", ".join(text.source for text in texts)
        raise MoefyError(
            f"--answers-only, and {names} has no conversation; expected rows with turns in "
            "'messages' or 'conversations'"
        )
    texts += [last] if last else []
    tokens = mix(texts, shares, num_rows) if len(texts) > 1 else texts[0]
    tokens = dataclasses.replace(tokens, num_last=num_last, notes=(*tokens.notes, *notes))
    if len(tokens.rows) < step:
        raise MoefyError(
            f"{tokens.source}: {len(tokens.rows)} sequences of {length} tokens to train on, and a "
            f"step takes {step}; give more text, or lower --batch-size or "
            "--gradient-accumulation-steps"
        )
    return tokens


def amounts(settings: Settings, world: int, num_last: int) -> list[packing.Amount]:
    """How much of each source is read, where the last stage takes `num_last` of the sequences.

    Raises:
        MoefyError: code 2 for a share of fewer than 8 sequences.
    """
    length, chosen = settings.sequence_length, sources(settings.data, settings.answers)
    num_rows = num_steps(settings, world) * sequences_per_step(settings, world)
    shares = _shares(settings, num_last / num_rows)
    parts = split(num_rows, shares), split(settings.validation_tokens // length, shares)
    result = []
    for source, rows, heldout in zip(chosen, *parts, strict=False):
        total = rows + max(1, heldout)
        if len(chosen) > 1 and (not rows or total < packing.LEAST_SEQUENCES):
            raise MoefyError(
                f"{source.flag} {source.place}: its share of {source.share:.2g} is {total} "
                f"sequences of {length} tokens; expected at least {packing.LEAST_SEQUENCES}; raise "
                "the share or --tokens",
                code=2,
            )
        part = packing.Amount(total * length, length, settings.seed, max(1, heldout) / total)
        result.append(part)
    return result


def _shares(settings: Settings, last: float) -> list[float]:
    """The share of each source, and behind them that of the last stage, if there is one."""
    chosen = sources(settings.data, settings.answers)
    return [source.share * (1 - last) for source in chosen] + [last] * bool(last)


def _last(
    run: Run, settings: Settings, num_rows: int, num_heldout: int, answer: Answer
) -> tuple[Tokens | None, tuple[str, ...]]:
    """So many sequences of the last stage, or why a preset does without it.

    Raises:
        MoefyError: code 3 for a teacher that does not answer.
    """
    total = max(num_rows + max(1, num_heldout), packing.LEAST_SEQUENCES)
    num_tokens, least = (n * settings.sequence_length for n in (total, packing.LEAST_SEQUENCES))
    answers, tokenizer = answer(PROMPTS, num_prompts(num_tokens)), load_tokenizer(run.folder)
    talks = [row["messages"] for _, row in stored(answers.file) or ()]
    texts = [chat.written(tokenizer, turns, SOURCE) for turns in talks]
    if (count := sum(len(encode(tokenizer, text)) for text in texts)) < least:
        few = f"the teacher's answers to prompts have {count:,} tokens, and a last stage {least:,}"
        if settings.preset:
            return None, (*answers.notes, f"{few}: it was left out")
        raise MoefyError(f"{few} at least; expected a model that answers; leave out --last-stage")
    amount = packing.Amount(
        num_tokens, settings.sequence_length, settings.seed, max(1, num_heldout) / total
    )
    answers_only = dataclasses.replace(settings, answers_only=True)
    return _answered(run, answers, SOURCE, answers_only, amount), ()


def _answered(
    run: Run, answers: Answers, place: str, settings: Settings, amount: packing.Amount
) -> Tokens:
    """So much of the answers to the prompts of `place`.

    Raises:
        MoefyError: code 3 where there are none.
    """
    if not answers.count:
        raise MoefyError(
            f"{place}: no answer of the teacher ends within {settings.answer_tokens} tokens; "
            "expected a model that was trained on conversations; raise answer_tokens"
        )
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
