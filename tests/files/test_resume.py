"""A conversion that is killed, interrupted, or runs out of room goes on and ends with its bytes.

Attempts run in forked processes, which are killed as `kill -9` does it: at a step of theirs to the
disk, or wherever a stage begins. The judge is an undisturbed run.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import at
from safetensors.torch import load_file, save_file

from moefy import cli, environment
from moefy.config.recipe import build
from moefy.convert import layers, write
from moefy.convert.calibration import calibration_tokens
from moefy.convert.memory import fit
from moefy.convert.prepare import Job, prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.errors import MoefyError
from moefy.files import resume
from moefy.files.publish import PART, STATE, place_of, reclaim

MEASURED = {"seconds", "stage_seconds", "peak_resident_bytes", "memory"}
"""Keys of the report that no two runs share."""

STEPS = ("fsync", "rename", "replace", "unlink", "rmdir")
"""What of `os` an attempt is killed in front of."""


@pytest.fixture
def a_job(own_pico, text, tmp_path) -> Callable[..., Job]:
    """`a_job(**recipe)`: a conversion of a copy of a tiny model and a text, to be changed at will.

    Every recipe of one test has the same model and text.
    """
    model = own_pico("llama")
    words = tmp_path / "models" / "text.txt"
    shutil.copy(text, words)

    def job(**recipe: Any) -> Job:
        few = {"tokens": 512, "sequence_length": 64, "calibration": str(words)}
        return prepare(build(None, {"model": str(model), **few, **recipe}, []))

    return job


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def forked(work: Callable[[], object]) -> int:
    """Run in a process of its own; give its exit code, negative for the signal that killed it."""
    child = os.fork()
    if not child:
        # A shell's background jobs, of which these tests may be one, are started to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counting(die_at: int, note: Callable[[int], object] = lambda count: None) -> None:
    """From now on this process dies in front of its `die_at`-th step to the disk."""
    count = 0

    def before(step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            note(count)
            if count == die_at:
                die()
            return step(*arguments, **options)

        return counted

    for name in STEPS:
        setattr(os, name, before(getattr(os, name)))


def dying_at(stage: str) -> Callable[[str, int, int], None]:
    """A watch that kills where a stage begins: "layer 1", "layers" (when one is done), ..."""
    return lambda now, *_: die() if now.startswith(stage) else None


def contents(folder: Path) -> dict[str, Any]:
    """Files by name: their bytes, or the report less what is measured. Pages are drawn from it."""

    def less(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: less(item) for key, item in value.items() if key not in MEASURED}
        return [less(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            result[str(path.relative_to(folder))] = less(json.loads(path.read_text()))
        elif path.is_file() and path.name != "conversion.md":
            result[str(path.relative_to(folder))] = path.read_bytes()
    return result


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder; who holds a lock is no matter."""
    paths = sorted(path for path in folder.rglob("*") if path.name != "lock")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def assert_same(out: Path, whole: Path) -> None:
    """`out` is there, alone, and as an undisturbed run made it."""
    assert os.listdir(out.parent) == [out.name]
    result, expected = contents(out), contents(whole)
    assert result.keys() == expected.keys()
    assert [name for name in expected if result[name] != expected[name]] == []


@pytest.fixture
def whole(a_job, tmp_path) -> Path:
    """What an undisturbed run makes of `a_job()`."""
    convert(a_job(), tmp_path / "whole", Attempt(keep=False))
    return tmp_path / "whole"


def stages_of(job: Job, out: Path, **options: Any) -> list[str]:
    """Convert in this process; give the stages that were shown."""
    seen: list[str] = []
    convert(job, out, Attempt(**options), watch=lambda stage, *_: seen.append(stage))
    return seen


# --- kill -9 -------------------------------------------------------------------------------------


def test_killed_in_front_of_steps_to_the_disk(a_job, out, whole, tmp_path):
    """Steps from the first to the last, evenly spread, in runs that are killed and killed again."""
    job = a_job()
    counter = tmp_path / "count"
    assert (
        forked(lambda: (counting(-1, lambda n: counter.write_text(str(n))), convert(job, out))) == 0
    )
    steps = int(counter.read_text())
    assert steps > 40
    assert_same(out, whole)
    shutil.rmtree(out)
    published = 0
    for step in range(1, steps + 1, steps // 12):
        assert forked(lambda step=step: (counting(step), convert(job, out))) == -signal.SIGKILL
        if out.exists():  # killed behind the publication: whole, with a remnant beside it
            published += 1
            assert contents(out).keys() == contents(whole).keys()
            assert reclaim(out)
            assert_same(out, whole)
        else:
            convert(job, out)
            assert_same(out, whole)
        shutil.rmtree(out)
    assert published < 6


def test_killed_again_and_again_at_random_moments(a_job, out, whole):
    job, dice, kills = a_job(), random.Random(0), 0
    while True:
        child = os.fork()
        if not child:
            convert(job, out)
            os._exit(0)
        time.sleep(dice.uniform(0.05, 0.6))
        if kills < 6:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if out.exists():  # killed behind the publication: whole, perhaps with a remnant beside it
            reclaim(out)
            break
        kills += 1
    assert_same(out, whole)


def test_written_beside_the_next_layer_it_is_as_safe(a_job, out, whole, monkeypatch):
    """As with a GPU. Slow, so that the next layer changes the states before they are written."""

    def kept() -> dict[str, bytes | None]:
        with monkeypatch.context() as late:
            late.setitem(convert.__globals__, "reopen", lambda *_, **__: die())
            assert forked(lambda: convert(job, out)) == -signal.SIGKILL
        files = listing(place_of(out) / STATE)
        return {name: data for name, data in files.items() if name.endswith(".safetensors")}

    def slow(*given: Any) -> None:
        time.sleep(0.2)
        save_layer(*given)

    job, save_layer = a_job(), resume.State.save_layer
    one_by_one = kept()
    shutil.rmtree(place_of(out))
    monkeypatch.setattr(layers, "_beside", lambda device: True)
    monkeypatch.setattr(resume.State, "save_layer", slow)
    assert kept() == one_by_one and len(one_by_one) > 3
    convert(job, out)
    assert_same(out, whole)
    shutil.rmtree(out)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.State, "save_layer", full)
    with pytest.raises(MoefyError, match="No space left on device; finished work is saved"):
        convert(job, out)
    assert not out.exists()
    monkeypatch.setattr(resume.State, "save_layer", save_layer)
    for step in (14, 10):
        assert forked(lambda step=step: (counting(step), convert(job, out))) == -signal.SIGKILL
    convert(job, out)
    assert_same(out, whole)


RECIPES: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": ({}, "layer 1", "layer 0"),
    "a text of its own": ({"calibration": "self"}, "copy", "calibration text"),
    "auto": ({"layers": "auto", "active": 0.75}, "copy", "sensitivity"),
    "gradients": ({"partition": "llama-moe-v2"}, "layer 1", "gradients"),
    "some layers": ({"layers": "1:"}, "layer 1", "layer 0"),
    "one generation of states": ({"drift": 0.0}, "layer 1", "copy"),
    "overlapping": ({"overlap": 2.0}, "layer 1", "layer 0"),
    "static": ({"partition": "static"}, "reopen", "layer 1"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_done_is_not_done_again(name, a_job, out, tmp_path):
    recipe, stage, before = RECIPES[name]
    job = a_job(**recipe)
    convert(job, tmp_path / "whole", Attempt(keep=False))

    def die_late() -> None:
        if stage == "reopen":
            convert.__globals__["reopen"] = lambda *_, **__: die()
        convert(job, out, watch=dying_at(stage))

    assert forked(die_late) == -signal.SIGKILL
    assert not out.exists() and (place_of(out) / STATE).is_dir()
    seen = stages_of(job, out)
    assert [now for now in seen if now.startswith(before)] == []
    assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize("filed_first", [True, False])
def test_a_rerun_may_have_less_memory_or_more(filed_first, a_job, out, whole):
    """The states of one attempt lie in files, those of the other in memory."""
    job = a_job()
    little = fit(job, write.slots(job)).peak_bytes - 1
    first, second = (little, None) if filed_first else (None, little)
    attempt, watch = Attempt(memory=first), dying_at("layer 1")
    assert forked(lambda: convert(job, out, attempt, watch=watch)) == -signal.SIGKILL
    summary = convert(job, out, Attempt(memory=second))
    assert bool(summary["memory"]["file_bytes"]) is not filed_first
    assert_same(out, whole)


def test_a_wrong_state_would_be_seen(a_job, out, whole, monkeypatch):
    """The control: these tests can fail."""
    job = a_job()
    assert forked(lambda: convert(job, out, watch=dying_at("layer 1"))) == -signal.SIGKILL
    layers = resume.State.layers

    def wrong(self: resume.State, *arguments: Any) -> Any:
        states_BTD, saved = layers(self, *arguments)
        assert states_BTD is not None
        return states_BTD * (1 + 1e-6), saved

    monkeypatch.setattr(resume.State, "layers", wrong)
    convert(job, out)
    with pytest.raises(AssertionError):
        assert_same(out, whole)


def test_an_old_run_is_replaced_at_the_end_alone(a_job, out, whole):
    job = a_job()
    shutil.copytree(whole, out)
    (out / "left over").write_text("x")
    before = listing(out)
    killed = forked(lambda: convert(job, out, Attempt(force=True), watch=dying_at("layer 1")))
    assert killed == -signal.SIGKILL
    assert listing(out) == before
    convert(job, out, Attempt(force=True))
    assert_same(out, whole)


@pytest.mark.parametrize("which", [1, 2])
def test_killed_while_an_old_run_is_replaced(which, a_job, out, whole):
    """In front of the rename of the old folder, and between it and that of the new one."""
    job = a_job()
    shutil.copytree(whole, out)
    rename, count = Path.rename, 0

    def killed(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == which:
            die()
        return rename(path, target)

    def attempt() -> None:
        Path.rename = killed  # pyright: ignore[reportAttributeAccessIssue]
        convert(job, out, Attempt(force=True))

    assert forked(attempt) == -signal.SIGKILL
    assert out.exists() == (which == 1)
    with pytest.raises(MoefyError, match="--force"):  # the old one is back, and whole
        convert(job, out)
    assert contents(out) == contents(whole)
    seen = stages_of(job, out, force=True)
    assert [now for now in seen if now.startswith("layer ")] == []
    assert_same(out, whole)


# --- states that are no good ---------------------------------------------------------------------


@pytest.fixture
def stopped(a_job, out) -> Path:
    """The state of a conversion that was killed when both layers were done."""

    def attempt() -> None:
        convert.__globals__["reopen"] = lambda *_, **__: die()
        convert(a_job(), out)

    assert forked(attempt) == -signal.SIGKILL
    return place_of(out) / STATE


def refused(job: Job, out: Path, *says: str, option: str) -> None:
    """Refused with code 7, and nothing touched; started over only if that is asked for."""
    before = listing(out.parent)
    with pytest.raises(MoefyError) as caught:
        convert(job, out)
    assert caught.value.code == 7
    assert [part for part in (*says, f"--{option}") if part not in str(caught.value)] == []
    assert listing(out.parent) == before
    seen = stages_of(job, out, **{option: True})
    assert any(now.startswith("layer 0") for now in seen)
    assert os.listdir(out.parent) == [out.name]


def other_weights(job: Job) -> None:
    file = job.checkpoint.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})


def other_text(job: Job) -> None:
    file = Path(job.recipe.calibration)
    file.write_text(file.read_text().replace("river", "brook"))


FOREIGN: dict[str, tuple[dict[str, Any], Callable[[Job], object], str]] = {
    "seed": ({"seed": 1}, lambda job: None, "recipe.seed was 0, is 1"),
    "shape": ({"active": 0.75}, lambda job: None, "recipe.active was 0.5, is 0.75"),
    "method": ({"partition": "moefication"}, lambda job: None, "recipe.partition was alternating"),
    "weights": ({}, other_weights, "inputs.model.safetensors differs"),
    "text": ({}, other_text, "calibration differs"),
    "threads": ({}, lambda job: torch.set_num_threads(2), "machine.threads was 1, is 2"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_of_another_run(name, stopped, a_job, out, tmp_path):
    recipe, change, says = FOREIGN[name]
    job = a_job(**recipe)
    change(job)
    try:
        refused(job, out, says, option="force")
        convert(job, tmp_path / "again")
    finally:
        torch.set_num_threads(1)
    assert_same(out, tmp_path / "again")  # nothing of the other run is in it


def test_a_rerun_may_name_the_device_that_was_chosen(stopped, a_job, out, whole):
    """The recipe names it then, and so does a digest of that file; all else is as it was."""
    assert a_job().recipe.device == "auto"
    seen = stages_of(a_job(device="cpu"), out)
    assert [now for now in seen if now.startswith("layer ")] == []
    weights = [folder / "model.safetensors" for folder in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_same_run_goes_on_with_force_and_starts_over_by_restart(stopped, a_job, out, whole):
    saved = shutil.copytree(stopped.parent, out.parent.parent / "kept")
    seen = stages_of(a_job(), out, force=True)
    assert [now for now in seen if now.startswith("layer ")] == []
    assert_same(out, whole)
    shutil.rmtree(out)
    shutil.copytree(saved, stopped.parent)
    seen = stages_of(a_job(), out, restart=True)
    assert any(now.startswith("layer 0") for now in seen)
    assert_same(out, whole)


def test_a_state_of_other_versions(stopped, a_job, out, monkeypatch):
    now = environment.versions() | {"torch": "2.99"}
    monkeypatch.setattr("moefy.environment.versions", lambda: now)
    refused(a_job(), out, "versions.torch was", "is 2.99", option="force")


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def flip(name: str, place: int = -9) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(bytes(data))

    return change


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "facts cut": (cut("facts.json", 50), "facts.json is damaged"),
    "facts empty": (cut("facts.json", 0), "facts.json is damaged"),
    "facts changed": (flip("facts.json", -60), "facts.json is damaged"),
    "first layer's record": (flip("layer-0.json", 200), "layer-0.json is damaged"),
    "both states": (
        both(flip("states-0.safetensors"), cut("states-1.safetensors", 500)),
        "states-0.safetensors is damaged",
    ),
    "copied": (cut("copied.json", 9), "copied.json is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_state_that_is_damaged(name, stopped, a_job, out):
    change, says = BAD[name]
    change(stopped)
    refused(a_job(), out, says, option="restart")


TORN: dict[str, Callable[[Path], object]] = {
    "last states cut": cut("states-1.safetensors", 1000),
    "last states changed": flip("states-1.safetensors"),
    "last states gone": lambda folder: (folder / "states-1.safetensors").unlink(),
    "last states' record": cut("states-1.json", 3),
    "last layer's record": cut("layer-1.json", 100),
    "last layer's tensors": flip("layer-1.safetensors"),
    "last layer in the model": lambda folder: flip_last(folder.parent / PART / "model.safetensors"),
}


def test_a_layer_that_keeps_no_tensors_has_none_to_damage(stopped, a_job, out, whole):
    assert load_file(stopped / "layer-0.safetensors") == {}
    flip("layer-0.safetensors")(stopped)
    convert(a_job(), out)
    assert_same(out, whole)


def flip_last(file: Path) -> None:
    """Change a value of the last layer's first expert."""
    from moefy.files.safetensors_header import read_header

    data = bytearray(file.read_bytes())
    entry = read_header(file)["model.layers.1.mlp.experts.0.gate_proj.weight"]
    data[entry.start] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", TORN)
def test_a_torn_generation_falls_back_to_the_one_before(name, stopped, a_job, out, whole):
    TORN[name](stopped)
    seen = stages_of(a_job(), out)
    assert {now[:7] for now in seen if now.startswith("layer ")} == {"layer 1"}
    assert_same(out, whole)


def test_a_change_in_the_model_below_the_last_layer(stopped, a_job, out):
    from moefy.files.safetensors_header import read_header

    file = stopped.parent / PART / "model.safetensors"
    entry = read_header(file)["model.layers.0.mlp.experts.0.gate_proj.weight"]
    flip(file.name, entry.start)(file.parent)
    refused(a_job(), out, "layer 0 in ", "was changed", option="restart")


def test_what_resumes_nothing_leaves_a_state_alone(stopped, a_job, out):
    before = listing(out.parent)
    with pytest.raises(MoefyError, match="unfinished") as caught:
        convert(a_job(), out, Attempt(keep=False))
    assert caught.value.code == 7
    assert listing(out.parent) == before


# --- interrupts ----------------------------------------------------------------------------------


@pytest.fixture
def moefy(a_job, out) -> Callable[..., tuple[int, str]]:
    """`moefy(before, *flags)`: the command in a process of its own, `before` called in it first;
    gives its exit code and standard error."""
    recipe = a_job().recipe
    few = ["--tokens", "512", "--sequence-length", "64", "--calibration", recipe.calibration]

    def run(before: Callable[[], object], *flags: str) -> tuple[int, str]:
        ear, mouth = os.pipe()

        def command() -> None:
            os.dup2(mouth, 2)  # not the file of pytest's, which may not grow in some tests
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.argv = ["moefy", "convert", recipe.model, str(out), *few, "--quiet", *flags]
            before()
            try:
                cli.main()
            except SystemExit as stop:
                with contextlib.suppress(ValueError):  # it may have been closed
                    sys.stderr.flush()
                os._exit(int(stop.code or 0))

        code = forked(command)
        os.close(mouth)
        with os.fdopen(ear, encoding="utf-8") as stream:
            return code, stream.read()

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(number, moefy, out, whole):
    code, err = moefy(at("layer 1", lambda: signal.raise_signal(number)))
    assert code == 130
    assert err.splitlines()[-1] == (
        "moefy: interrupted; 1 layers are kept: run the same command again to go on from there"
    )
    assert not out.exists()
    assert moefy(lambda: None)[0] == 0
    assert_same(out, whole)


def test_stopped_behind_the_layers_that_are_converted(pico, text, out, tmp_path):
    few = {"tokens": 512, "sequence_length": 64, "calibration": str(text), "layers": "0"}
    job = prepare(build(None, {"model": str(pico("llama", num_hidden_layers=4)), **few}, []))
    convert(job, tmp_path / "whole", Attempt(keep=False))

    def stop(stage: str, *_: object) -> None:
        if stage.startswith("layer 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, out, watch=stop)
    assert "continuing behind layer 2" in stages_of(job, out)
    assert_same(out, tmp_path / "whole")


def test_interrupted_before_anything_is_worth_keeping(moefy, out):
    code, err = moefy(at("check weights", lambda: signal.raise_signal(signal.SIGINT)))
    assert (code, err) == (130, "moefy: interrupted; nothing was written\n")
    assert os.listdir(out.parent) == []


def test_a_reader_that_is_gone(moefy, out, whole):
    """As when standard error is piped into `head`."""

    def closed() -> None:
        raise BrokenPipeError

    assert moefy(at("layer 1", closed))[0] == 141
    assert not out.exists()
    assert moefy(lambda: None)[0] == 0
    assert_same(out, whole)


@pytest.mark.parametrize("stubborn", [True, False])
def test_a_second_interrupt_ends_at_once(stubborn):
    """Even where the first one is being dealt with and nothing comes to an end."""
    from moefy.cli.signals import interruptible

    ear, mouth = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruptible():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                os.write(mouth, b"x")
                if stubborn:
                    signal.pthread_sigmask(signal.SIG_BLOCK, ())
                    deadline = time.monotonic() + 60
                    while time.monotonic() < deadline:
                        try:
                            time.sleep(60)
                        except KeyboardInterrupt:
                            pass
        os._exit(0)

    child = os.fork()
    if not child:
        work()
    os.read(ear, 1)
    if stubborn:
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (130 if stubborn else 0)


def test_a_signal_that_is_ignored_stays_so():
    """As for what is started with nohup."""
    from moefy.cli.signals import interruptible

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interruptible():
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)

    assert forked(work) == 0


# --- room and locks ------------------------------------------------------------------------------


def no_larger_files() -> None:
    """Every write from now on fails as one past a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def test_a_file_that_may_not_grow(moefy, out, whole):
    code, err = moefy(at("layer 1", no_larger_files))
    assert code == 5
    (line,) = err.splitlines()
    assert "File too large" in line and "run the same command again" in line
    assert not out.exists()
    assert moefy(lambda: None)[0] == 0
    assert_same(out, whole)


def test_a_file_that_may_not_grow_from_the_start(moefy, out):
    code, err = moefy(no_larger_files)
    assert code == 5 and "File too large" in err and len(err.splitlines()) == 1
    assert os.listdir(out.parent) == []


def test_two_at_once(a_job, out, whole):
    job, (ear, mouth) = a_job(), os.pipe()

    def wait(stage: str, *_: int) -> None:
        if stage.startswith("layer 1"):
            os.write(mouth, b"x")
            time.sleep(60)

    child = os.fork()
    if not child:
        convert(job, out, watch=wait)
    os.read(ear, 1)
    before = listing(out.parent)
    for options in ({}, {"restart": True}, {"keep": False}):
        with pytest.raises(MoefyError, match=f"process {child} on ") as caught:
            convert(job, out, Attempt(**options))
        assert caught.value.code == 5
    assert listing(out.parent) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    convert(job, out)  # the lock of the dead is no lock
    assert_same(out, whole)


def test_memory_that_is_used_up(moefy, out, whole):
    def none_left() -> None:
        raise MemoryError

    code, err = moefy(at("layer 1", none_left))
    assert code == 5
    assert "out of memory" in err and "--tokens" in err and len(err.splitlines()) == 1
    assert not out.exists()
    assert moefy(lambda: None)[0] == 0
    assert_same(out, whole)


def test_tokens_are_those_of_the_text(a_job, stopped, out):
    """A run with tokens of its own does not go on with another's."""
    job = a_job()
    tokens = calibration_tokens(a_job(seed=3), lambda *_: None)
    with pytest.raises(MoefyError, match="calibration differs"):
        convert(job, out, tokens=tokens)
