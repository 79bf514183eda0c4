"""lm-eval's scores are ours on the same windows, and a task of one's own runs offline."""

import functools
import json
import math

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy.errors import MoefyError
from moefy.evaluate.benchmarks import check_tasks, compared, content, run_task
from moefy.evaluate.metrics import compare
from moefy.evaluate.prompts import likelihood
from moefy.evaluate.tables import num_bytes

TASK = """
task: moefy_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model(pico):
    return AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(pico):
    return AutoTokenizer.from_pretrained(pico("llama"))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, text):
    """A folder with a task of which two thirds of the answers are the first choice."""
    folder = tmp_path_factory.mktemp("tasks")
    words = text.read_text().split()
    rows = [
        {"query": " ".join(words[at : at + 6]), "choices": words[at + 6 : at + 9], "gold": at % 3}
        for at in range(0, 120, 10)
    ]
    file = folder / "words.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "words.yaml").write_text(TASK.format(file=file))
    return folder


@pytest.mark.slow  # lm-eval reads all of its own tasks first
def test_a_mistyped_task_is_answered_in_a_short_line():
    """There are some 13,000 tasks; the nearest are named."""
    with pytest.raises(MoefyError, match="unknown task 'piqaa' of --tasks") as caught:
        check_tasks(["piqaa"], None)
    assert caught.value.code == 2
    assert len(str(caught.value)) < 200 and "did you mean piqa" in str(caught.value)


def test_perplexity_is_lm_evals_on_the_same_windows(model, tokenizer, text):
    """Its rolling likelihood of texts that fit one window, each after the end-of-text token."""
    documents = [document[:130] for document in text.read_text().split("\n\n\n")[:4]]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=0)
        for document in documents
    ]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    windows = [
        torch.tensor([harness.prefix_token_id, *tokenizer(d)["input_ids"]]) for d in documents
    ]
    assert max(map(len, windows)) < 128
    score = compare(model, {}, windows)["dense"]
    assert [-nll for nll in score.nll_W] == pytest.approx(theirs, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-sum(theirs) / score.num_tokens), rel=1e-4)
    assert num_bytes(tokenizer, windows) == sum(len(d.encode()) for d in documents)


def test_a_task_of_ones_own(model, tokenizer, task_folder):
    manager = check_tasks(["moefy_words"], task_folder)
    scores = run_task(model, tokenizer, "moefy_words", manager, None)
    assert scores["metric"] == "acc" and len(scores["values"]) == 12
    rows = [json.loads(line) for line in (task_folder / "words.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        # A choice is as likely as all of its tokens together.
        sums = [
            likelihood(model, tokenizer, row["query"], choice)
            * len(tokenizer(" " + choice, add_special_tokens=False)["input_ids"])
            for choice in row["choices"]
        ]
        right = max(range(3), key=sums.__getitem__) == row["gold"]
        assert scores["values"][f"moefy_words/{number}"] == right
    assert compared(scores, scores)["value"] == sum(scores["values"].values()) / 12
    some = run_task(model, tokenizer, "moefy_words", manager, 5)
    assert len(some["values"]) == 5


def test_a_task_whose_data_have_changed_is_another(task_folder):
    manager = check_tasks(["moefy_words"], task_folder)
    before = content("moefy_words", manager)
    assert before and content("moefy_words", manager) == before
    file = task_folder / "words.jsonl"
    text = file.read_text()
    try:
        file.write_text(text.replace('"gold": 0', '"gold": 1', 1))
        assert content("moefy_words", manager) != before
    finally:
        file.write_text(text)


def test_tasks_that_are_not_there(task_folder, tmp_path, monkeypatch):
    # lm-eval's own thousands of tasks take long to look through, and tell nothing here.
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path=None, **_: own(include_path=include_path)
    )
    with pytest.raises(MoefyError, match="did you mean moefy_words") as refused:
        check_tasks(["moefy_word"], task_folder)
    assert refused.value.code == 2
    with pytest.raises(MoefyError, match="is no folder") as refused:
        check_tasks(["moefy_words"], tmp_path / "none")
    assert refused.value.code == 2
