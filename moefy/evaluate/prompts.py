"""What models write after a prompt, and how likely they find the answers that should be there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moefy.errors import MoefyError

PROMPTS = (
    "The main reason why the sea is salty is that",
    "def fibonacci(n):\n    ",
    "Q: What is the capital of France?\nA:",
)
"""Prose, code and a question."""

NEW_TOKENS = 32

WORST = 0.1
"""Share of the prompts, those with the largest drops, that is flagged: at least one."""

NOTICEABLE = 0.1
"""Nats per token: a smaller drop is not flagged."""


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """What a model writes after `prompt`, greedily, on one line."""
    return " ".join(written(model, tokenizer, prompt, new_tokens).split())


def written(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """What a model writes after `prompt`, greedily."""
    ids_1T = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, ids_1T.shape[1] :], skip_special_tokens=True)


def read_prompts(path: Path) -> list[dict[str, str | None]]:
    """The prompts of a JSONL file; an answer may be missing.

    Raises:
        MoefyError: code 3, naming the line, for a file or a line that is something else.
    """
    expected = 'expected lines such as {"prompt": "...", "answer": "..."}'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise MoefyError(f"{path}: no readable UTF-8 file; {expected}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise MoefyError(f"{path}, line {number}: no JSON; {expected}") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        answer = row.get("answer") if isinstance(row, dict) else None
        wrong = not isinstance(prompt, str) or not prompt.strip()
        if wrong or not (answer is None or isinstance(answer, str) and answer.strip()):
            raise MoefyError(f"{path}, line {number}: no prompt, or an empty answer; {expected}")
        found.append({"prompt": prompt, "answer": answer})
    if not found:
        raise MoefyError(f"{path}: no prompts in it; {expected}")
    return found


def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean log-likelihood of the tokens of `answer` after `prompt`, nats per token.

    Answers are tokenised apart from their prompts, a space before them where neither has one.
    """
    glue = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(glue + answer, add_special_tokens=False)["input_ids"]
    ids_1T = torch.tensor([head + tail])
    with torch.inference_mode():
        logits_TV = model(ids_1T, use_cache=False, logits_to_keep=len(tail) + 1).logits[0, :-1]
    log_p_TV = logits_TV.float().log_softmax(-1)
    return float(log_p_TV.gather(1, torch.tensor(tail)[:, None]).mean())


def regressions(
    rows: Sequence[Mapping[str, Any]], main: str, dense: str = "dense"
) -> list[dict[str, Any]]:
    """Rows of `scores` by label, with how far `main` is below dense, and the worst ones flagged."""
    drops = [row["scores"][dense] - row["scores"][main] for row in rows]
    count = max(1, math.floor(WORST * len(rows)))
    order = sorted(range(len(rows)), key=lambda number: (-drops[number], number))
    worst = {number for number in order[:count] if drops[number] > NOTICEABLE}
    return [
        {**row, "drop": drop, "flagged": number in worst}
        for number, (row, drop) in enumerate(zip(rows, drops, strict=True))
    ]
