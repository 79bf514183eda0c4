"""Checkpoints that several processes write together, and that any number of them resumes."""

import os
import resource
import signal

import pytest
import torch
from processes import exit_codes
from tuned_run import rows, weights

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


def column(folder, name):
    return [row[name] for row in rows(folder) if name in row]


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
    expected = column(whole, "loss")
    assert column(fewer, "loss") == pytest.approx(expected, rel=1e-4) and len(expected) == 8


def diverging(monkeypatch, rank):
    """Have one process see a loss that is no number behind step 6, once."""
    step_done, planted = Finetuner.step_done, []

    def done(self):
        if self.state.global_step == 6 and not planted:
            planted.append(6)
            if self.args.process_index == rank:
                self.sums["loss"] = float("nan")
        step_done(self)

    monkeypatch.setattr(Finetuner, "step_done", done)


def test_what_one_process_sees_sends_all_back(run, text, tmp_path, monkeypatch):
    """And the lower rates are those of the steps that follow, not those of the checkpoint."""
    diverging(monkeypatch, rank=1)
    out, settings = tmp_path / "out", {"fsdp": 2, "schedule": "constant", "warmup_ratio": 0.0}
    assert exit_codes(2, lambda: tuned(run, out, text, **settings)) == [0, 0]
    (guard,) = column(out, "guard")
    assert guard["action"] == "back to checkpoint-4, learning rates halved"
    rates = column(out, "lr")
    assert len(rates) == 8 and rates[4] == rates[7] == rates[0] / 2


def test_lower_rates_outlive_a_stop(run, text, tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    for out in ("whole", "stopped"):
        with monkeypatch.context() as planted:
            diverging(planted, rank=0)
            if out == "stopped":
                killed(planted, step=7, rank=0, then=stop)
                with pytest.raises(KeyboardInterrupt):
                    tuned(run, tmp_path / out, text)
            else:
                tuned(run, tmp_path / out, text)
    tuned(run, tmp_path / "stopped", text)
    new, old = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert column(tmp_path / "stopped", "lr") == column(tmp_path / "whole", "lr")


def test_a_full_disk_is_one_line(run, text, tmp_path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(MoefyError, match="tensors failed: .*too large; .* make room") as caught:
            tuned(run, tmp_path / "out", text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 5 and not list(tmp_path.iterdir())
