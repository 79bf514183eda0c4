"""Whatever lies in a model's or a run's folder, every command ends with a code and one line.

`moefy convert` has tests of its own (`test_faults`); here are the commands that read what others
wrote: `inspect`, `report`, `export gguf` and a plan.
"""

import json
import shutil

import damage as d
import pytest
from damage import CONFIG, SINGLE
from fault_cases import CASES, Place
from test_cli import assert_refused, listing
from test_cli import moefy as moefy  # a fixture

REPORT, RECIPE = "moefy/conversion.json", "moefy/recipe.toml"
TOKENS = "moefy/calibration.safetensors"
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


@pytest.mark.parametrize("case", DAMAGED[::9], ids=lambda case: case.name)
def test_a_broken_model_is_no_run(case, moefy, pico, tmp_path):
    shutil.copytree(pico("llama"), tmp_path / "model")
    case.arrange(Place(tmp_path, moefy))
    before = listing(tmp_path)
    assert_refused(moefy("report", tmp_path / "model"), 3, "not a whole run")
    assert listing(tmp_path) == before


BROKEN = [
    d.remove(CONFIG),
    d.cut(CONFIG, 40),
    d.write(CONFIG, "[]"),
    d.config(model_type=7),
    d.config(model_type="no-such-type"),
    d.config(num_hidden_layers=10**6),
    d.config(num_hidden_layers="two"),
    d.config(hidden_size=-1),
    d.config(num_experts=10**9),
    d.config(num_experts=None),
    d.config(moe_intermediate_size="wide"),
    d.config(auto_map={"AutoModelForCausalLM": "model.Model"}),
    d.remove(SINGLE),
    d.cut(SINGLE, 50_000),
    d.write(SINGLE, b""),
    d.append(SINGLE, b"more"),
    d.pipe(SINGLE),
    d.pipe(CONFIG),
    d.pipe("tokenizer.json"),
    d.remove("tokenizer.json", "tokenizer_config.json"),
    d.cut("tokenizer.json", 100),
    d.remove(REPORT),
    d.cut(REPORT, 100),
    d.write(REPORT, "[]"),
    d.write(REPORT, "{}"),
    d.write(REPORT, '{"a": ' * 10_000),
    d.write(REPORT, b"\xff"),
    d.pipe(REPORT),
    d.config(REPORT, family=...),
    d.config(REPORT, family=["llama"]),
    d.config(REPORT, family="../llama"),
    d.config(REPORT, shape=None),
    d.config(REPORT, shape={}),
    d.config(REPORT, layers="many"),
    d.config(REPORT, calibration=3),
    d.remove(RECIPE),
    d.cut(RECIPE, 30),
    d.write(RECIPE, "active = 'half'\n"),
    d.write(RECIPE, "colour = 3\n"),
    d.write(RECIPE, ""),
    d.pipe(RECIPE),
    d.remove(TOKENS),
    d.cut(TOKENS, 300),
    d.write(TOKENS, b"{}"),
    d.pipe(TOKENS),
]


@pytest.fixture
def broken(pico, converted, tmp_path):
    """`broken(damage)`: a copy of a run, damaged."""

    def make(damage: d.Damage):
        run = tmp_path / "run"
        shutil.copytree(converted(pico("llama")), run)
        damage(run)
        return run

    return make


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.words)
def test_a_broken_run_is_inspected(damage, moefy, broken):
    done = moefy("inspect", broken(damage))
    if done.code:
        told(done)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.words)
def test_a_broken_run_is_reported_on(damage, moefy, broken, text):
    run = broken(damage)
    before = listing(run)
    few = ("--tokens", "128", "--sequence-length", "64", "--no-controls", "--quick", "--text", text)
    done = moefy("report", run, *few, "--quiet")
    if done.code:
        told(done, range(3, 7))
        new = listing(run).items() ^ before.items()
        assert {name for name, _ in new if not name.startswith("moefy/measured")} == set()


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.words)
def test_a_broken_run_is_exported(damage, moefy, broken, monkeypatch):
    """The converter is another program, of which only the exit code is ours."""
    from moefy import export
    from moefy.errors import MoefyError

    def converter(run, out, kind):
        raise MoefyError("the converter ran")

    monkeypatch.setattr(export, "_convert", converter)
    monkeypatch.setattr(export, "_check_programs", lambda kind: None)
    run = broken(damage)
    before = listing(run)
    done = moefy("export", "gguf", run, "--quiet")
    told(done)
    assert listing(run) == before
