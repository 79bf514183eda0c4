"""Checkpoints that several processes write together, and that any number of them resumes."""

import json
import os
import signal

import pytest
import torch
from processes import exit_codes
from safetensors.torch import load_file

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.finetune.checkpoints import steps
from moefy.finetune.home import home_of
from moefy.finetune.run import finetune
from moefy.finetune.trainer import Finetuner

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 256, "batch_size": 2}
SMALL |= {"save_every": 2, "learning_rate": 1e-3, "balance": "none"}
SHARED = {
    "a copy each": {},
    "FSDP2": {"fsdp": 2},
    "expert parallelism": {"fsdp": 2, "expert_parallel": 2, "router_gradient": "chosen"},
}
ALONE = {"fsdp": 0, "expert_parallel": 0}


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **SMALL, **settings}, []))


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows(folder):
    return [json.loads(row) for row in (folder / "moefy/finetune.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def killed(monkeypatch, step, rank, then=lambda: os.kill(os.getpid(), signal.SIGKILL)):
    """Have a process killed behind a step."""
    step_done = Finetuner.step_done

    def done(self):
        step_done(self)
        if self.state.global_step == step and self.args.process_index == rank:
            then()

    monkeypatch.setattr(Finetuner, "step_done", done)


@pytest.mark.slow
@pytest.mark.parametrize("how", SHARED)
def test_killed_processes_go_on_as_many_or_fewer(run, text, tmp_path, monkeypatch, how):
    settings = SHARED[how]
    whole, again, fewer = (tmp_path / name for name in ("whole", "again", "fewer"))
    assert exit_codes(2, lambda: tuned(run, whole, text, **settings)) == [0, 0]
    for out in (again, fewer):
        with monkeypatch.context() as planted:
            killed(planted, step=5, rank=1)
            codes = exit_codes(2, lambda out=out: tuned(run, out, text, **settings))
        assert codes[0] and codes[1] == -signal.SIGKILL and not out.exists()
        assert steps(home_of(out)) == [2, 4]
    assert exit_codes(2, lambda: tuned(run, again, text, **settings)) == [0, 0]
    with pytest.raises(MoefyError, match="give --gradient-accumulation-steps 2 to go on") as caught:
        tuned(run, fewer, text, **settings | ALONE)
    assert caught.value.code == 7
    tuned(run, fewer, text, **settings | ALONE, gradient_accumulation_steps=2)
    old, new, other, start = (weights(folder) for folder in (whole, again, fewer, run))
    assert all(torch.equal(new[name], old[name]) for name in old)
    moved = max(float((old[name] - start[name]).abs().max()) for name in old)
    apart = max(float((old[name] - other[name]).abs().max()) for name in old)
    assert apart < 0.02 * moved
    assert losses(fewer) == pytest.approx(losses(whole), rel=1e-4) and len(losses(whole)) == 8


def test_what_one_process_sees_sends_all_back(run, text, tmp_path, monkeypatch):
    """And the lower rates are those of the steps that follow, not those of the checkpoint."""
    step_done, planted = Finetuner.step_done, []

    def done(self):
        if self.state.global_step == 6 and not planted:
            planted.append(6)
            self.sums["loss"] = float("nan") if self.args.process_index else self.sums["loss"]
        step_done(self)

    monkeypatch.setattr(Finetuner, "step_done", done)
    out, settings = tmp_path / "out", {"fsdp": 2, "schedule": "constant", "warmup_ratio": 0.0}
    assert exit_codes(2, lambda: tuned(run, out, text, **settings)) == [0, 0]
    (guard,) = (row["guard"] for row in rows(out) if "guard" in row)
    assert guard["action"] == "back to checkpoint-4, learning rates halved"
    rates = [row["lr"] for row in rows(out) if "lr" in row]
    assert len(rates) == 8 and rates[4] == rates[7] == rates[0] / 2
