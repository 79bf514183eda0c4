"""Answers to prompts, and how they behave: whether they loop, stop, and hold the JSON asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moefy.evaluate.shares import share
from moefy.text import chat

OWN = Path(__file__).with_name("behaviour.jsonl")
"""Prompts of several kinds, written for this package: a turn of the user, or a dialogue. `json`
is true, or names the keys that are asked for."""

NEW_TOKENS = 192
"""Most tokens of an answer. The dense model ends most answers to `OWN` before."""

LEAST_ROOM = 32
"""Tokens that the context must leave for an answer."""

BATCH = 16
"""Prompts that are answered at a time."""

REPEATS, LOOP = 3, 30
"""How often the end of a looping answer repeats, and how many words that covers, at least."""

NUMBER = re.compile(r"^\W*\d+[.):](?=\s)", re.MULTILINE)
"""The number of an item of a list, which counts even where the items repeat."""

RULE = re.compile(r"([^\w\s]|_)\1{3}")
"""Four times the same sign, which count as one: a ruled line has 40 to 80 signs, and is no loop."""

WORD = re.compile(r"[A-Za-z\u00c0-\u058f]+|\d+|\S")
"""A word of an alphabet, a number, or one other sign."""

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""The first code block of an answer."""

MEANING = {
    "loops": f"the answer ends in words that repeat {REPEATS} times or more, over {LOOP} words or "
    "signs at least; the numbers of list items count as the same word",
    "stops": "the model ends the answer itself, before the limit of tokens",
    "json": "an answer to a prompt that asks for JSON is an object or an array; it may stand in a "
    "code block",
    "keys": "that JSON is an object with all keys that the prompt names",
}
"""The figures of a set of prompts, each a share of its answers."""


def own_prompts() -> list[dict[str, Any]]:
    """The prompts of `OWN`, as `prompts.read_prompts` gives those of a file."""
    rows = [json.loads(line) for line in OWN.read_text("utf-8").splitlines()]
    return [
        {"turns": [{"role": "user", "content": row.get("prompt")}], "json": False}
        | ({"turns": row["messages"]} if "messages" in row else {})
        | {key: row[key] for key in ("kind", "json") if key in row}
        for row in rows
    ]


def is_chat(tokenizer: Any) -> bool:
    """Whether prompts are written by a chat template; else a model need not end its answers."""
    return bool(getattr(tokenizer, "chat_template", None))


def question(tokenizer: Any, prompt: Mapping[str, Any], where: str) -> str:
    """The text of a prompt: by the chat template, or the turns alone where there is none.

    Raises:
        MoefyError: code 3 for turns that the template refuses.
    """
    if is_chat(tokenizer):
        return chat.written(tokenizer, prompt["turns"], where, reply=True)
    return "\n\n".join(turn["content"] for turn in prompt["turns"])


def answers(
    model: Any, tokenizer: Any, questions: Sequence[str], new_tokens: int
) -> list[dict[str, Any]]:
    """What a model writes after each of `questions`, by greedy decoding without penalties.

    The questions are answered together, padded on the left. In float32 each answer is the one that
    its question gets alone; in 16 bits sums are rounded in another order, so words may differ.
    An answer has its `text`, the number of its `tokens`, and whether it `stops`.
    """
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    pad = next(id for id in (tokenizer.pad_token_id, *sorted(stops), 0) if id is not None)
    ids = [tokenizer(question)["input_ids"] for question in questions]
    length = max(map(len, ids))
    ids_BT = torch.tensor([[pad] * (length - len(one)) + one for one in ids])
    mask_BT = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in ids])
    with torch.inference_mode():
        written_BT = model.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
        )[:, length:]
    result = []
    for written in written_BT.tolist():
        end = next((place for place, id in enumerate(written) if id in stops), None)
        text = tokenizer.decode(written[:end], skip_special_tokens=True)
        result.append({"text": text, "tokens": len(written[:end]), "stops": end is not None})
    return result


def loops(text: str, *, stops: bool = True) -> bool:
    """Whether a text ends in words that repeat at least `REPEATS` times, over `LOOP` words or more.

    A phrase of any length may repeat, and the last time may be cut off; so may the last word of an
    answer that does not stop.

    Source: Holtzman et al. (2020), arXiv:1904.09751, who count an ending phrase that repeats three
    times. We ask for `LOOP` words, since a table, a list or a refrain may end so, and leave out the
    numbers of list items.

    >>> loops("It is so. " * 3), loops("It is so. " * 12)
    (False, True)
    """
    words = WORD.findall(RULE.sub(r"\1", NUMBER.sub("0.", text)))
    words = words[::-1] if stops else words[-2::-1]
    for period in range(1, len(words) // REPEATS + 1):
        pairs = zip(words, words[period:], strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(words) - period)
        if same + period >= max(LOOP, REPEATS * period):
            return True
    return False


def read_json(text: str) -> Any:
    """The object or array that an answer holds, in its first code block or alone; else None."""
    block = FENCE.search(text)
    try:
        value = json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def judged(answer: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """An answer with the figures of `MEANING`; `asked` is the `json` of its prompt."""
    result = {**answer, "loops": loops(answer["text"], stops=answer["stops"])}
    if asked:
        value = read_json(answer["text"])
        result["json"] = value is not None
        if isinstance(asked, list):
            result["keys"] = isinstance(value, dict) and {*asked} <= {*value}
    return result


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The `share` of each figure by each model, over the rows whose answers have it."""
    result: dict[str, dict[str, Any]] = {}
    for figure in MEANING:
        some = [row["written"] for row in rows if figure in row["written"]["dense"]]
        for label in some[0] if some else ():
            values, dense = ([one[name][figure] for one in some] for name in (label, "dense"))
            result.setdefault(label, {})[figure] = share(values, dense)
    return result


WORSE = {
    "loops": ("LOOPS MORE OFTEN", "end in a loop", 1),
    "stops": ("STOPS LESS OFTEN", "end before the limit of tokens", -1),
    "json": ("BREAKS JSON MORE OFTEN", "hold the JSON that was asked for", -1),
}
"""The start and the end of a sentence on a figure, and the sign of what is worse."""


def worse(behaviour: Mapping[str, Any], label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A sentence, and its reason, for each figure that is surely worse than dense's (95 %)."""
    for name, answered in behaviour.get("sets", {}).items():
        for figure, (head, end, sign) in WORSE.items():
            row = answered["figures"][label].get(figure)
            if row is None or figure == "stops" and not behaviour["chat"]:
                continue
            low, high = row["difference_low"], row["difference_high"]
            if min(sign * low, sign * high) > 0:
                dense = answered["figures"]["dense"][figure]["count"]
                yield (
                    f"{head} on {name}: {row['count']} of {row['of']} answers {end}, {dense} of "
                    f"the dense model's (difference at 95 %: {low:+.0%} to {high:+.0%}).",
                    {"figure": figure, "prompts": name, **row},
                )
