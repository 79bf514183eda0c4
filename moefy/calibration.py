"""What a conversion is calibrated on: tokens, and for some partitions the gradients on them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import Tensor

from moefy import data
from moefy.gradients import ffn_gradients
from moefy.job import Job, Watch
from moefy.memory import require
from moefy.tokenizer import load_tokenizer, vocabulary_notes


def calibration_tokens(job: Job, watch: Watch) -> data.Tokens:
    """The calibration tokens, from text or from the model itself.

    Raises:
        MoefyError: code 5 where the model must write but does not fit in memory whole.
    """
    from transformers import AutoModelForCausalLM

    recipe, folder = job.recipe, job.checkpoint.folder
    size = job.size("vocab_size")
    shape = {"num_tokens": recipe.tokens, "length": recipe.sequence_length, "seed": recipe.seed}
    if recipe.calibration != "self" and recipe.text_field == data.IDS:
        return data.load_ids(recipe.calibration, vocab_size=size, **shape)
    tokenizer = load_tokenizer(folder)
    notes = vocabulary_notes(tokenizer, size)
    if recipe.calibration != "self":
        tokens = data.load(
            tokenizer,
            recipe.calibration,
            text_field=recipe.text_field,
            vocab_size=size,
            stratify=recipe.stratify,
            **shape,
        )
        return dataclasses.replace(tokens, notes=(*notes, *tokens.notes))
    weights = sum(entry.stop - entry.start for entry in job.checkpoint.entries.values())
    require(weights, "a model that writes its own calibration text", "give a --calibration FILE")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model = model.to(job.device).eval()
    tokens = data.sample(model, tokenizer, progress=partial(watch, "calibration text"), **shape)
    return dataclasses.replace(tokens, notes=tuple(notes))


def gradients(job: Job, tokens: data.Tokens, watch: Watch) -> dict[int, Tensor]:
    """How the dense model's loss changes with what each FFN writes, for a partition that asks.

    Raises:
        MoefyError: code 5 where the model does not fit in memory whole, in float32.
    """
    ids_BT = tokens.ids_BT[: -tokens.num_heldout]
    weights = sum(entry.num_elements for entry in job.checkpoint.entries.values())
    kept = len(job.layers) * ids_BT.numel() * job.size("hidden_size")
    require(4 * weights + 2 * kept, "a model that gives gradients", "use another --partition")
    return ffn_gradients(
        job.checkpoint, job.family, job.layers, ids_BT, job.device, partial(watch, "gradients")
    )
