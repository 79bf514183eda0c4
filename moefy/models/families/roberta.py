"""RoBERTa: BERT with positions that start behind the padding's, and another head."""

from __future__ import annotations

import dataclasses
import re

from moefy.models.families import bert


def named(name: str) -> str:
    """A model without a head lacks the model's name."""
    return re.sub(r"^(?=(embeddings|encoder|pooler)\.)", "roberta.", name)


FAMILY = dataclasses.replace(
    bert.FAMILY,
    layer="roberta.encoder.layer.{layer}.",
    embedding="roberta.embeddings.word_embeddings.weight",
    positions="roberta.embeddings.position_embeddings.weight",
    first_position=2,
    embeddings="roberta.embeddings",
    head="lm_head.decoder.weight",
    named=named,
)
