"""The step of least validation loss is written, not the last."""

import pytest
import torch
from stopping import stopped_at
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME as STATE
from tuned_run import weights

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.finetune import checkpoints
from moefy.finetune.checkpoints import steps
from moefy.finetune.collapse_guard import CollapseGuard, Failure
from moefy.finetune.home import LOG, read_log
from moefy.finetune.run import finetune, home_of
from moefy.finetune.trainer import Finetuner

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}
# Text that a random teacher does not predict, learned in the second half, leads away from it.
AWAY = {"kl": "1,0@0.5", "ce": "0,1@0.5", "learning_rate": 3e-3, "rest_learning_rate": 3e-3}
AWAY |= {"schedule": "constant", "measure_every": 2, "save_every": 1}


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **SMALL, **settings}, []))


def same(one, other):
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


@pytest.fixture(scope="module")
def whole(run, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("best") / "out"
    return tuned(run, out, text, **AWAY), out


def test_the_best_step_is_written(whole, run, text, tmp_path):
    summary, out = whole
    chosen = summary["selected"]
    assert (chosen["step"], chosen["by"], summary["steps"]) == (4, "kl", 8)
    assert chosen["value"] < chosen["last"]
    assert summary["validation"]["after"]["kl"] == pytest.approx(chosen["value"], rel=1e-6)
    last = tuned(run, tmp_path / "last", text, **{**AWAY, "measure_every": 0})
    assert last["selected"] is None and not same(tmp_path / "last", out)
    assert last["validation"]["after"]["kl"] == pytest.approx(chosen["last"], rel=1e-6)


@pytest.mark.parametrize("every", [2, 3])
def test_each_step_is_measured_once_and_the_last_one_too(run, text, tmp_path, every):
    tuned(run, tmp_path / "out", text, **{**AWAY, "measure_every": every})
    measured = [
        row["step"] for row in read_log(tmp_path / "out" / "moefy" / LOG) if "validation" in row
    ]
    assert measured == {2: [2, 4, 6, 8], 3: [3, 6, 8]}[every]


@pytest.mark.parametrize("step", [5, 8])
def test_stopped_behind_the_best_step_it_ends_in_the_same_bytes(whole, run, text, tmp_path, step):
    with stopped_at(step):
        tuned(run, tmp_path / "out", text, **AWAY)
    left = {5: [2, 3, 4], 8: [4, 6, 7]}  # what was the best step at 3 was 2
    home = home_of(tmp_path / "out")
    assert steps(home) == left[step]
    state = TrainerState.load_from_json(str(home / f"checkpoint-{left[step][-1]}" / STATE))
    assert state.best_model_checkpoint == str(home / "checkpoint-4")  # or transformers warns
    assert tuned(run, tmp_path / "out", text, **AWAY)["selected"] == whole[0]["selected"]
    assert same(tmp_path / "out", whole[1])


def test_a_best_step_that_is_pruned_is_missed(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_best", lambda folder: None)
    with pytest.raises(MoefyError, match="the checkpoint of step 4 in .* --restart") as caught:
        tuned(run, tmp_path / "out", text, **AWAY)
    assert caught.value.code == 7 and not (tmp_path / "out").exists()


def test_without_a_teacher_the_loss_decides(run, text, tmp_path):
    chosen = tuned(run, tmp_path / "out", text, kl=0.0, ce=1.0)["selected"]
    assert chosen["by"] == "loss" and chosen["step"] == 8 and chosen["value"] == chosen["last"]


@pytest.mark.parametrize("undone", [True, False])
def test_steps_that_the_guard_has_undone_are_not_chosen(run, text, tmp_path, monkeypatch, undone):
    observe, evaluate, failed = CollapseGuard.observe, Finetuner.evaluate, []

    def failing(self, step, loss, load_LE):
        observe(self, step, loss, load_LE)
        if step == 4 and not failed and undone:
            failed.append(step)
            self.failure = Failure(step, "the loss is 9, and was 1", 2)

    def planted(self, *args, **rest):
        first = self.state.global_step == 3 and not failed
        return {**evaluate(self), **({"eval_kl": 0.0} if first else {})}

    monkeypatch.setattr(CollapseGuard, "observe", failing)
    monkeypatch.setattr(Finetuner, "evaluate", planted)
    settings = {**AWAY, "measure_every": 1, "kl": 1.0, "ce": 0.0}
    summary = tuned(run, tmp_path / "out", text, **settings)
    assert (summary["selected"]["step"] == 3) != undone
    if undone:
        assert summary["guard"][0]["action"].startswith("back to checkpoint-2")
