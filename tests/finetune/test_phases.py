"""Losses whose weights change in the course of a fine-tune."""

import pytest
import torch
from tuned_run import step_rows

from moefy.config import course
from moefy.config.finetune import Settings, build
from moefy.errors import MoefyError
from moefy.finetune.collapse_guard import CollapseGuard
from moefy.finetune.run import finetune

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}


def test_a_course_is_a_step_function():
    weight = course.normal("1, .5@0.25,0@0.750", "ce")
    assert weight == "1,0.5@0.25,0@0.75"
    values = [course.at(weight, step / 8) for step in range(8)]
    assert values == [1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert course.at(2.5, 0.9) == 2.5 and course.normal("3", "ce") == 3.0


@pytest.mark.parametrize("text", ["1,0", "1,0@1", "1,0@0", "1,0@.5,1@.5", "x", "", "-1", "1,-1@.5"])
def test_what_is_no_course_is_refused(text):
    with pytest.raises(MoefyError, match=r"--ce is .* 1,0@0.7") as caught:
        build(None, {"ce": text}, [])
    assert caught.value.code == 2


def test_something_is_learned_in_every_phase():
    with pytest.raises(MoefyError, match="are 0 from 50% of the steps on"):
        build(None, {}, ["kl=1,0@0.5", "ce=0,1@0.6"])
    assert build(None, {}, ["kl=1,0@0.5", "ce=0,1@0.5"]).ce == "0,1@0.5"


def test_each_step_is_of_its_phase(pico, converted, text, tmp_path):
    settings = {"data": str(text), **SMALL, "ce": "1,0@0.5", "kl": 0.5}
    finetune(converted(pico("llama")), tmp_path / "out", build(None, settings, []))
    log = step_rows(tmp_path / "out")
    assert [row["ce_weight"] for row in log] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert not any("kl_weight" in row for row in log)
    for row in log:
        rest = 0.5 * row["kl"] + 0.01 * row["aux"] + 0.001 * row["z"]
        assert row["loss"] == pytest.approx(rest + row["ce_weight"] * row["ce"], rel=1e-5)
    again = build(tmp_path / "out" / "moefy" / "recipe.toml", {}, [])
    assert again.ce == "1,0@0.5" and again.kl == 0.5


@pytest.mark.parametrize("tells", [True, False])
def test_the_guard_does_not_take_a_phase_for_a_loss_that_rises(tells):
    guard = CollapseGuard(Settings(guard_steps=3))
    for step in range(20):
        if step == 10 and tells:
            guard.begin_phase()
        guard.observe(step, 1.0 if step < 10 else 4.0, [torch.ones(4)])
    assert (guard.failure is None) == tells


@pytest.mark.parametrize(("before", "dies"), [(1.0, True), (0.3, True), (0.1, False), (0.0, False)])
def test_only_an_expert_that_was_of_use_is_missed(before, dies):
    """Of one that had little, more or less says nothing: texts differ from step to step."""
    guard = CollapseGuard(Settings(guard_steps=3), [[1.0, 1.0, 1.0, before]])
    for step in range(4):
        guard.observe(step, 1.0, [torch.tensor([100.0, 100, 100, 2])])
    assert (guard.failure is not None) == dies
    # Without a load before it, as many as there are count.
    guard = CollapseGuard(Settings(guard_steps=3))
    for step in range(4):
        guard.observe(step, 1.0, [torch.tensor([100.0, 100, 100, 2])])
    assert guard.failure and "1 of 4 experts" in guard.failure.reason
