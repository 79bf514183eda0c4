"""Answers to prompts: the text that a model writes, and the likelihood of a given answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.text import chat
from moefy.text.rows import lines, rows

EXPECTED = (
    'expected rows such as {"prompt": "...", "answer": "..."}, or {"messages": [{"role": "user", '
    '"content": "..."}]}, or strings, or a line of text for each prompt'
)

PROMPTS = (
    "The main reason why the sea is salty is that",
    "def fibonacci(n):\n    ",
    "Q: What is the capital of France?\nA:",
)
"""Prose, code and a question."""

NEW_TOKENS = 32

WORST = 0.1
"""Share of the prompts that may be flagged, those with the largest drops; at least one."""

NOTICEABLE = 0.1
"""Nats per token: a smaller drop is not flagged."""


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """The text that a model writes after `prompt`, by greedy decoding."""
    ids_1T = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, ids_1T.shape[1] :], skip_special_tokens=True)


def read_prompts(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of a file of rows, or of lines of text; a missing answer is None.

    A row is a prompt, or holds a `prompt`, which is used unchanged, or the turns of a conversation
    (see `chat`). The chat template of `tokenizer` then writes the prompt, and a last turn of the
    assistant is the answer. The key `chat` of the result marks such a row. `turns` are those of the
    prompt, and `json` says whether it asks for JSON, or for which keys of an object.

    Raises:
        MoefyError: code 3, naming the row, for a file or a row of another kind.
    """
    if not (file := path.expanduser()).is_file():
        raise MoefyError(f"{path}: no readable file; {EXPECTED}")
    stored = rows(file, kinds=(dict, str))
    if stored is None:
        numbered = enumerate(lines(file), 1)
        stored = ((f"{path}, line {number}", line) for number, line in numbered if line.strip())
    prompts = [_prompt(row, where, tokenizer) for where, row in stored]
    if not prompts:
        raise MoefyError(f"{path}: no prompts in it; {EXPECTED}")
    return prompts


def _prompt(row: Mapping[str, Any] | str, where: str, tokenizer: Any) -> dict[str, Any]:
    row = {"prompt": row.strip()} if isinstance(row, str) else row
    prompt, answer, turns = row.get("prompt"), row.get("answer"), []
    is_chat = prompt is None and bool(chat.conversation(row))
    if is_chat:
        turns = chat.turns(chat.conversation(row) or [], where)
        if turns[-1]["role"] == "assistant":
            answer = turns.pop()["content"].strip()
        prompt = chat.written(tokenizer, turns, where, reply=True)
    wrong = not isinstance(prompt, str) or not prompt.strip()
    if wrong or not (answer is None or isinstance(answer, str) and answer.strip()):
        raise MoefyError(f"{where}: no prompt, or an empty answer; {EXPECTED}")
    asked = row.get("json") or False
    keys = asked if isinstance(asked, list) else []
    if not isinstance(asked, bool | list) or not all(isinstance(key, str) for key in keys):
        raise MoefyError(
            f"{where}: json is {str(asked)[:40]}; expected true for a prompt that asks for JSON, "
            "or a list of the keys that it asks for"
        )
    turns = turns or [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "answer": answer, "chat": is_chat, "turns": turns, "json": asked}


def likelihood(
    model: Any, tokenizer: Any, prompt: str, answer: str, *, chat: bool = False
) -> float:
    """Mean log-likelihood of the tokens of `answer` after `prompt`, nats per token.

    Answers are tokenised apart from their prompts, with a space between where neither has one; in a
    `chat` the template has written the separator.
    """
    glue = "" if chat or prompt[-1:].isspace() or answer[:1].isspace() else " "
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(glue + answer, add_special_tokens=False)["input_ids"]
    ids_1T = torch.tensor([head + tail], device=model.device)
    with torch.inference_mode():
        logits_TV = model(ids_1T, use_cache=False, logits_to_keep=len(tail) + 1).logits[0, :-1]
    log_p_TV = logits_TV.float().log_softmax(-1)
    return float(log_p_TV.gather(1, ids_1T[0, len(head) :, None]).mean())


def regressions(rows: Sequence[Mapping[str, Any]], main: str) -> list[dict[str, Any]]:
    """The rows with the `drop` of `main` below dense in their `scores`; the worst are flagged."""
    drops = [row["scores"]["dense"] - row["scores"][main] for row in rows]
    count = max(1, math.floor(WORST * len(rows)))
    order = sorted(range(len(rows)), key=lambda number: (-drops[number], number))
    worst = {number for number in order[:count] if drops[number] > NOTICEABLE}
    return [
        {**row, "drop": drop, "flagged": number in worst}
        for number, (row, drop) in enumerate(zip(rows, drops, strict=True))
    ]
