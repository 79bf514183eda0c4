"""Answers loop, stop and hold JSON where they were planted to, and batches change no answer."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate import behaviour, fail_if, prompts
from moefy.evaluate import measure as parts
from moefy.evaluate.advice import advice
from moefy.evaluate.behaviour import answers, figures, judged, loops, own_prompts, read_json
from moefy.evaluate.candidates import load_model
from moefy.evaluate.prepare import prepare
from moefy.evaluate.run import evaluate
from moefy.evaluate.shares import paired_interval, share
from moefy.runs.folder import open_run
from moefy.text.tokenizer import load_tokenizer

QUESTIONS = ["The", "A distant river and its old stone", "Why not?", "x", "Every captain again, 12"]


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral", "moefy"])
def moe(request, pico, converted):
    """A converted model and its tokenizer; moefy's own class has learned positions here."""
    own = request.param == "moefy"
    folder = converted(pico("gpt2" if own else "llama"), target=request.param)
    return load_model(folder, torch.float32), load_tokenizer(folder)


def alone(model, tokenizer, question, count):
    """The likeliest next token, `count` times, without a cache, a batch or `generate`."""
    ids = tokenizer(question)["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_an_answer_in_a_batch_is_the_one_that_its_question_gets_alone(moe):
    model, tokenizer = moe
    expected = [alone(model, tokenizer, question, 12) for question in QUESTIONS]
    assert len({*map(tuple, expected)}) == len(QUESTIONS)
    for answer, ids in zip(answers(model, tokenizer, QUESTIONS, 12), expected, strict=True):
        ids = ids[: ids.index(0)] if 0 in ids else ids  # 0 ends a text
        assert answer["text"] == tokenizer.decode(ids) and answer["tokens"] == len(ids)
    # The negative control: without the mask the padding is read, and short questions suffer.
    ids = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[0] * (longest - len(one)) + one for one in ids])
    seen_BT = torch.ones_like(ids_BT)
    written_BT = model.generate(ids_BT, attention_mask=seen_BT, max_new_tokens=12, do_sample=False)
    assert written_BT[:, longest:].tolist() != expected


def test_an_answer_stops_at_any_token_that_ends_a_text(moe, monkeypatch):
    model, tokenizer = moe
    first, second = (alone(model, tokenizer, question, 8) for question in QUESTIONS[:2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first[5], second[7]])
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 9.0)  # greedy has none
    written = answers(model, tokenizer, QUESTIONS[:2], 8)
    for answer, ids in zip(written, (first, second), strict=True):
        end = next((n for n, id in enumerate(ids) if id in (first[5], second[7], 0)), 8)
        assert (answer["tokens"], answer["stops"]) == (end, end < 8)
    assert not answers(model, tokenizer, QUESTIONS[:1], 1)[0]["stops"] or first[0] in (0, second[7])


# Loops

SENTENCE = "The river carries salt to the sea, and the sea keeps it. "
TIMES = "\n".join(f"7 x {number} = {7 * number}" for number in range(1, 21))
CODE = """def area(shape):
    if shape.kind == "circle":
        return math.pi * shape.radius ** 2
    if shape.kind == "square":
        return shape.side ** 2
    if shape.kind == "triangle":
        return shape.base * shape.height / 2
    raise ValueError(shape.kind)
"""
TABLE = "| Animal | Legs | Eggs |\n|---|---|---|\n" + "\n".join(
    f"| {name} | {legs} | yes |" for name, legs in (("hen", 2), ("ant", 6), ("frog", 4), ("owl", 2))
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A word to begin with. " + SENTENCE * 4, True),
        (SENTENCE * 3 + "The river carries salt to", True),
        ("\n".join(f"{number}. Use fresh fruit and rice." for number in range(1, 9)), True),
        ("\n\n".join(f"{number}) It is so." for number in range(1, 12)), True),
        ("no " * 40, True),
        ("!" * 150, True),
        ("[[" * 90, True),
        ("ja, ja, " * 20, True),
        ("\u6c34\u306f" * 20, True),
        ("\u043e\u0447\u0435\u043d\u044c " * 40, True),
        (SENTENCE * 2, False),
        (SENTENCE * 9 + "Then it ends in another way.", False),
        ("No, no, no, no!", False),
        ("Thank you. " * 4, False),
        (TIMES, False),
        (CODE, False),
        (TABLE, False),
        ("A table:\n\n" + "-" * 79, False),
        ("Name: " + "_" * 60, False),
        ("zeros = [" + "0, " * 50 + "0]", False),
        ("\n".join(f"{n}. {word}" for n, word in enumerate("ab cd ef gh ij kl mn".split())), False),
        ("<ul>" + "<li>one</li>" * 2 + "</ul></div></div></body></html>", False),
        ("", False),
    ],
)
def test_a_loop_is_an_end_that_repeats_and_no_list_table_or_code(text, expected):
    assert loops(text) is expected


def test_the_last_word_of_a_cut_answer_may_be_cut():
    whole = "it is as it is, " * 9
    assert loops(whole + "it is as i", stops=False)
    assert not loops(whole + "it is as i", stops=True)
    assert not loops("so", stops=False) and not loops("", stops=False)


def test_a_loop_is_found_at_any_length_of_its_phrase():
    dice = np.random.default_rng(0)
    words = [f"w{'abcdefghij'[n // 10]}{'klmnopqrst'[n % 10]}" for n in range(100)]
    for period in (1, 2, 7, 30, 60):
        phrase = list(dice.permutation(words)[:period])
        start = list(dice.permutation(words)[:20])
        enough = max(behaviour.LOOP, behaviour.REPEATS * period)
        for count in (enough - 1, enough):
            repeated = (phrase * (count // period + 1))[:count]
            # What stands before does not lengthen the loop by chance.
            text = " ".join([*start, "begin", *repeated])
            assert loops(text) is (count == enough), (period, count)


# JSON


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (" [1, 2]\n", [1, 2]),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('Here it is:\n```\n{"a": 1}\n```\nDone.', {"a": 1}),
        ('```json\n{"a": 1}', {"a": 1}),
        ('{"a": 1} and more', None),
        ("{'a': 1}", None),
        ('{"a": 1,}', None),
        ('```json\n{"a": \n```', None),
        ("17", None),
        ('"a"', None),
        ("", None),
        ("[" * 5000, None),
    ],
)
def test_json_is_an_object_or_array_alone_or_in_a_code_block(text, value):
    assert read_json(text) == value


def test_an_answer_is_judged_by_what_was_asked():
    answer = {"text": '{"name": "x", "age": 3}', "tokens": 9, "stops": True}
    assert judged(answer, False) == {**answer, "loops": False}
    assert judged(answer, True)["json"] and "keys" not in judged(answer, True)
    assert judged(answer, ["age", "name"])["keys"]
    assert not judged(answer, ["age", "city"])["keys"]
    listed = judged({**answer, "text": '["name"]'}, ["name"])
    assert listed["json"] and not listed["keys"]


def test_our_prompts_are_of_several_kinds_and_name_the_keys_that_count():
    rows = own_prompts()
    kinds = Counter(row["kind"] for row in rows)
    assert len(rows) == 48 and min(kinds.values()) >= 5 and len(kinds) >= 8
    for row in rows:
        last = row["turns"][-1]
        assert last["role"] == "user" and last["content"].strip()
        assert (row["kind"] == "json") == bool(row["json"])
        assert ("JSON" in last["content"]) == bool(row["json"])
        keys = row["json"] if isinstance(row["json"], list) else []
        assert all(key in last["content"] for key in keys)
    assert {len(row["turns"]) for row in rows if row["kind"] == "dialogue"} == {3}


# Intervals


def pairs(both, first, second, neither):
    return (
        [True] * (both + first) + [False] * (second + neither),
        [True] * both + [False] * first + [True] * second + [False] * neither,
    )


@pytest.mark.parametrize(
    ("counts", "interval"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe (1998), table II
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland et al. (2014), airway hyper-responsiveness
    ],
)
def test_paired_intervals_are_the_published_ones(counts, interval):
    places = 4 if interval[0] > 0 else 3
    assert tuple(round(end, places) for end in paired_interval(*pairs(*counts))) == interval


def test_a_paired_interval_is_about_that_of_a_bootstrap():
    first, second = pairs(120, 50, 20, 210)
    draws = np.random.default_rng(0).integers(0, 400, (4000, 400))
    differences = (np.array(first, float) - np.array(second, float))[draws].mean(1)
    assert paired_interval(first, second) == pytest.approx(
        tuple(np.quantile(differences, (0.025, 0.975))), abs=0.01
    )
    # The negative control: the same shares in other pairs have another interval.
    other = [*second[200:], *second[:200]]
    assert np.ptp(paired_interval(first, other)) > 1.2 * np.ptp(paired_interval(first, second))


def test_shares_that_agree_everywhere_are_not_certain():
    row = share([False] * 20, [False] * 20)
    assert row["share"] == row["difference"] == 0
    assert row["difference_low"] < 0 < row["difference_high"] and row["high"] > 0.1


# Prompts of a file


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one prompt\n\n  another \n", [("one prompt", False), ("another", False)]),
        ("p.jsonl", '"a"\n{"prompt": "b", "json": true}\n', [("a", False), ("b", True)]),
        ("p.json", '["a", {"prompt": "b", "json": ["k"]}]', [("a", False), ("b", ["k"])]),
    ],
)
def test_prompts_are_lines_strings_or_rows(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    rows = prompts.read_prompts(tmp_path / name, None)
    assert [(row["prompt"], row["json"]) for row in rows] == expected
    assert [row["turns"] for row in rows] == [
        [{"role": "user", "content": prompt}] for prompt, _ in expected
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"a"\n""', "line 2: no prompt"),
        ('"a"\n3', "line 2: the row is int"),
        ('{"prompt": "a"}\n{"prompt": "b", "json": 3}', "line 2: json is 3; expected true"),
        ('{"prompt": "a", "json": [1]}', r"line 1: json is \[1\]; expected true"),
    ],
)
def test_a_wrong_prompt_is_named_by_its_line(content, says, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(MoefyError, match=says) as refused:
        prompts.read_prompts(tmp_path / "p.jsonl", None)
    assert refused.value.code == 3


# In a report


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A run to write into."""
    return Path(shutil.copytree(converted(pico("llama")), tmp_path / "runs" / "run"))


def settings(text: Path, **more) -> Settings:
    few = {"tokens": 200, "sequence_length": 64, "effort": "quick", "speed": False}
    return Settings(text=(text,), behaviour=True, **few, **more)


def few_prompts():
    return [
        {"turns": [{"role": "user", "content": content}], "json": asked, "kind": "short"}
        for content, asked in (("The", False), ("A river", False), ("An object", ["a"]))
    ]


def test_a_report_holds_the_behaviour_of_every_stage(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour, "own_prompts", few_prompts)
    monkeypatch.setattr(behaviour, "NEW_TOKENS", 6)
    monkeypatch.setattr(behaviour, "BATCH", 2)
    monkeypatch.setattr("moefy.evaluate.run.redraw", lambda run: None)  # matplotlib takes long
    (tmp_path / "mine.txt").write_text("Every captain\n")
    asked = settings(text, prompts=tmp_path / "mine.txt", fail_if=("loops > dense + 0.1",))
    report = evaluate(run, asked)
    assert report["failed"] == [] and report["not_run"] == [] and not report["behaviour"]["chat"]
    own, mine = report["behaviour"]["sets"].values()
    assert list(report["behaviour"]["sets"]) == ["own prompts", "mine.txt"]
    assert own["tokens"] == 6 and len(mine["answers"]) == 1
    rows = own["figures"]["converted"]
    assert rows.keys() == {"loops", "stops", "json", "keys"}
    assert (rows["loops"]["of"], rows["json"]["of"], rows["json"]["share"]) == (3, 1, 0)
    assert [row["prompt"] for row in own["answers"]] == ["The", "A river", "An object"]
    model, tokenizer = load_model(run, torch.float32), load_tokenizer(run)
    ids = alone(model, tokenizer, "A river", 6)
    ids = ids[: ids.index(0)] if 0 in ids else ids
    assert own["answers"][1]["written"]["converted"]["text"] == tokenizer.decode(ids)

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(behaviour, "answers", never)
    assert evaluate(run, asked)["behaviour"] == report["behaviour"]
    # The negative control: a longer answer is another measurement.
    monkeypatch.setattr(behaviour, "NEW_TOKENS", 7)
    again = evaluate(run, asked)
    assert again["behaviour"] == {}
    assert again["not_run"][-1]["what"] == "behaviour"


def behaviours(run: Path, settings: Settings) -> tuple[dict, list[dict]]:
    """The part alone, and what it left out."""
    session = prepare(run, open_run(run), settings, run.parent, lambda *_: None)
    return parts.behaviours(session, {"dense": {"longest": 128}}, settings), session.not_run


def test_a_model_behaves_as_itself(run, text, monkeypatch):
    monkeypatch.setattr(behaviour, "own_prompts", few_prompts)
    monkeypatch.setattr(behaviour, "NEW_TOKENS", 40)
    found, _ = behaviours(run, settings(text, dense=str(run)))
    for row in found["sets"]["own prompts"]["figures"]["converted"].values():
        assert row["difference"] == 0


def test_prompts_that_do_not_fit_are_left_out_and_named(run, text, monkeypatch):
    long = {"turns": [{"role": "user", "content": "long " * 30}], "json": False}
    monkeypatch.setattr(behaviour, "own_prompts", lambda: [long, *few_prompts()])
    monkeypatch.setattr(behaviour, "NEW_TOKENS", 2)
    found, (missing,) = behaviours(run, settings(text))
    assert [row["prompt"] for row in found["sets"]["own prompts"]["answers"]][0] == "The"
    assert missing["what"] == "own prompts, prompt 1" and "takes 128" in missing["reason"]
    monkeypatch.setattr(behaviour, "own_prompts", lambda: [long])
    with pytest.raises(MoefyError, match="own prompts: no prompt fits in the 128 tokens"):
        behaviours(run, settings(text))


def test_a_chat_template_writes_the_prompts(run, text, pico, tmp_path, monkeypatch):
    seen = []

    def heard(model, tokenizer, questions, new_tokens):
        seen.extend(questions)
        return [{"text": "", "tokens": 0, "stops": True} for _ in questions]

    dense = Path(shutil.copytree(pico("llama"), tmp_path / "dense"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (dense / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(behaviour, "own_prompts", few_prompts)
    monkeypatch.setattr(behaviour, "answers", heard)
    assert behaviours(run, settings(text, dense=str(dense)))[0]["chat"]
    assert seen[0] == "<user>The<assistant>"
    # The negative control: without a template the prompt is written as it is.
    assert not behaviours(run, settings(text))[0]["chat"]
    assert "The" in seen


# Advice and conditions


def measured(moe: dict[str, list[bool]], dense: dict[str, list[bool]], *, chat: bool = True):
    """The part of a report on prompts whose answers have these figures."""
    models = {"dense": dense, "moe": moe}
    rows = [
        {"written": {label: {key: own[key][n] for key in own} for label, own in models.items()}}
        for n in range(48)
    ]
    return {"chat": chat, "sets": {"own prompts": {"figures": figures(rows)}}}


FALSE, TRUE = [False] * 48, [True] * 48
SOME = [number < 12 for number in range(48)]
FEW = [number < 2 for number in range(48)]


@pytest.mark.parametrize(
    ("moe", "dense", "chat", "says"),
    [
        ({"loops": SOME}, {"loops": FALSE}, True, ["LOOPS MORE OFTEN on own prompts: 12 of 48"]),
        ({"loops": SOME}, {"loops": FALSE}, False, ["LOOPS MORE OFTEN"]),
        ({"loops": FEW}, {"loops": FALSE}, True, []),
        ({"loops": SOME}, {"loops": SOME}, True, []),
        ({"loops": FALSE}, {"loops": SOME}, True, []),
        ({"stops": SOME}, {"stops": TRUE}, True, ["STOPS LESS OFTEN"]),
        ({"stops": SOME}, {"stops": TRUE}, False, []),  # a base model need not stop
        ({"stops": TRUE}, {"stops": SOME}, True, []),
        ({"json": SOME}, {"json": TRUE}, True, ["BREAKS JSON MORE OFTEN"]),
    ],
)
def test_advice_names_what_is_surely_worse_and_nothing_else(moe, dense, chat, says):
    report = {"behaviour": measured(moe, dense, chat=chat)}
    told = [one for one in advice(report, "moe") if "figure" in one["because"]]
    assert len(told) == len(says)
    for one, start in zip(told, says, strict=True):
        assert one["sentence"].startswith(start) and one["verdict"] == "does not pay"


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("loops > 0.2", ["loops is 0.25"]),
        ("loops > 0.3", []),
        ("loops > dense + 0.1", ["loops minus dense is 0.2083"]),
        ("loops>dense+.25", []),
        ("loops > dense", ["loops minus dense is 0.2083"]),
        ("stops < dense - 0.5", ["stops minus dense is -0.75"]),
        ("stops < dense - 0.8", []),
        ("json < 0.9", ["json was not measured"]),
        ("dnll > dense + 0.1", ["dnll minus dense is 0.3 on wiki"]),
        ("perplexity > dense + 1", ["perplexity minus dense was not measured"]),
    ],
)
def test_conditions_on_behaviour(text, fails):
    moe, dense = {"loops": SOME, "stops": SOME}, {"loops": FEW, "stops": TRUE}
    report = {"behaviour": measured(moe, dense)}
    report["texts"] = {"wiki": {"moe": {"dnll": 0.3}, "dense": {"dnll": 0.0}}}
    lines = fail_if.failures(fail_if.parse(text), report, "moe")
    assert len(lines) == len(fails)
    assert all(say in line for say, line in zip(fails, lines, strict=True)), lines


@pytest.mark.parametrize("text", ["dead > dense + 1", "loops > dense 0.1", "loops > dense + -1"])
def test_what_cannot_be_compared_with_dense(text):
    with pytest.raises(MoefyError) as refused:
        fail_if.parse(text)
    assert refused.value.code == 2
