"""Conversations as text, by a model's chat template."""

from __future__ import annotations

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
    if not getattr(tokenizer, "chat_template", None):
        raise MoefyError(
            f"{where}: a conversation, and the model's tokenizer has no chat template to write it "
            "with; put a chat_template.jinja into the model's folder, or join the turns into a "
            "field 'text'"
        )
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            list(turns),
            chat_template=TODAY * ("strftime_now" in template) + template,
            add_generation_prompt=reply,
            tokenize=False,
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise MoefyError(
            f"{where}: the model's chat template refuses the conversation ({first_line(error)}); "
            "expected roles and turns that it knows; change or leave out the row"
        ) from None
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and text.startswith(bos) and first_ids(tokenizer) == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    if not reply and eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text


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
