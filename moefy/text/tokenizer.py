"""The tokenizer of a checkpoint, and whether it is the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.errors import MoefyError, first_line
from moefy.files.safetensors_header import CONFIG
from moefy.models.load import plain_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, from local files only.

    Raises:
        MoefyError: code 3, when there is none or it is broken, or the configuration is.
    """
    from transformers import AutoTokenizer

    # The tokenizer's class follows from the model's configuration.
    config = plain_config(folder) if (folder / CONFIG).is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _none(folder, first_line(error, 120)) from None
    # Some classes start empty where there is no file for them, and then give no token for a text.
    # transformers reads two other files in place of a class's own.
    names = tokenizer.vocab_files_names.values()
    others = ("tokenizer.model", "tekken.json")
    if names and not any((folder / name).exists() for name in (*names, *others)):
        raise _none(folder, f"none of {', '.join(sorted({*names}))} is there")
    return tokenizer


def _none(folder: Path, reason: str) -> MoefyError:
    return MoefyError(
        f"{folder} has no tokenizer that loads ({reason}); copy the model's files there"
    )


def vocabulary_notes(tokenizer: Any, num_rows: int) -> list[str]:
    """Warnings on a tokenizer that does not fit a model of `num_rows` embeddings.

    Raises:
        MoefyError: code 3, when it has more pieces than the model has embeddings. Added tokens are
            only warned of: some models have one for pictures, which text never gives.
    """
    own, most = int(tokenizer.vocab_size), max(tokenizer.get_vocab().values(), default=0)
    if own > num_rows:
        raise MoefyError(
            f"the tokenizer has {own} pieces, the model {num_rows} embeddings; expected the "
            "tokenizer that belongs to the model"
        )
    if most >= num_rows:
        return [f"the tokenizer has added tokens up to id {most}, the model {num_rows} embeddings"]
    if most < 0.8 * num_rows:  # padding adds less
        return [f"the tokenizer has {most + 1} pieces for {num_rows} embeddings: is it the model's"]
    return []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise without special tokens, and without the warning that a text is long."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-text token if the tokenizer puts one before a text, else nothing."""
    first = tokenizer("x")["input_ids"][:1]
    known = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return first if first and first[0] in known else []


def require_rows(ids: Tensor, vocab_size: int | None) -> None:
    """Check that the model has an embedding for every id."""
    if vocab_size is not None and (largest := int(ids.max())) >= vocab_size:
        raise MoefyError(
            f"the tokenizer gives id {largest}, the model has {vocab_size} embeddings; expected "
            "the tokenizer that belongs to the model"
        )
