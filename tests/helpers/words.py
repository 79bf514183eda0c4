"""A tokenizer of words, texts of them, and how text is refused."""

import dataclasses

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moefy.errors import MoefyError
from moefy.text.packing import Amount

BOS, EOS, WORDS = 1, 2, 1000


def word_tokenizer(*, adds_bos=False, eos=True):
    """The word `w<n>` is the id n + 3."""
    vocabulary = {"<unk>": 0, "<bos>": BOS, "<eos>": EOS} | {f"w{n}": n + 3 for n in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        words.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>" if eos else None,
    )


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def assert_refused(act, *fragments, code=3):
    """The one-line message of the MoefyError that `act` raises."""
    with pytest.raises(MoefyError) as caught:
        act()
    message = str(caught.value)
    assert caught.value.code == code
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def split_amount(options):
    """The amount that some options make, and the other options."""
    amount = {field.name for field in dataclasses.fields(Amount)} & options.keys()
    others = {key: value for key, value in options.items() if key not in amount}
    return Amount(**{key: options[key] for key in amount}), others
