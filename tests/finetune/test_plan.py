"""What a fine-tune is said to take, and what a preset chooses, before it starts."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from processes import exit_codes
from stopping import stopped_at

from moefy.config.finetune import Settings, build
from moefy.config.presets import CHOSEN, OPEN, OVERLAPPING, own_defaults
from moefy.config.recipe import Recipe
from moefy.files.safetensors_header import read_entries
from moefy.finetune import estimate, memory, prepare, probe, refit_after
from moefy.finetune.anneal import begin
from moefy.finetune.inputs import load_student
from moefy.finetune.memory import Inputs
from moefy.finetune.optim import RATES, adamw, groups, learning_rates, state_tensors
from moefy.finetune.prepare import open_inputs
from moefy.finetune.probe import Cost, Probe
from moefy.finetune.run import finetune, home_of
from moefy.finetune.unrefitted import start_of
from moefy.pipeline import declared

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama", num_hidden_layers=6), layers=":")


def settings(text, **more):
    return build(None, {**SMALL, "data": [str(text)], **more}, [])


def measured(run, text, **more):
    """A probe of a few layers, and the same of all, by a clock that ticks when it is asked."""
    start, clock = open_inputs(run, settings(text, **more)), itertools.count().__next__
    arguments = start.run, start.teacher, start.settings, start.dtypes, clock
    whole = probe._student(start.run, start.settings, start.dtypes, 6, lambda: 0.0)
    return probe.probe(*arguments), whole


@pytest.mark.parametrize("train", ["all", "router", "lora"])
def test_what_four_layers_hold_tells_what_all_hold(run, text, train, monkeypatch):
    monkeypatch.setattr(probe, "TRIED", 0)
    few, whole = measured(run, text, train=train)
    assert few.student.num_trained == whole.num_trained
    assert few.student.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.02)
    of_a_token = 1 / 64
    assert few.student.compute_seconds == few.teacher.compute_seconds == of_a_token


@pytest.mark.parametrize(("share", "most"), [(0, 4), (0.5, 4), (0.9, 5), (1, 6), (9, 6)])
def test_of_a_smaller_model_more_layers_are_tried(run, text, monkeypatch, share, most):
    weights = sum(entry.num_elements for entry in read_entries(run).values())
    monkeypatch.setattr(probe, "TRIED", int(share * weights))
    tried, student = [], probe._student

    def spy(run, settings, dtypes, layers, clock):
        tried.append(layers)
        return student(run, settings, dtypes, layers, clock)

    monkeypatch.setattr(probe, "_student", spy)
    start = open_inputs(run, settings(text))
    probe.probe(start.run, start.teacher, start.settings, start.dtypes)
    assert tried == [most, 1]


def test_saved_bytes_are_those_of_what_autograd_keeps():
    """A product keeps both factors, a view shares its memory, and weights do not count."""
    model = torch.nn.Linear(8, 8, bias=False)
    watch = probe.Stopwatch(model, lambda: 0.0)
    x = torch.rand(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(watch.saved, lambda tensor: tensor):
        y = model(x)
        assert watch.num_bytes == x.numel() * 4
        (y * y.view(-1).view(5, 8)).sum()
    assert watch.num_bytes == (x.numel() + y.numel()) * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_is_counted(run, text, dtype):
    start = open_inputs(run, settings(text, compute_dtype=dtype, train="router"))
    model = load_student(start.run, start.settings, start.dtypes.student.dtype)
    rates = learning_rates(model, "router", {"router": 1e-3})
    parameters = groups(model, "router", rates)
    optimizer = adamw(parameters, "adamw")
    for weight in [p for p in model.parameters() if p.requires_grad]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [t for t in state_tensors(optimizer, model).values() if t.ndim]
    held = sum(t.numel() * t.element_size() for t in tensors)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cost = Cost(num_trained=count)
    inputs = Inputs(start.run, None, start.settings, start.dtypes, Probe(cost, 0, Cost()))
    assert memory.training(inputs)[0] == weights + held


def planned(run, text, cost=None, **more):
    """The inputs of an estimate for a machine of a given speed."""
    start = open_inputs(run, settings(text, **more))
    cost = cost or Cost(1e-3, 0.1, 10_000.0, 10_000)
    measured = Probe(cost, 2000.0, Cost(cost.compute_seconds / 10))
    return Inputs(start.run, start.teacher, start.settings, start.dtypes, measured)


def test_each_way_to_lower_the_memory_lowers_it(run, text, tmp_path):
    def needed(cost=None, **more):
        inputs = planned(run, text, cost, **more)
        return sum(memory.training(inputs))

    most = needed()
    assert needed(batch_size=1) < most
    assert needed(gradient_checkpointing=True) < most
    assert needed(teacher_cache=str(tmp_path)) < most
    assert needed(Cost(1e-3, 0.1, 10_000.0, 100), train="lora") < most


def test_an_annealed_training_holds_the_refit_and_all_experts(run, text):
    asked = settings(text, anneal=0.5)
    start = open_inputs(run, asked)
    model = load_student(start.run, asked, start.dtypes.student.dtype)
    refits = begin(start_of(start.run), model, 4).refits
    held = sum(refit.numel() * refit.element_size() for _, refit in refits)
    both = [memory.training(planned(run, text, anneal=share))[0] for share in (0.5, 0.0)]
    assert both[0] - both[1] == held
    arguments = start.run, start.settings, start.dtypes, 2, lambda: 0.0
    shape = start.run.summary["shape"]
    more = shape["num_experts"] - shape["experts_per_token"]
    falling = probe._student(*arguments).saved_bytes
    plain = dataclasses.replace(asked, anneal=0.0)
    whole = falling - probe._student(start.run, plain, *arguments[2:]).saved_bytes
    # Of each layer and expert that is on: at least what its neurons answer.
    assert whole > 2 * more * shape["expert_width"] * 4


def test_a_refit_after_the_training_is_a_stage_of_its_own(run, text, monkeypatch):
    def stage(**more):
        return memory.memory(planned(run, text, **more))["refit"]

    base, tokens = stage(), 2048
    assert stage(refit_after=True) > base
    least = stage(refit_after=True, teacher_cache="/tmp")
    assert least < stage(refit_after=True)  # no second dense model
    monkeypatch.setattr(refit_after, "TOKENS", tokens // 2)
    hidden, neurons = 32, json.loads((run / "moefy" / "conversion.json").read_text())["shape"]
    held = 4 * tokens // 2 * (6 * hidden + 6 * hidden + 3 * neurons["num_neurons"])
    assert least - stage(refit_after=True, teacher_cache="/tmp") == held


def test_time_counts_the_teacher_the_update_and_the_measurements(run, text, tmp_path):
    inputs = planned(run, text, tokens=4096, validation_tokens=512, batch_size=4)
    plan = estimate.estimate(inputs, tmp_path / "out")
    assert plan["steps"] == 16 and plan["tokens"] == 4096
    training = 4096 * (1e-3 + 1e-4) + 16 * 0.1
    assert plan["seconds"] == pytest.approx(training + 6 * 512 * (1e-3 / 3 + 1e-4), abs=0.1)
    recomputed = planned(run, text, tokens=4096, gradient_checkpointing=True)
    assert estimate.estimate(recomputed, tmp_path / "out")["seconds"] > plan["seconds"] * 1.1


def test_what_does_not_fit_is_refused_by_name(run, text, tmp_path, monkeypatch, moefy):
    more = ["--sequence-length", 64, "--tokens", 2048, "--set", "validation_tokens=512"]
    line = ("finetune", run, "--out", tmp_path / "out", "--data", text, "--plan", *more)
    done = moefy(*line)
    assert done.code == 0 and "peak memory, about" in done.out and "tokens/s" in done.out
    done = moefy(*line, "--json")
    plan = json.loads(done.out)
    assert done.code == 0 and plan["refusal"] == "" and plan["tokens"] == 2048
    monkeypatch.setattr("moefy.memory.available", lambda: 10**6)
    done = moefy(*line, "--json")
    assert done.code == 5 and json.loads(done.out)["refusal"]
    assert "GB of memory, there are 0.0 GB" in done.err and done.err.count("\n") == 1
    monkeypatch.setattr("moefy.memory.available", lambda: 10**15)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: usage)
    done = moefy(*line)
    assert done.code == 5 and "GB of disk" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_to_lower_is_what_is_not_lowered_yet(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moefy.memory.available", lambda: 650_000_000)
    heavy = Cost(1e-3, 0.1, 1e6, 10_000)

    def refusal(**more):
        return estimate.estimate(planned(run, text, heavy, **more), tmp_path / "out")["refusal"]

    asked = refusal()
    ways = ("--train lora", "--teacher-cache DIR", "--gradient-checkpointing", "--batch-size")
    assert all(way in asked for way in ways)
    less = {"train": "lora", "teacher_cache": str(tmp_path), "batch_size": 1}
    assert not any(way in refusal(**less) for way in (ways[0], ways[1], ways[3]))


def test_each_process_of_a_machine_has_its_part_of_the_memory(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moefy.memory.available", lambda: 10**9)
    inputs = planned(run, text)
    assert estimate.estimate(inputs, tmp_path / "out")["refusal"] == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "there are 0.2 GB" in estimate.estimate(inputs, tmp_path / "out")["refusal"]


def test_advice_is_for_the_stage_that_takes_most(run, text, tmp_path, monkeypatch):
    """Where asking the teacher or the refit takes most, no smaller batch helps."""
    room = memory.written(planned(run, text).run) + 10**6
    monkeypatch.setattr("moefy.memory.available", lambda: room)
    for stage, more in (
        ("refit_after=false", {"refit_after": True, "teacher_cache": str(tmp_path)}),
        ("fewer --tokens", {"teacher_cache": str(tmp_path), "tokens": 10**7}),
    ):
        light = Cost(1e-9, 1e-9, 1.0, 1)
        refusal = estimate.estimate(planned(run, text, light, **more), tmp_path / "out")["refusal"]
        assert stage in refusal and "--batch-size" not in refusal


def test_four_processes_plan_together(run, text, tmp_path):
    """Each tries as many steps as one process does alone."""
    asked = settings(text, sequence_length=16, validation_tokens=64)

    def work():
        told = prepare.plan(run, tmp_path / "out", asked)
        assert told["steps"] == 2048 // (4 * 4 * 16) and told["seconds"] > 0

    assert exit_codes(4, work) == [0] * 4


# Presets


def chosen(run, text, preset="good", cost=None, **more):
    given = {k: v for k, v in SMALL.items() if k in ("sequence_length", "validation_tokens")}
    asked = build(None, {**given, "data": [str(text)], "preset": preset, **more}, [])
    inputs = dataclasses.replace(planned(run, text, cost), settings=asked)
    return estimate.settled(inputs)


def test_a_preset_takes_its_time_on_any_machine(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "most_tokens", lambda settings: 10**12)
    for preset, seconds in (("fast", 600), ("good", 3600), ("best", 36000)):
        for speed in (1e-2, 1e-4, 1e-6):
            cost = Cost(speed, 10 * speed, 10.0, 10_000)
            asked = chosen(run, text, preset, cost)
            inputs = dataclasses.replace(planned(run, text, cost), settings=asked)
            assert seconds / 4 < estimate.estimate(inputs, tmp_path)["seconds"] <= seconds * 1.01
            digits = str(asked.tokens).rstrip("0")
            assert digits in "125"


def test_a_preset_reads_a_text_about_four_times_at_most(run, text, tmp_path):
    """As many tokens as bytes, also where a text is half of a mix; by time where it is long."""
    short, half = tmp_path / "short.txt", tmp_path / "half.txt"
    for file, size in ((short, 300_000), (half, 60_000)):
        file.write_bytes(b"x" * size)
    fast = Cost(1e-6, 1e-5, 10.0, 10_000)
    assert chosen(run, short, cost=fast).tokens == 200_000
    assert (
        chosen(run, f"{short}:0.5", cost=fast, data=[f"{short}:1", f"{half}:1"]).tokens == 100_000
    )
    assert chosen(run, tmp_path, cost=fast).tokens == 200_000  # the folder holds both
    assert chosen(run, text, cost=fast, data=["self"]).tokens > 10**7
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n' * 100)
    asked = chosen(run, text, cost=fast, data=[], answers=str(prompts), answer_tokens=64)
    assert asked.tokens == 5000


def test_without_tokens_or_preset_it_takes_an_hour(moefy, run, text):
    assert build(None, {"data": [str(text)]}, []) == build(
        None, {"data": [str(text)], "preset": "good"}, []
    )
    for given in ({"tokens": 4096}, {"preset": ""}):
        assert OPEN not in dataclasses.asdict(build(None, given, [])).values()
    assert build(None, {}, ["tokens=4096"]).preset == ""
    line = ("finetune", run, "--data", text, "--steps", 2, "--sequence-length", 64, "--plan")
    done = moefy(*line, "--set", "validation_tokens=512", "--json")
    assert done.code == 0 and json.loads(done.out)["steps"] == 2


def test_what_is_given_wins_over_the_preset(run, text):
    free = chosen(run, text)
    assert OPEN not in [getattr(free, name) for name in CHOSEN]
    given = {"tokens": 12345, "batch_size": 3, "learning_rate": 1e-5, "ce": 0.0}
    asked = chosen(run, text, **given)
    assert {name: getattr(asked, name) for name in given} == given
    assert asked.rest_learning_rate is free.rest_learning_rate is None
    assert asked.gradient_accumulation_steps > 1  # steps stay as large as the preset wants them


def test_a_preset_ends_with_answers_where_the_model_gives_them(run, text, tmp_path):
    cost = Cost(1e-3, 0.1, 10.0, 10_000)
    base = planned(run, text, cost)
    given = {**SMALL, "tokens": 1_000_000}
    for answers, more, share in ((True, {}, 0.05), (False, {}, 0.0), (True, {"last_stage": 0}, 0)):
        asked = build(None, {**given, "data": [str(text)], "preset": "good", **more}, [])
        assert answers or asked.last_stage == OPEN
        inputs = dataclasses.replace(base, settings=asked, answers=answers)
        chosen = estimate.settled(inputs)
        assert chosen.last_stage == share
        plan = estimate.estimate(dataclasses.replace(inputs, settings=chosen), tmp_path / "out")
        assert any("answers to prompts of moefy" in one for one in plan["text"]) == bool(share)
    # Writing the answers takes time.
    plain = planned(run, text, cost, tokens=200_000)
    last = dataclasses.replace(plain.settings, last_stage=0.5)
    plans = (plain, dataclasses.replace(plain, settings=last))
    less, more = (estimate.estimate(one, tmp_path / "out")["seconds"] for one in plans)
    assert more - less == pytest.approx(280 * 58 * 2 * 1e-4, abs=0.15)


def test_experts_that_overlap_have_defaults_of_their_own(converted, pico, text, tmp_path, moefy):
    """With a preset or without, and by every way to start; what is given wins."""
    run = converted(pico("llama"), overlap=2)
    line = ("finetune", run, "--data", text, "--sequence-length", 64, "--tokens", 2048)
    line += ("--set", "validation_tokens=512", "--out", tmp_path / "out", "--quiet")
    assert moefy(*line, "--set", "ce=0.5", "--json").code == 0
    written = json.loads((tmp_path / "out" / "moefy" / "finetune.json").read_text())["settings"]
    assert {name: written[name] for name in OVERLAPPING} == {**OVERLAPPING, "ce": 0.5}

    own = own_defaults(Recipe(model="demo", overlap=2))
    asked = build(None, {**SMALL, "data": [str(text)], "preset": "good"}, [], own=own)
    settled = estimate.settled(dataclasses.replace(planned(run, text), settings=asked))
    assert {name: getattr(settled, name) for name in OVERLAPPING} == OVERLAPPING

    file = tmp_path / "recipe.toml"
    for more, ce in (("overlap = 2", 0.0), ("", 0.3), ('overlap = 2\nmethod = "flap"', 0.3)):
        file.write_text(f'model = "demo"\n{more}\n[finetune]\ntokens = 4096\n')
        assert declared(file).finetune.ce == ce


def test_batches_are_halved_until_they_fit(run, text, monkeypatch):
    heavy = Cost(1e-3, 0.1, 1e6, 10_000)
    wide = chosen(run, text, cost=heavy)
    monkeypatch.setattr("moefy.memory.available", lambda: 800_000_000)
    narrow = chosen(run, text, cost=heavy)
    assert (wide.batch_size, narrow.batch_size) == (4, 2)
    rows = {one.batch_size * one.gradient_accumulation_steps for one in (wide, narrow)}
    assert len(rows) == 1


def test_a_preset_is_written_out_and_kept_when_it_is_stopped(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moefy.finetune.estimate.PRESETS", {"fast": 1300.0})
    monkeypatch.setattr(
        prepare, "probe", lambda *_: Probe(Cost(0.4, 0.1, 10.0, 100), 1.0, Cost(0.01))
    )
    given = {k: v for k, v in SMALL.items() if k in ("sequence_length", "validation_tokens")}
    asked = build(None, {**given, "data": [str(text)], "preset": "fast", "save_every": 1}, [])
    with stopped_at(2):
        finetune(run, tmp_path / "out", asked)
    assert (home_of(tmp_path / "out") / "preset.json").is_file()
    # The machine seems ten times as fast now; what was begun is what goes on.
    monkeypatch.setattr(prepare, "probe", lambda *_: pytest.fail("measured again"))
    # What does not change the weights may be another now.
    summary = finetune(run, tmp_path / "out", dataclasses.replace(asked, save_every=2))
    assert summary["settings"]["tokens"] == 2000
    recipe = build(tmp_path / "out" / "moefy" / "recipe.toml", {}, [])
    assert recipe.preset == "fast" and OPEN not in dataclasses.asdict(recipe).values()
    assert dataclasses.asdict(recipe) == {**summary["settings"], "data": recipe.data}


def test_the_defaults_are_the_recipe_but_for_what_its_model_bears():
    best = build(Path(__file__).parents[2] / "recipes" / "finetune-smollm2-135m.toml", {}, [])
    for name in ("kl", "warmup_ratio", "schedule", "rate_factor"):
        assert getattr(Settings(), name) == getattr(best, name)
    # SmolLM2 bears more of the cross-entropy, and four times the rates, than every model has by
    # default.
    assert Settings().ce < best.ce
    given = (best.router_learning_rate, best.learning_rate, best.rest_learning_rate)
    assert given == tuple(4 * RATES[part] for part in ("router", "experts", "rest"))
