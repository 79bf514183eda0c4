"""Which tokens of a conversation are the assistant's, judged by transformers and by hand."""

import json

import pytest
import torch
from pico import build_tokenizer

from moefy.errors import MoefyError
from moefy.text import chat, packing
from moefy.text.documents import Document
from moefy.text.packing import Amount
from moefy.text.tokenizer import load_tokenizer

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}<|im_end|>\n" + TAIL
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}" + TAIL
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": " A stone.\n"},
    {"role": "user", "content": "assistant\nWhere?"},
    {"role": "assistant", "content": "assistant\nThere."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return load_tokenizer(folder)


def of(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def spoken(tokenizer, turns=TALK):
    text, spans = chat.answered(tokenizer, turns, "row")
    return text, "".join(text[first:last] for first, last in spans)


ANSWERS = " A stone.\n<|im_end|>\nassistant\nThere.<|im_end|>\n"


def test_answers_are_found_with_and_without_marks(tokenizer):
    text, answers = spoken(of(tokenizer, PLAIN))
    assert answers == ANSWERS
    assert spoken(of(tokenizer, MARKED)) == (text, answers)
    assert text == chat.written(tokenizer, TALK, "row")


def test_the_end_of_a_turn_that_is_the_end_of_text_is_the_assistants(tokenizer):
    """Packing adds that token again: it is learned behind an answer, and not behind a question."""
    end = tokenizer.eos_token
    of(tokenizer, PLAIN.replace("<|im_end|>\n", end))
    text, answers = spoken(tokenizer)
    assert answers == f" A stone.\n{end}assistant\nThere." and not text.endswith(end)
    for turns, learned in ((TALK, True), ([*TALK, TALK[1]], False)):
        document = Document(*chat.answered(tokenizer, turns, "row"))
        (ids,) = packing._gather(tokenizer, [document], share=10**6, enough=1)
        last = tokenizer.eos_token_id
        assert ids[-1] == (last if learned else ~last)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("share", [10**6, 40])
def test_the_mask_is_that_of_transformers(tokenizer, template, share):
    """Also where a long document is tokenised piece by piece."""
    out = of(tokenizer, MARKED).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer.chat_template = template
    document = Document(*chat.answered(tokenizer, TALK, "row"))
    parts = list(packing._shares(tokenizer, document, share))
    ids = [token for part in parts for token in part]
    assert [token if token >= 0 else ~token for token in ids] == out["input_ids"]
    assert [int(token >= 0) for token in ids] == out["assistant_masks"]
    assert 0 < sum(out["assistant_masks"]) < len(ids)


FORGETS = (  # as Qwen3 does with its thoughts
    HEAD + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n" + TAIL
)
HEADER = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"  # knows no opening of a reply
MARKS_NONE = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
FIRST = "{{ raise_exception('no') if messages[0].role == 'assistant' }}" + PLAIN


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        (FORGETS, TALK, "writes a turn otherwise once others follow"),
        (HEADER, TALK, "does not say where a reply begins"),
        (MARKS_NONE, TALK, "marks no text as the assistant's"),
        (PLAIN, TALK[:2], "no turn is the assistant's"),
        (FIRST, TALK[2:], "the model's chat template refuses"),
        (None, TALK, "no chat template"),
    ],
)
def test_no_mask_is_guessed(tokenizer, template, turns, says):
    with pytest.raises(MoefyError, match=says) as caught:
        spoken(of(tokenizer, template), turns)
    assert caught.value.code == 3 and "\n" not in str(caught.value)


def test_a_template_that_only_differs_in_the_last_turn_can_be_told_for_one_answer(tokenizer):
    _, answers = spoken(of(tokenizer, FORGETS), TALK[:3])
    assert answers == "<think></think> A stone.\n<|im_end|>\n"


def test_a_template_that_opens_replies_with_nothing_is_told(tokenizer):
    of(
        tokenizer,
        "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' "
        "else ' ' + m.content + '</s>' }}{% endfor %}",
    )
    assert spoken(tokenizer, TALK[1:3])[1] == "  A stone.\n</s>"


def test_packed_sequences_learn_answers_and_running_text(tokenizer, tmp_path):
    """Letters tell who wrote them: u the user, a the assistant, t a text."""
    of(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [
        {"messages": [{"role": r, "content": r[0] * (40 + n)} for r in ("user", "assistant")]}
        for n in range(40)
    ] + [{"text": "t" * (30 + n)} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    amount = Amount(2048, 64)
    whole = packing.load(tokenizer, str(file), amount)
    assert whole.learned_BT is None
    tokens = packing.load(tokenizer, str(file), amount, answers_only=True)
    assert tokens.trained != whole.trained and tokens.sha256 == whole.sha256
    learned, other = (
        {tokenizer.decode(token) for token in tokens.ids_BT[tokens.learned == is_learned].unique()}
        for is_learned in (True, False)
    )
    assert learned == {"a", "t", tokenizer.eos_token} and other == {"u"}
    assert torch.equal(tokens.ids_BT, whole.ids_BT)
    assert tokens.figures()["learned"] == int(tokens.learned.sum())


def test_a_tokenizer_without_places_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(MoefyError, match="--answers-only: .*Tokenizer does not tell") as caught:
        packing.load(tokenizer, str(tmp_path), Amount(2048, 64), answers_only=True)
    assert caught.value.code == 4
