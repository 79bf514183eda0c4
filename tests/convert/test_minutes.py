"""Calibration tokens follow from a device or from minutes, and a rerun has those of the first."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from moefy import pipeline
from moefy.config.recipe import build, read
from moefy.convert import disk, estimate, memory, prepare, probe, run, write
from moefy.convert.session import Attempt, Budget
from moefy.errors import MoefyError

RATES = dict.fromkeys(("product", "factor", "solve"), 1e9) | {
    "pass": 1e9,
    "start": 1e6,
    "cluster": 100.0,
    "assign": 100.0,
}
FAST = {kind: 2 * rate for kind, rate in RATES.items()}


def recipe(pico, text, **more):
    given = {"model": str(pico("llama")), "calibration": str(text), "sequence_length": 64}
    return build(None, given | more, [])


def seconds(job, tokens, rates):
    return estimate.seconds(estimate.with_tokens(job, tokens), rates)


def test_tokens_that_are_left_open_follow_from_the_device(pico, text, monkeypatch):
    assert recipe(pico, text).tokens == 0
    assert prepare.prepare(recipe(pico, text)).recipe.tokens == 16_384
    assert prepare.prepare(recipe(pico, text, tokens=512)).recipe.tokens == 512
    # At least 8 sequences, which a conversion needs.
    assert prepare.prepare(recipe(pico, text, sequence_length=4096)).recipe.tokens == 8 * 4096
    monkeypatch.setattr(prepare, "device_of", lambda name: torch.device("cuda"))
    assert prepare.prepare(recipe(pico, text)).recipe.tokens >= 262_144
    assert prepare.prepare(recipe(pico, text, tokens=512)).recipe.tokens == 512


def test_tokens_and_minutes_exclude_each_other(tmp_path):
    with pytest.raises(MoefyError, match="--tokens is 4,096 and --minutes is 5; .* one") as caught:
        build(None, {"model": "demo", "tokens": 4096, "minutes": 5.0}, [])
    assert caught.value.code == 2
    with pytest.raises(MoefyError, match="--minutes is 0; expected at least 0.1"):
        build(None, {"model": "demo", "minutes": 0.0}, [])
    file = tmp_path / "recipe.toml"
    file.write_text('model = "demo"\ntokens = 4096\n', encoding="utf-8")
    made = build(file, {"minutes": 5.0}, [])  # a flag overrules a file
    assert (made.tokens, made.minutes) == (0, 5.0)


def test_minutes_buy_as_many_whole_sequences_as_they_hold(pico, text, monkeypatch):
    job = prepare.prepare(recipe(pico, text, minutes=2.0))
    found = estimate.budget(job, RATES)
    assert found.tokens % 64 == 0 and found.tokens > estimate.LEAST
    assert seconds(job, found.tokens, RATES) <= 120 < seconds(job, found.tokens + 64, RATES)
    assert found.seconds == pytest.approx(seconds(job, found.tokens, RATES), abs=0.1)
    assert found.note == f"--minutes 2: {found.tokens:,} tokens"
    assert estimate.budget(job, FAST).tokens > 1.5 * found.tokens

    # Memory may hold fewer of them.
    def fit(tried, *_):
        return SimpleNamespace(file_bytes=0, refusal="too much" * (tried.recipe.tokens > 100_000))

    monkeypatch.setattr(estimate, "fit", fit)
    assert estimate.budget(job, RATES).tokens == 100_000 // 64 * 64


def test_minutes_buy_no_more_than_the_disk_holds(pico, text, monkeypatch):
    job = prepare.prepare(recipe(pico, text, minutes=2.0))
    free = 10**7
    found = estimate.budget(job, RATES, None, free)
    assert estimate.budget(job, RATES).tokens > found.tokens

    def needed(tokens):
        tried = estimate.with_tokens(job, tokens)
        plan = memory.fit(tried, slots := write.slots(tried))
        return disk.needed(tried, slots, plan)

    assert needed(found.tokens) <= free < needed(found.tokens + 64)
    assert not any("the disk" in note for note in estimate.estimate(job)["notes"])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    notes = estimate.estimate(prepare.prepare(recipe(pico, text, tokens=512)))["notes"]
    assert any("the disk has 0.0 GB free" in note for note in notes)


def test_what_takes_longer_is_planned_longer(pico, text):
    """The search for layers to drop, and rounds of the split."""

    def planned(layers=2, **more):
        model = pico("llama", num_hidden_layers=layers)
        job = prepare.prepare(recipe(pico, text, tokens=4096, **{"model": str(model), **more}))
        return estimate.seconds(job, {**RATES, "product": 1e6}), job.num_weights

    # Whichever is chosen counts as the last but one.
    (one, _), (named, weights) = (planned(3, drop_layers=layers) for layers in ("1", "1:2"))
    # Three layers, each with half of the model behind it on average.
    assert one - named > 2 * weights * 3 * 8 * 128 / 2 / 1e6
    rounds = [planned(partition_options={"rounds": count})[0] for count in (0, 4, 8)]
    assert rounds[0] < rounds[1] < rounds[2]
    assert rounds[1] == planned()[0]


def test_the_fewest_tokens_are_taken_where_minutes_hold_none(pico, text):
    job = prepare.prepare(recipe(pico, text, minutes=0.1))
    slow = {kind: rate / 1000 for kind, rate in RATES.items()}
    found = estimate.budget(job, slow)
    assert found.tokens == estimate.LEAST
    assert f"--minutes 0.1: {found.tokens:,} tokens, the fewest, which take about" in found.note


def test_the_plan_says_what_minutes_come_to(pico, text, monkeypatch):
    monkeypatch.setattr(estimate, "speeds", lambda *_: RATES)
    plan = estimate.estimate(prepare.prepare(recipe(pico, text, minutes=1.0)))
    assert f"--minutes 1: {plan['tokens']:,} tokens" in plan["notes"]
    assert 50 < plan["seconds"] <= 60
    assert not any("--minutes" in note for note in estimate.estimate(job_of(pico, text))["notes"])


def job_of(pico, text):
    return prepare.prepare(recipe(pico, text, tokens=512))


def stopped_at(stage):
    def watch(name, *_):
        if name.startswith(stage):
            raise KeyboardInterrupt

    return watch


def test_a_rerun_goes_on_with_the_tokens_of_the_first(pico, text, tmp_path, monkeypatch):
    minutes = 0.1
    job = prepare.prepare(recipe(pico, text, minutes=minutes))
    monkeypatch.setattr(run, "speeds", lambda *_: RATES)
    monkeypatch.setattr(run, "affordable", lambda *_, **options: Budget(minutes, 1024, 1.0))
    with pytest.raises(KeyboardInterrupt):
        run.convert(job, tmp_path / "out", watch=stopped_at("layer 1"))
    # On a machine that was busy then and is idle now.
    monkeypatch.setattr(run, "affordable", lambda *_, **options: Budget(minutes, 2048, 1.0))
    summary = run.convert(job, tmp_path / "out")
    assert summary["recipe"]["tokens"] == 1024
    assert summary["minutes"] == minutes and "--minutes 0.1: 1,024 tokens" in summary["notes"]
    written = read(tmp_path / "out" / "moefy" / "recipe.toml")
    assert written["tokens"] == 1024 and "minutes" not in written
    # What it was asked for is done; other minutes are another conversion, and so are other tokens.
    asked = recipe(pico, text, minutes=minutes)
    assert pipeline._converted(tmp_path / "out", asked)
    assert pipeline._converted(tmp_path / "out", recipe(pico, text, tokens=1024))
    for other in (recipe(pico, text, minutes=9.0), recipe(pico, text, tokens=2048)):
        with pytest.raises(MoefyError, match=r"converted by another recipe: (minutes|tokens) is"):
            pipeline._converted(tmp_path / "out", other)
    # The negative control: one that starts over measures again.
    with pytest.raises(KeyboardInterrupt):
        run.convert(job, tmp_path / "new", watch=stopped_at("layer 1"))
    monkeypatch.setattr(run, "affordable", lambda *_, **options: Budget(minutes, 512, 1.0))
    assert run._budget(job, tmp_path / "new", Attempt()).tokens == 2048
    assert run._budget(job, tmp_path / "new", Attempt(restart=True)).tokens == 512
    changed = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, seed=1))
    assert run._budget(changed, tmp_path / "new", Attempt()).tokens == 512


def test_open_tokens_are_those_of_any_device(pico, text, converted, tmp_path):
    """A run that was converted on a GPU is done on a machine without one, too."""
    kept = read(converted(pico("llama")) / "moefy" / "recipe.toml")
    (tmp_path / "moefy").mkdir()
    open_recipe = recipe(pico, text)
    for tokens, expected in ((16_384, 16_384), (262_144, 262_144), (4096, 16_384)):
        lines = [
            f"{key} = {json.dumps(value)}" for key, value in {**kept, "tokens": tokens}.items()
        ]
        (tmp_path / "moefy" / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
        assert pipeline._amounted(tmp_path, open_recipe).tokens == expected


def test_the_probe_times_every_kind_of_work_that_is_counted(pico, text, monkeypatch):
    job = job_of(pico, text)
    monkeypatch.setitem(probe.SIZE, "cpu", 64)
    monkeypatch.setattr(probe, "LEAST", 0.0)
    assert probe.speeds(torch.device("cpu"), job.shape).keys() == RATES.keys()


def test_a_rate_is_work_by_seconds_without_the_first_call(monkeypatch):
    clock, waited = [0.0], []

    def now(device):
        waited.append(device)
        return clock[0]

    def work():
        clock[0] += 10.0 if not waited else 0.02  # the first call compiles, or loads a kernel

    monkeypatch.setattr(probe, "now", now)
    assert probe.rate(torch.device("cuda"), work, 4.0) == pytest.approx(200.0)
    assert {device.type for device in waited} == {"cuda"}  # the clock that waits for it
