"""The teacher's own answers: written once, whole or not at all, and trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stopping import stopped_at
from transformers import AutoModelForCausalLM

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.evaluate.behaviour import own_prompts
from moefy.finetune import answers, last_stage
from moefy.finetune.run import answers_of, finetune
from moefy.finetune.trainer import Finetuner

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = {"tokens": 1024, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}
SAMPLED = {"answer_tokens": 90, "answer_temperature": 1.0}


@pytest.fixture(scope="module")
def dense(pico, tmp_path_factory):
    """A model with a chat template, whose answers end: a random one seldom ends by itself."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    shutil.copytree(pico("llama", max_position_embeddings=512), folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module")
def run(dense, converted):
    return converted(dense)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"What of {n} stones" + "?" * (n % 5)} for n in range(20)]
    rows += [{"prompt": [{"role": "user", "content": f"And {n}?"}]} for n in range(10)]
    rows += [
        {"messages": [{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")]}
        for n in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(prompts, **more):
    return build(None, {**SMALL, **SAMPLED, "answers": str(prompts), **more}, [])


def test_prompts_of_every_form_are_read(prompts):
    read = [turns for _, turns in answers.read_prompts(prompts)]
    assert [turns[-1]["content"] for turns in read[::10]] == [
        "What of 0 stones", "What of 10 stones", "And 0?", "user 0",
    ]  # fmt: skip
    assert all(turns[-1]["role"] == "user" for turns in read)


@pytest.mark.parametrize("end", [True, False])
def test_answers_are_what_the_model_would_say_next(dense, end):
    """Also where prompts of several lengths are answered together; judged token by token."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    batch = [[5, 6, 7], [9, 20, 30, 40, 50, 60], [11]]
    naive = []
    for prompt in batch:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        naive.append(ids[len(prompt) :])
    unused = next(token for token in range(1, 128) if not any(token in ids for ids in naive))
    stop = naive[0][6] if end else unused
    greedy = build(None, {}, ["answer_tokens=12"])
    given = answers.generate(model, batch, [stop], greedy, 0)
    for ids, answer in zip(naive, given, strict=True):
        assert answer == (ids[: ids.index(stop)] if stop in ids else None)


def test_answers_are_written_once_and_trained_on(run, dense, prompts, tmp_path, monkeypatch):
    cache, calls = tmp_path / "cache", []
    generate = answers.generate
    monkeypatch.setattr(answers, "generate", lambda *a: calls.append(a) or generate(*a))
    asked = settings(prompts, teacher_cache=str(cache))
    first = finetune(run, tmp_path / "first", asked)
    assert asked.data == () and len(calls) == 1
    (file,) = cache.glob("answers-*")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    (note,) = [note for note in first["train"]["notes"] if "do not end" in note]
    assert note.startswith(f"{40 - len(rows)} of 40 answers") and 10 < len(rows) < 40
    assert {turns[-1]["role"] for turns in rows} == {"assistant"}
    assert len(list(cache.glob("teacher-*"))) == 1  # their top-k log-probabilities
    second = finetune(run, tmp_path / "second", asked)
    assert len(calls) == 1 and second["validation"] == first["validation"]
    # Others of other settings, beside them.
    finetune(run, tmp_path / "third", settings(prompts, teacher_cache=str(cache), seed=1))
    assert len(list(cache.glob("answers-*"))) == 2
    assert first["train"]["source"] == str(prompts)


def test_a_mix_with_answers(run, prompts, text, tmp_path):
    asked = settings(f"{prompts}:1", data=[f"{text}:3"], answers_only=True, tokens=2048)
    summary = finetune(run, tmp_path / "out", asked)
    shares = {part["name"]: part["share"] for part in summary["train"]["parts"]}
    assert shares == {"text.txt": 0.75, "prompts.jsonl": 0.25}
    assert "kl, prompts.jsonl" in summary["validation"]["after"]
    assert 0 < summary["train"]["learned"]
    assert not answers_of(tmp_path / "out").exists()
    assert build(tmp_path / "out" / "moefy" / "recipe.toml", {}, []) == asked


def test_answers_that_were_stopped_go_on_behind_the_last_part(run, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "PART", 8)
    whole, other = tmp_path / "whole", tmp_path / "other"
    finetune(run, tmp_path / "a", settings(prompts, teacher_cache=str(whole)))
    generate, firsts = answers.generate, []

    def stopping(model, batch, ends, asked, seed):
        firsts.append(seed)
        if len(firsts) == 3:
            raise KeyboardInterrupt
        return generate(model, batch, ends, asked, seed)

    monkeypatch.setattr(answers, "generate", stopping)
    asked = settings(prompts, teacher_cache=str(other))
    with pytest.raises(KeyboardInterrupt):
        finetune(run, tmp_path / "b", asked)
    assert not list(other.glob("*.jsonl"))
    (draft,) = other.glob("*.part")
    with draft.open("a") as file:  # a line that a kill has cut
        file.write('[{"role": "user"')
    finetune(run, tmp_path / "b", asked)
    assert firsts == [0, 8, 16, 16, 24, 32]
    ((one,), (two,)) = whole.glob("answers-*"), other.glob("answers-*")
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_what_cannot_be_answered_is_refused(run, dense, prompts, tmp_path, pico, converted):
    def refused(says, code, prompts=prompts, run=run, **more):
        with pytest.raises(MoefyError, match=says) as caught:
            finetune(run, tmp_path / "out", settings(prompts, **more))
        assert caught.value.code == code and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def file(name, content):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    refused("no answer of the teacher ends within 8", 3, answer_temperature=0.0, answer_tokens=8)
    refused("positions for", 3, answer_tokens=10**6)
    refused("no such file; expected rows such as", 3, prompts="nowhere.jsonl")
    refused("running text; expected rows", 3, prompts=file("a.txt", "a text"))
    refused("no prompts in it", 3, prompts=file("b.jsonl", ""))
    refused("c.jsonl, line 1: no prompt", 3, prompts=file("c.jsonl", '{"body": "x"}\n'))
    refused("d.jsonl, line 1: no prompt", 3, prompts=file("d.jsonl", '{"prompt": " "}\n'))
    refused("no chat template", 3, run=converted(pico("llama")))
    for values, says in (
        ({"answers": "p:1", "data": ["a"]}, "--data a has no share"),
        ({"answers": "p", "data": ["a:1"]}, "--answers p has no share"),
        ({"answers": "p:0", "data": ["a:1"]}, "--answers p: its share is 0"),
        ({"answers": ""}, "--answers is empty"),
    ):
        with pytest.raises(MoefyError, match=says) as caught:
            build(None, values, [])
        assert caught.value.code == 2


def test_the_end_of_a_turn_ends_an_answer(dense):
    """Where it is not the end of text: as in chat models whose base model has another."""
    tokenizer = answers.load_tokenizer(Path(dense))
    ends = answers._ends(tokenizer, [{"role": "user", "content": "x"}])
    assert ends == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHAT.replace("<|endoftext|>", "<|im_end|>\n")
    ends = answers._ends(tokenizer, [{"role": "user", "content": "x"}])
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# The last stage

LAST = {"answers": None, "tokens": 4096, "last_stage": 0.25, "answer_tokens": 60, "save_every": 13}


def test_the_last_stage_asks_nothing_that_is_measured():
    """Not the same prompts, nor five words of one in a row."""

    def runs(turns):
        words = [turn["content"].lower().split() for turn in turns]
        return {tuple(one[n : n + 5]) for one in words for n in range(len(one) - 4)}

    asked = [turns for _, turns in answers.read_prompts(last_stage.PROMPTS)]
    assert len({str(turns) for turns in asked}) == len(asked) == last_stage.MOST
    measured = [prompt["turns"] for prompt in own_prompts()]
    assert not set.union(*map(runs, asked)) & set.union(*map(runs, measured))
    assert set.union(*map(runs, asked)) & set.union(*map(runs, [*measured, asked[-1]]))


def test_the_last_sequences_come_last():
    rows = [*range(10), 90, 91, 92]
    order = last_stage.order(rows, 3, 28, seed=0)
    assert sorted(order[25:]) == [90, 91, 92]
    assert sorted(order[:10]) == sorted(order[10:20]) == [*range(10)]  # epochs
    assert len({*order[20:25]}) == 5 and order[:10] != order[10:20]
    assert sorted(last_stage.order(rows, 0, 13, seed=0)) == rows
    assert last_stage.order(rows, 3, 28, seed=1) != order


def rates(out):
    lines = (out / "moefy" / "finetune.jsonl").read_text().splitlines()
    return [row["lr"] for row in map(json.loads, lines) if "lr" in row]


def test_the_last_steps_learn_answers_alone(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(last_stage, "CONVERSATION", 20)  # the tiny model seldom ends
    asked = settings(None, data=[str(text)], **LAST)
    batches, compute = [], Finetuner.compute_loss

    def seen(self, model, inputs, *rest, **more):
        batches.append((self.state.global_step, bool(inputs["learned"].all())))
        return compute(self, model, inputs, *rest, **more)

    monkeypatch.setattr(Finetuner, "compute_loss", seen)
    summary = finetune(run, tmp_path / "whole", asked)
    assert batches == [(step, step < 12) for step in range(16)]
    shares = {part["name"]: part["share"] for part in summary["train"]["parts"]}
    assert shares == {"text.txt": 0.75, last_stage.SOURCE: 0.25}
    assert summary["selected"] is None  # of the stage, only its last step was measured
    whole = rates(tmp_path / "whole")
    most = max(whole)
    assert whole.index(most) < 4 and whole[10] < 0.05 * most
    falling = [most * last_stage.RATE * (1 - n / 4) for n in range(4)]
    assert whole[11:15] == pytest.approx(falling)  # a row has the rate of the next step
    with stopped_at(14):
        finetune(run, tmp_path / "out", asked)
    batches.clear()
    finetune(run, tmp_path / "out", asked)
    assert batches == [(step, step < 12) for step in range(13, 16)]
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_a_model_that_does_not_answer_has_no_last_stage(
    run, text, tmp_path, pico, converted, monkeypatch
):
    silent = {**LAST, "answer_temperature": 0.0, "answer_tokens": 8, "data": [str(text)]}
    for folder, code, says in (
        (run, 3, "answers to prompts have 0 tokens.*leave out --last-stage"),
        (converted(pico("llama")), 4, "--last-stage: the model has no chat template"),
    ):
        with pytest.raises(MoefyError, match=says) as caught:
            finetune(folder, tmp_path / "out", settings(None, **silent))
        assert caught.value.code == code
    # A preset does without it.
    rates = {name: 1e-4 for name in ("learning_rate", "router_learning_rate", "rest_learning_rate")}
    given = {**silent, "preset": "fast", "gradient_accumulation_steps": 1, **rates}
    summary = finetune(run, tmp_path / "out", settings(None, **given))
    assert any("it was left out" in note for note in summary["train"]["notes"])
    assert summary["tokens"] == 4096 and "parts" not in summary["train"]
