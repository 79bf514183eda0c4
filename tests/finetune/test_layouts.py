"""A step learns the same however its sequences are dealt out to batches and processes."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from processes import exit_codes
from tuned_run import rows, weights

from moefy.cli.finetune import _of_steps
from moefy.config.finetune import build
from moefy.distributed import WAIT
from moefy.errors import MoefyError
from moefy.finetune import run as runs
from moefy.finetune.checks import check_run
from moefy.finetune.collapse_guard import CollapseGuard, Failure
from moefy.finetune.inputs import open_run
from moefy.finetune.prepare import processes
from moefy.finetune.run import finetune
from moefy.finetune.train import num_steps
from moefy.finetune.trainer import Finetuner

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 256, "batch_size": 4}
SMALL |= {"balance": "none", "measure_every": 0, "learning_rate": 1e-3, "router_z": 0.0}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


@pytest.fixture(scope="module")
def chats(run, text, tmp_path_factory):
    """A run whose tokenizer has a chat template, and conversations: some sequences of these are
    answers nearly whole, and some have a few tokens to learn."""
    folder = tmp_path_factory.mktemp("chats")
    own = Path(shutil.copytree(run, folder / "run"))
    (own / "chat_template.jinja").write_text(CHAT)
    words, rows, at = Path(text).read_text().split(), [], 0
    for n in range(300):
        turns = []
        for role, count in zip(("user", "assistant"), (70, 3) if n % 3 else (4, 60), strict=True):
            said = " ".join(words[(at + i) % len(words)] for i in range(count))
            turns.append({"role": role, "content": said})
            at += count
        rows.append(json.dumps({"messages": turns}) + "\n")
    file = folder / "chats.jsonl"
    file.write_text("".join(rows))
    return own, file


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **SMALL, **settings}, []))


def losses_of(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def apart(start, one, other):
    """The largest difference of two trainings as a share of the largest update."""
    one, other, start = weights(one), weights(other), weights(start)
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    return max(float((one[name] - other[name]).abs().max()) for name in one) / moved


@pytest.mark.parametrize("answers_only", [True, False])
def test_a_step_is_the_mean_over_its_tokens_not_over_its_batches(chats, tmp_path, answers_only):
    own, file = chats
    for batch_size in (4, 1):
        more = {"batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        tuned(own, tmp_path / f"{batch_size}", file, answers_only=answers_only, **more)
    assert apart(own, tmp_path / "4", tmp_path / "1") < 0.02
    assert losses_of(tmp_path / "1") == pytest.approx(losses_of(tmp_path / "4"), rel=1e-3)


def test_it_is_not_if_each_batch_is_its_own_mean(chats, tmp_path, monkeypatch):
    """The negative control of the test above."""
    own, file = chats
    tuned(own, tmp_path / "4", file, answers_only=True)
    usual = Finetuner.get_batch_samples
    monkeypatch.setattr(
        Finetuner, "get_batch_samples", lambda self, *some: (usual(self, *some)[0], None)
    )
    more = {"batch_size": 1, "gradient_accumulation_steps": 4}
    tuned(own, tmp_path / "1", file, answers_only=True, **more)
    assert apart(own, tmp_path / "4", tmp_path / "1") > 0.1


@pytest.mark.parametrize("fsdp", [0, 2])
def test_two_processes_learn_answers_as_one_does(chats, tmp_path, fsdp):
    own, file = chats
    tuned(own, tmp_path / "1", file, answers_only=True)

    def work():
        tuned(own, tmp_path / "2", file, answers_only=True, batch_size=2, fsdp=fsdp)

    assert exit_codes(2, work) == [0, 0]
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-3)
    assert apart(own, tmp_path / "1", tmp_path / "2") < 0.02


@pytest.mark.parametrize(
    "weights",
    [{"ce": 0.0, "hidden": 1.0}, {"ce": 0.0, "router_ce": 1.0}, {"ce": "1,0@0.5", "hidden": 1.0}],
)
def test_two_processes_train_by_losses_that_leave_weights_alone(run, text, tmp_path, weights):
    def work():
        tuned(run, tmp_path / "out", text, kl=0.0, batch_size=2, **weights)

    assert exit_codes(2, work) == [0, 0]
    assert len(losses_of(tmp_path / "out")) == 8


def test_text_of_the_dense_model_is_written_by_one_process(run, tmp_path, monkeypatch):
    usual = runs.write_text

    def spied(*arguments, **more):
        (tmp_path / f"by-{os.environ['RANK']}").touch()
        return usual(*arguments, **more)

    monkeypatch.setattr(runs, "write_text", spied)
    work = lambda: tuned(run, tmp_path / "out", "self", tokens=1024, batch_size=2)  # noqa: E731
    assert exit_codes(2, work) == [0, 0]
    assert [file.name for file in tmp_path.glob("by-*")] == ["by-0"]


def test_processes_wait_for_a_teacher_of_hours():
    def work():
        processes(build(None, {"device": "cpu"}, []))
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout == WAIT

    assert exit_codes(2, work) == [0, 0]


def test_steps_are_those_of_all_processes_together(monkeypatch):
    settings = build(None, SMALL | {"gradient_accumulation_steps": 3}, [])
    for world in (1, 2, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert num_steps(_of_steps(settings, 7), world) == 7


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(run, text, tmp_path, schedule):
    tuned(run, tmp_path / "out", text, schedule=schedule, warmup_ratio=0.5)
    rates = [row["lr"] for row in rows(tmp_path / "out") if "loss" in row]
    assert rates[:4] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])
    assert (rates[-1] == 1e-3) == (schedule == "constant")


def test_a_restart_holds_one_model(run, text, tmp_path, monkeypatch):
    observe, begin, seen, alive = CollapseGuard.observe, Finetuner.__init__, [], []

    def failing(self, step, loss, load):
        observe(self, step, loss, load)
        if step == 4 and len(seen) == 1:
            self.failure = Failure(step, "the loss is 9", 2)

    def counted(self, *arguments, **more):
        begin(self, *arguments, **more)
        seen.append(weakref.ref(self.model))
        alive.append(sum(model() is not None for model in seen))

    monkeypatch.setattr(CollapseGuard, "observe", failing)
    monkeypatch.setattr(Finetuner, "__init__", counted)
    tuned(run, tmp_path / "out", text, save_every=2)
    assert alive == [1, 1]


def test_a_run_without_experts_has_none_to_divide(pico, converted):
    static = open_run(converted(pico("llama"), partition="static"))
    with pytest.raises(MoefyError, match="expert_parallel is 2, and there are 0 experts"):
        check_run(
            static, build(None, {"fsdp": 2, "expert_parallel": 2, "router_gradient": "chosen"}, [])
        )
