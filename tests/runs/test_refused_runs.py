"""Whatever lies in a model's or a run's folder, every command ends with a code and one line.

What `moefy convert` refuses is in `test_refused_models`, what the others refuse in `test_refusals`.
Here are `inspect` and a plan, and what a report and an export may do without.
"""

import json
import shutil

import damage as d
import pytest
from command import assert_refused, listing
from fault_cases import CASES, Place
from refusal_cases import BROKEN, ODD

DAMAGED = [case for case in CASES if case.code and case.row <= 24]


def told(done, codes=range(2, 8)) -> None:
    """One line of reason and a code that means something."""
    assert done.code in codes, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("moefy: ")]
    assert line.isprintable() and len(line) < 1000


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_a_broken_model_is_inspected(case, moefy, pico, tmp_path):
    shutil.copytree(pico("llama"), tmp_path / "model")
    case.arrange(Place(tmp_path, moefy))
    before = listing(tmp_path)
    done = moefy("inspect", tmp_path / "model", "--json")
    assert done.code in (0, case.code), done
    assert case.early <= (done.code == case.code)
    if done.code:
        told(done)
    if done.out:
        assert json.loads(done.out)["code"] == done.code
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", DAMAGED[::9], ids=lambda case: case.name)
def test_a_broken_model_is_planned(case, moefy, pico, tmp_path):
    shutil.copytree(pico("llama"), tmp_path / "model")
    case.arrange(Place(tmp_path, moefy))
    done = moefy("convert", tmp_path / "model", "--plan")
    if done.code or case.early:
        assert_refused(done, case.code)


@pytest.fixture
def broken(pico, converted, tmp_path):
    """`broken(damage)`: a copy of a run, damaged."""

    def make(damage: d.Damage):
        run = tmp_path / "run"
        shutil.copytree(converted(pico("llama")), run)
        damage(run)
        return run

    return make


@pytest.mark.parametrize("damage", [*BROKEN, *ODD], ids=lambda damage: damage.words)
def test_a_broken_run_is_inspected(damage, moefy, broken):
    done = moefy("inspect", broken(damage))
    if done.code:
        told(done)


@pytest.mark.parametrize("damage", ODD, ids=lambda damage: damage.words)
def test_an_odd_run_is_reported_on(damage, moefy, broken, text):
    run = broken(damage)
    before = listing(run)
    few = ("--tokens", "128", "--sequence-length", "64", "--no-controls", "--quick", "--text", text)
    done = moefy("report", run, *few, "--quiet")
    if done.code:
        told(done, range(3, 7))
        new = listing(run).items() ^ before.items()
        assert {name for name, _ in new if not name.startswith("moefy/measured")} == set()


@pytest.mark.parametrize("damage", [*BROKEN, *ODD], ids=lambda damage: damage.words)
def test_a_broken_run_is_exported(damage, moefy, broken, monkeypatch):
    """The converter is another program, of which only the exit code is ours."""
    from moefy.errors import MoefyError
    from moefy.runs import gguf

    def converter(run, out, kind):
        raise MoefyError("the converter ran")

    monkeypatch.setattr(gguf, "_convert", converter)
    monkeypatch.setattr(gguf, "_check_programs", lambda kind: None)
    run = broken(damage)
    before = listing(run)
    done = moefy("export", "gguf", run, "--quiet")
    told(done)
    assert listing(run) == before
