"""The teacher's own answers to prompts, written once and kept as rows of conversations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.files.lock import locked
from moefy.files.publish import replacing
from moefy.finetune.inputs import batch_that_fits, load_teacher
from moefy.models.load import plain_config
from moefy.text import chat
from moefy.text.rows import rows
from moefy.text.tokenizer import encode, first_ids, load_tokenizer

EXPECTED = (
    'expected rows such as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
)

PART = 64
"""Prompts that are answered between two writes: a stopped run goes on behind the last."""

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Answers:
    """A file of conversations, and what is missing in it."""

    file: Path
    count: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Answerer:
    """A dense model that answers prompts, and where its answers go."""

    teacher: Path
    digests: dict[str, str]
    """Of the teacher's files."""
    settings: Settings
    dtype: torch.dtype
    folder: Path
    progress: Callable[[int, int], None] = lambda *_: None

    def answers(self, file: Path, num: int | None = None) -> Answers:
        """The answers to the prompts of `file`, or to its first `num`, from an earlier run where
        there are any.

        Their file is whole or not there. Its name is a digest of all that they depend on. Answers
        that do not end within `answer_tokens` are left out: they would teach to go on for ever.

        Raises:
            MoefyError: code 3 for a file that holds no prompts, and for prompts that are too long;
                5 where memory does not hold the model.
        """
        tokenizer = load_tokenizer(self.teacher)
        prompts = read_prompts(file)[:num]
        texts = [chat.written(tokenizer, turns, where, reply=True) for where, turns in prompts]
        output = self.folder / f"answers-{self._digest(texts)}.jsonl"
        if not output.exists():
            with locked(output.with_suffix(".lock"), output):
                self._write(output, tokenizer, texts, [turns for _, turns in prompts])
            output.with_suffix(".lock").unlink(missing_ok=True)
        count = len(output.read_text("utf-8").splitlines())
        missing = len(prompts) - count
        note = f"{missing:,} of {len(prompts):,} answers are empty or do not end, not used"
        return Answers(output, count, (note,) if missing else ())

    def _digest(self, texts: Sequence[str]) -> str:
        settings = self.settings
        key = [sorted(self.digests.items()), list(texts), settings.answer_tokens, str(self.dtype)]
        if settings.answer_temperature:
            key += [settings.answer_temperature, settings.seed]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]

    def _write(
        self, output: Path, tokenizer: Any, texts: Sequence[str], prompts: Sequence[Turns]
    ) -> None:
        """Answer part by part into a file beside `output`, which is renamed at the end."""
        ids = [first_ids(tokenizer) + encode(tokenizer, text) for text in texts]
        batch_size = self._batch_size(max(map(len, ids)))
        draft, model = output.with_suffix(".part"), None
        # Behind the last line end is what a kill has cut.
        lines = draft.read_text("utf-8").split("\n")[:-1] if draft.exists() else []
        done = len(lines) // PART * PART
        draft.write_text("".join(f"{line}\n" for line in lines[:done]), "utf-8")
        ends = _ends(tokenizer, prompts[0])
        for first in range(done, len(ids), PART):
            self.progress(first, len(ids))
            model = model or load_teacher(self.teacher, self.settings, self.dtype)
            last = min(first + PART, len(ids))
            new = []
            for start in range(first, last, batch_size):
                batch = ids[start : min(start + batch_size, last)]
                new += generate(model, batch, ends, self.settings, self.settings.seed + start)
            with draft.open("a", encoding="utf-8") as file:
                for turns, answer in zip(prompts[first:last], new, strict=True):
                    # What has not ended counts as empty.
                    text = tokenizer.decode(answer or [], skip_special_tokens=True)
                    file.write(json.dumps([*turns, {"role": "assistant", "content": text}]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.progress(len(ids), len(ids))
        talks = map(json.loads, draft.read_text("utf-8").splitlines())
        ended = [turns for turns in talks if turns[-1]["content"].strip()]
        with replacing(output) as whole:
            rows = "".join(json.dumps({"messages": turns}) + "\n" for turns in ended)
            whole.write_text(rows, "utf-8")
        draft.unlink()

    def _batch_size(self, longest: int) -> int:
        """How many prompts are answered at a time, as memory allows."""
        config = plain_config(self.teacher).get_text_config()
        length = longest + self.settings.answer_tokens
        most = getattr(config, "max_position_embeddings", None) or length
        if length > most:
            raise MoefyError(
                f"--answers: a prompt of {longest:,} tokens and {self.settings.answer_tokens:,} of "
                f"an answer, but the teacher has positions for {most:,}; shorten the prompt, or "
                "lower answer_tokens"
            )
        what = "a model that answers prompts"
        size = batch_that_fits(self.teacher, self.dtype, length, what, "leave out --answers")
        return min(PART, size)


def read_prompts(file: Path) -> list[tuple[str, Turns]]:
    """The prompts of a file of rows, each with its place: turns whose last is not the assistant's.

    A row holds a `prompt`, which is a string or turns, or the turns of a conversation, whose last
    answer is left out.

    Raises:
        MoefyError: code 3, naming the row, for a file or a row of another kind.
    """
    if not file.is_file():
        raise MoefyError(f"--answers {file}: no such file; {EXPECTED}")
    if (stored := rows(file)) is None:
        raise MoefyError(f"--answers {file}: running text; {EXPECTED}")
    prompts = [(where, _turns(row, where)) for where, row in stored]
    if not prompts:
        raise MoefyError(f"--answers {file}: no prompts in it; {EXPECTED}")
    return prompts


def _turns(row: dict[str, Any], where: str) -> Turns:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = chat.turns(prompt if isinstance(prompt, list) else chat.conversation(row) or [], where)
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise MoefyError(f"{where}: no prompt; {EXPECTED}")
    return turns


def generate(
    model: Any, prompts: Sequence[list[int]], ends: list[int], settings: Settings, seed: int
) -> list[list[int] | None]:
    """The ids of an answer to each prompt, without the token that ends it; None without one."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids_BT = torch.tensor([[ends[0]] * (width - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    # Not the model's own defaults: a penalty on repetition, say, would be taught as well.
    model.generation_config = GenerationConfig(
        max_new_tokens=settings.answer_tokens,
        do_sample=settings.answer_temperature > 0,
        temperature=settings.answer_temperature or 1.0,
        top_k=0,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        out_BT = model.generate(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device))
    answers = []
    for ids in out_BT[:, width:].tolist():
        stop = next((place for place, token in enumerate(ids) if token in ends), None)
        answers.append(None if stop is None else ids[:stop])
    return answers


def _ends(tokenizer: Any, turns: Turns) -> list[int]:
    """The tokens that end an answer: the end of text, and what the template writes behind a turn
    of the assistant, if that is one token of its own kind."""
    probe = [*turns, {"role": "assistant", "content": "x"}]
    opened = chat.written(tokenizer, turns, "--answers", reply=True)
    behind = chat.written(tokenizer, probe, "--answers").removeprefix(opened).partition("x")[2]
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    first = encode(tokenizer, behind.strip())[:1]
    if first and first[0] in tokenizer.added_tokens_decoder:
        ends += first
    if not ends:
        raise MoefyError(
            "--answers: the tokenizer has no token that ends a text; expected one that belongs to "
            "a chat model",
            code=4,
        )
    return list(dict.fromkeys(ends))
