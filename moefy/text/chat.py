"""Conversations as text, by a model's chat template."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from moefy.errors import MoefyError, first_line
from moefy.text.tokenizer import first_ids

ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call"),
    "system": ("system",),
    "tool": ("tool", "function_response", "observation"),
}
SPEAKERS = {speaker: role for role, speakers in ROLES.items() for speaker in speakers}
"""A turn's speaker (`from`), and the role that templates know."""

DAY = datetime(2025, 1, 1)
TODAY = (
    "{{%- macro strftime_now(format) -%}}{{{{ format.replace('%-', '%'){} }}}}{{%- endmacro -%}}"
)
TODAY = TODAY.format(
    "".join(f".replace('%{c}', '{DAY.strftime('%' + c)}')" for c in "aAbBdHjmMpSyY")
)
"""Goes before a template that prints the date, so the same rows give the same text on any day."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a template: what follows is the assistant's."""

EXPECTED = "expected turns such as {'role': 'user', 'content': '...'}, or with `from` and `value`"


def conversation(row: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a row, unchecked, if it holds any."""
    values = (row.get(field) for field in ("messages", "conversations"))
    return next((turns for turns in values if isinstance(turns, list)), None)


def turns(value: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Turns of either form with role and content, the content a string.

    Raises:
        MoefyError: code 3 for a turn of another form, of an unknown speaker, or with something
            else than text.
    """
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1)]


def written(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], where: str, *, reply: bool = False
) -> str:
    """A conversation as text; with `reply`, up to where the assistant's answer begins.

    The text lacks the beginning-of-text token if the tokenizer puts one before every text, and the
    end-of-text token: packing adds both.

    Raises:
        MoefyError: code 3 for a tokenizer without a chat template, and for turns that it refuses.
    """
    if not turns:
        return ""
    text = _rendered(tokenizer, turns, where, reply=reply)
    start, stop = _inner(tokenizer, text, reply=reply)
    return text[start:stop]


def answered(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], where: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A conversation as `written` gives it, and the spans of its characters that the assistant
    writes, the token that ends its turn included.

    They are what the template marks with `{% generation %}`. Without such marks they are what each
    of the assistant's turns adds to the text before it, which ends where a reply would begin.

    Raises:
        MoefyError: code 3 as `written`, and where the spans cannot be found.
    """
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _lost(where, "no turn is the assistant's")
    text = _rendered(tokenizer, turns, where)
    if GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked(tokenizer, turns, where)
    else:
        spans = _differences(tokenizer, turns, where, text)
    start, stop = _inner(tokenizer, text)
    inner = [(max(first, start) - start, min(last, stop) - start) for first, last in spans]
    spans = tuple((first, last) for first, last in inner if first < last)
    if not spans:
        raise _lost(where, "the chat template marks no text as the assistant's")
    return text[start:stop], spans


def tells_answers(tokenizer: Any) -> bool:
    """Whether there is a chat template, and it can be told which tokens are answers."""
    talk = [{"role": role, "content": "Yes."} for role in ("user", "assistant") * 2]
    with contextlib.suppress(MoefyError):
        return tokenizer.is_fast and bool(answered(tokenizer, talk, "a conversation"))
    return False


def _marked(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], where: str
) -> list[tuple[int, int]]:
    """What the template marks as generated, token by token."""
    out = _rendered(
        tokenizer,
        turns,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    pairs = zip(out["offset_mapping"], out["assistant_masks"], strict=True)
    return [tuple(span) for span, marked in pairs if marked]


def _differences(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], where: str, text: str
) -> list[tuple[int, int]]:
    """What each turn of the assistant adds to `text`, which is all turns as they are rendered."""
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _rendered(tokenizer, turns[:number], where)
        opened = _rendered(tokenizer, turns[:number], where, reply=True)
        after = _rendered(tokenizer, turns[: number + 1], where)
        if not (text.startswith(after) and after.startswith(opened)):
            raise _lost(where, "the chat template writes a turn otherwise once others follow")
        span = after[len(opened) :].lstrip()
        # A template that knows no opening of a reply: its header would count as the answer.
        if opened == before and not span.startswith(turn["content"].strip()):
            raise _lost(where, "the chat template does not say where a reply begins")
        spans.append((len(opened), len(after)))
    return spans


def _lost(where: str, reason: str) -> MoefyError:
    return MoefyError(
        f"{where}: which tokens are answers cannot be told ({reason}); expected a template with "
        "{% generation %}, or whose turns only add text; leave out the row or --answers-only"
    )


def _rendered(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    where: str,
    *,
    reply: bool = False,
    **more: Any,
) -> Any:
    """The turns as the template writes them; `more` are further options of the tokenizer."""
    if not getattr(tokenizer, "chat_template", None):
        raise MoefyError(
            f"{where}: a conversation, and the model's tokenizer has no chat template to write it "
            "with; put a chat_template.jinja into the model's folder, or join the turns into a "
            "field 'text'"
        )
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            list(turns),
            chat_template=TODAY * ("strftime_now" in template) + template,
            add_generation_prompt=reply,
            **{"tokenize": False, **more},
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise MoefyError(
            f"{where}: the model's chat template refuses the conversation ({first_line(error)}); "
            "expected roles and turns that it knows; change or leave out the row"
        ) from None


def _inner(tokenizer: Any, text: str, *, reply: bool = False) -> tuple[int, int]:
    """Where a rendered text starts and stops without the tokens that packing adds."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    adds = bos and text.startswith(bos) and first_ids(tokenizer) == [tokenizer.bos_token_id]
    stop = len(text)
    if not reply and eos and text.rstrip().endswith(eos):
        stop = len(text.rstrip()) - len(eos)
    return len(bos) if adds else 0, stop


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise MoefyError(f"{where}: a turn is {type(turn).__name__}; {EXPECTED}")
    if isinstance(role := turn.get("role"), str):
        # What else templates read: names, calls of tools. Parquet has a null where JSON has none.
        more = {key: value for key, value in turn.items() if value is not None}
        role = SPEAKERS[role] if role in ("human", "gpt") else role
        return more | {"role": role, "content": _content(turn.get("content"), where)}
    if not isinstance(speaker := turn.get("from"), str):
        fields = ", ".join(str(key)[:40] for key in list(turn)[:8]) or "none"
        raise MoefyError(f"{where}: the fields are {fields}; {EXPECTED}")
    if speaker.lower() not in SPEAKERS:
        raise MoefyError(
            f"{where}: from {speaker[:40]!r}; expected one of {', '.join(SPEAKERS)}; rename it"
        )
    content = _content(turn.get("value"), where)
    return {"role": SPEAKERS[speaker.lower()], "content": content}


def _content(content: Any, where: str) -> str:
    """The text of a turn, whose parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MoefyError(
            f"{where}: content is {type(content).__name__}; expected text, or parts of it"
        )
    texts = []
    for part in content:
        known = isinstance(part, str | Mapping)
        part = part if isinstance(part, Mapping) else {"text": part}
        kind = str(part.get("type", "text")) if known else type(part["text"]).__name__
        texts.append(part.get("text"))
        if not kind.endswith("text") or not isinstance(texts[-1], str):
            raise MoefyError(
                f"{where}: a part of type {kind[:40]!r}; expected text alone; leave out the row"
            )
    return "".join(texts)
