"""The tokens that a conversion is calibrated on."""

from __future__ import annotations

import dataclasses
from functools import partial

from moefy.checkpoint.validate import companion_files
from moefy.convert.memory import ADVICE, writing
from moefy.convert.prepare import SELF, Job
from moefy.memory import require
from moefy.models.load import open_model
from moefy.progress import Watch
from moefy.text import packing
from moefy.text.self_text import sample
from moefy.text.tokenizer import load_tokenizer, vocabulary_notes

NO_TOKENIZER = (
    "the model has no tokenizer: it wrote its calibration text from random tokens on; give its "
    "tokenizer, or rows of token ids, for text of more kinds"
)


def calibration_tokens(job: Job, watch: Watch, *, memory: int | None = None) -> packing.Tokens:
    """The calibration tokens, from text or from the model itself, which then keeps to `memory`.

    Raises:
        MoefyError: code 5 where the model must write but does not fit in memory whole.
    """
    recipe, folder = job.recipe, job.checkpoint.folder
    size = job.size("vocab_size")
    amount = packing.Amount(recipe.tokens, recipe.sequence_length, recipe.seed)
    if recipe.calibration == SELF:
        return _self_written(job, watch, memory)
    if recipe.text_field == packing.IDS:
        return packing.load_ids(recipe.calibration, amount, vocab_size=size)
    tokenizer = load_tokenizer(folder)
    tokens = packing.load(
        tokenizer,
        recipe.calibration,
        amount,
        text_field=recipe.text_field,
        vocab_size=size,
        stratify=recipe.stratify,
    )
    notes = vocabulary_notes(tokenizer, size)
    return dataclasses.replace(tokens, notes=(*notes, *tokens.notes))


def _self_written(job: Job, watch: Watch, memory: int | None) -> packing.Tokens:
    """Text that the model writes itself, for which it needs no tokenizer."""
    recipe, folder = job.recipe, job.checkpoint.folder
    way = writing(job, memory)
    require(way.num_bytes, "a model that writes its own calibration text", ADVICE["calibration"])
    notes = way.notes
    tokenizer = None
    if any(file.name.startswith(("tokenizer", "vocab")) for file in companion_files(folder)):
        tokenizer = load_tokenizer(folder)
        notes += vocabulary_notes(tokenizer, job.size("vocab_size"))
    else:
        notes.append(NO_TOKENIZER)
    model, _ = open_model(folder, dtype=way.compute.dtype)
    tokens = sample(
        model.to(job.device).eval(),
        tokenizer,
        packing.Amount(recipe.tokens, recipe.sequence_length, recipe.seed),
        batch_size=way.batch_size,
        progress=partial(watch, "calibration text"),
    )
    return dataclasses.replace(
        tokens, notes=(*notes, *tokens.notes), compute_dtype=way.compute.name
    )
