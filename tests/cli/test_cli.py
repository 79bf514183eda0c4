"""The command line: exit codes, one line of reason, nothing left behind, nothing in the way.

Commands run in this process through `moefy.cli.main`, as `python -m moefy` runs it; only what a
process alone can show (signals, what a terminal's width does) is shown by one.
"""

import contextlib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import assert_refused, listing
from damage import SINGLE
from fault_cases import CASES, Done, Place

from moefy import __version__, cli
from moefy.models import families

FEW = ["--tokens", "512", "--sequence-length", "64"]


# --- what is refused -----------------------------------------------------------------------------

USAGE = {
    "unknown flag": (["MODEL", "OUT", "--expert", "4"], "--expert"),
    "no number": (["MODEL", "OUT", "--experts", "few"], "--experts"),
    "no value": (["MODEL", "OUT", "--experts"], "--experts"),
    "too many": (["MODEL", "OUT", "MORE"], "MORE"),
    "no OUT": (["MODEL"], "OUT"),
    "no MODEL": ([], "MODEL"),
    "empty MODEL": (["", "OUT"], "empty"),
    "oracle": (["MODEL", "OUT", "--router", "oracle"], "cannot be written"),
    "a method whose router cannot be written": (
        ["MODEL", "OUT", "--method", "cmoe"],
        "cannot be written",
        "moefy report RUN --against router=cmoe",
    ),
    "clusters of another partition": (
        ["MODEL", "OUT", "--router", "llama-moe-v2"],
        "--partition alternating",
        "expected --partition llama-moe-v2",
    ),
    "overlapping experts of a method that has none": (
        ["MODEL", "OUT", "--partition", "moefication", "--overlap", "2"],
        "do not overlap",
    ),
    "unknown metric": (
        ["MODEL", "OUT", "--partition", "static", "--set", "partition.metric=engery"],
        "did you mean energy",
    ),
    "unknown router": (["MODEL", "OUT", "--router", "linaer"], "did you mean linear"),
    "unknown partition": (["MODEL", "OUT", "--partition", "x"], "alternating, cmoe"),
    "unknown target": (["MODEL", "OUT", "--target", "qwen2"], "did you mean qwen2_moe"),
    "unknown engine": (["MODEL", "OUT", "--engines", "lama.cpp"], "did you mean llama.cpp"),
    "unknown dtype": (["MODEL", "OUT", "--dtype", "int4"], "bfloat16"),
    "unknown device": (["MODEL", "OUT", "--device", "gpu"], "gpu", "cuda"),
    "no such layer": (["MODEL", "OUT", "--layers", "2:"], "0 to 1"),
    "nothing active": (["MODEL", "OUT", "--active", "0"], "--active is 0"),
    "not a number": (["MODEL", "OUT", "--active", "nan"], "--active is nan"),
    "few tokens": (["MODEL", "OUT", "--tokens", "100"], "--tokens"),
    "short sequences": (["MODEL", "OUT", "--sequence-length", "4"], "--sequence-length"),
    "negative seed": (["MODEL", "OUT", "--seed", "-1"], "--seed"),
    "seed of 30 digits": (["MODEL", "OUT", "--seed", "9" * 30], "--seed"),
    "no setting": (["MODEL", "OUT", "--set", "rounds"], "key=value"),
    "unknown setting": (["MODEL", "OUT", "--set", "sede=3"], "did you mean seed"),
    "unknown option": (["MODEL", "OUT", "--set", "partition.round=3"], "did you mean rounds"),
    "option of another type": (
        ["MODEL", "OUT", "--set", "partition.rounds=x"],
        "rounds",
        "expected int",
    ),
    "negative option": (["MODEL", "OUT", "--set", "router.learning_rate=-1"], "learning_rate"),
    "setting of another type": (["MODEL", "OUT", "--set", "tokens=many"], "tokens", "many"),
    "no recipe": (["MODEL", "OUT", "--recipe", "none.toml"], "none.toml"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name, moefy, pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, *says = USAGE[name]
    places = {"MODEL": pico("llama"), "OUT": tmp_path / "out"}
    assert_refused(moefy("convert", *(places.get(word, word) for word in arguments)), 2, *says)
    assert listing(tmp_path) == {}


def test_a_class_that_cannot_hold_the_family(moefy, pico, tmp_path):
    done = moefy("convert", pico("llama"), tmp_path / "out", "--target", "qwen3_moe")
    assert_refused(done, 4, "qwen3_moe", "llama")


def test_static_pruning_of_some_layers(moefy, pico, tmp_path):
    arguments = ["--partition", "static", "--layers", "1:"]
    assert_refused(moefy("convert", pico("llama"), tmp_path / "out", *arguments), 2, "--layers 1:")


WRITES = {
    case.name: case
    for case in CASES
    if case.name
    in (
        "1 truncated shard",
        "4 one shard",
        "7 no FFN",
        "7 no attention",
        "10 NaN",
        "10 infinity",
        "11 FFN of zeros",
        "19 code",
        "22 config",
        "27 broken tokenizer",
        "32 overflow",
    )
}


@pytest.mark.parametrize("name", WRITES)
def test_models_that_write_their_own_text(name, moefy, own_pico, tmp_path):
    case = WRITES[name]
    own_pico("llama").rename(tmp_path / "model")
    place = Place(tmp_path, moefy)
    case.arrange(place)
    before = listing(tmp_path)
    assert_refused(place.convert("--calibration", "self"), case.code)
    assert listing(tmp_path) == before


# --- what is said --------------------------------------------------------------------------------


def test_a_plan_writes_nothing(moefy, pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = moefy("convert", pico("llama"), "--plan")
    assert (plain.code, plain.err) == (0, "")
    assert "qwen2_moe" in plain.out and "32 shared + 4 experts x 16" in plain.out
    done = moefy("convert", pico("llama"), tmp_path / "out", "--plan", "--json")
    plan = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert plan["layers_converted"] == 2 and plan["shape"]["num_experts"] == 4
    assert listing(tmp_path) == {}


def test_what_a_plan_foretells(moefy, pico, converted):
    """Parameters and bytes of the plan are those of the model that is written."""
    from transformers import AutoModelForCausalLM

    for family, flags in (("llama", []), ("qwen3", []), ("llama", ["--partition", "static"])):
        plan = json.loads(moefy("convert", pico(family), "--plan", "--json", *flags).out)
        out = converted(pico(family), **({"partition": "static"} if flags else {}))
        model = AutoModelForCausalLM.from_pretrained(out)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert plan["parameters_total"] == total
        header = (out / SINGLE).stat().st_size - plan["disk_bytes"]
        assert 0 < header < 10_000
        dense = AutoModelForCausalLM.from_pretrained(pico(family))
        assert plan["parameters_dense"] == sum(p.numel() for p in dense.parameters())
        assert plan["parameters_active"] < plan["parameters_total"] or flags


ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def test_a_conversion_and_its_report(moefy, pico, text, tmp_path):
    out = tmp_path / "out"
    convert = ["convert", pico("llama"), out, *FEW, "--calibration", text]
    report = ["report", out, "--text", text, "--tokens", "300", "--sequence-length", "100"]
    report += ["--no-speed", "--no-robustness"]
    scores = [*report, "--quick"]  # no processes whose peak memory is measured
    spoken = moefy(*convert)
    assert spoken.code == 0
    assert "Qwen2MoeForCausalLM" in spoken.out and str(out) in spoken.out
    assert all(line.startswith("moefy: ") for line in spoken.err.splitlines())
    told = moefy(*report)
    assert told.code == 0
    assert all(name in told.out for name in ("dense", "converted", "static", "oracle"))
    assert not ESCAPE.search(spoken.out + spoken.err + told.out + told.err)
    assert moefy(*convert, "--quiet", "--force") == Done(0, "", "")
    assert moefy(*scores, "--quiet", "--no-controls") == Done(0, "", "")
    assert set(json.loads((out / "moefy" / "report.json").read_text())["texts"]) == {"text"}

    done = moefy(*convert, "--json", "--force")
    assert done.code == 0
    assert json.loads(done.out, parse_constant=pytest.fail) == json.loads(
        (out / "moefy" / "conversion.json").read_text()
    )
    done = moefy(*scores, "--json", "--no-controls")
    assert done.code == 0
    assert json.loads(done.out, parse_constant=pytest.fail) == json.loads(
        (out / "moefy" / "report.json").read_text()
    )


AGAINST = {
    "another shape": ("active=0.25", "changes more than the method"),
    "unknown partition": ("partition=none", "--partition is 'none'"),
    "unknown option": ("partition=moefication partition.round=3", "did you mean rounds"),
    "no setting": ("partition", "key=value"),
    "clusters of another partition": ("router=llama-moe-v2", "expected --partition llama-moe-v2"),
}


@pytest.mark.parametrize("name", AGAINST)
def test_a_method_that_a_run_cannot_be_held_against(name, moefy, pico, converted, text):
    changes, *says = AGAINST[name]
    run = converted(pico("llama"))
    before = listing(run)
    assert_refused(moefy("report", run, "--text", text, "--against", changes), 2, *says)
    assert listing(run) == before


def test_a_report_gates_a_pipeline(moefy, pico, converted, text, tmp_path):
    run = Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))
    report = ["report", run, "--text", text, "--quick", "--no-speed", "--quiet"]
    report += ["--tokens", "200", "--sequence-length", "64"]
    assert moefy(*report, "--fail-if", "dnll>99", "--fail-if", "kl<0") == Done(0, "", "")
    done = moefy(*report, "--fail-if", "dnll>-99", "--fail-if", "dead>=0", "--fail-if", "dnll>99")
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert "dnll is" in line and "on text" in line and "dead is" in line and "99: dnll" in line
    # Speed was not measured, so a gate on speed stays shut; the report is there all the same.
    assert moefy(*report, "--fail-if", "decode_ratio<1").code == 1
    assert (run / "moefy" / "report.json").is_file()


def test_two_texts_of_one_name_are_two_texts(moefy, pico, converted, text, tmp_path):
    run = Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        content = text.read_text()
        (tmp_path / folder / "wiki.txt").write_text(content if folder == "a" else content[5000:])
    texts = [word for folder in "ab" for word in ("--text", tmp_path / folder / "wiki.txt")]
    few = ["--tokens", "100", "--sequence-length", "100", "--quick", "--no-speed"]
    done = moefy("report", run, *texts, *few, "--json")
    assert len(json.loads(done.out, parse_constant=pytest.fail)["texts"]) == 2  # NaN is no JSON


def test_families(moefy):
    done = moefy("families")
    assert (done.code, done.err) == (0, "")
    assert all(name in done.out for name in families.names())
    assert not ESCAPE.search(done.out)


def test_version(moefy):
    assert moefy("--version") == Done(0, f"{__version__}\n", "")


def test_no_arguments_are_a_cry_for_help(moefy):
    done = moefy()
    assert done.code == 2 and done.err == ""
    assert "convert" in done.out and "report" in done.out


def test_a_wrong_command(moefy):
    assert_refused(moefy("konvert"), 2, "konvert")


def test_every_default_is_told(moefy, monkeypatch):
    """Square brackets are markup to the help's printer, and would be lost."""
    monkeypatch.setenv("COLUMNS", "1000")
    said = moefy("convert", "--help").out
    for value in (
        "0.5",
        "alternating",
        "linear",
        "refit",
        "auto",
        "self",
        "as-stored",
        "16,384, or 262,144 on a GPU",
    ):
        assert re.search(rf"[\[(](default: )?{value}[\])]", said), value
    assert "Python's own manual" in moefy("report", "--help").out


@pytest.mark.parametrize("option", ["partition", "router"])
def test_the_help_names_every_method_that_can_be_written(option, moefy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (line,) = [n for n in moefy("convert", "--help").out.splitlines() if f"--{option} " in n]
    files = (Path(cli.__file__).parent.parent / "convert" / option).glob("[!_]*.py")
    modules = [importlib.import_module(f"moefy.convert.{option}.{file.stem}") for file in files]
    names = {m.__name__.rpartition(".")[2] for m in modules if getattr(m, "WRITABLE", True)}
    names = {name.replace("_", "-") for name in names}
    (listed,) = re.findall(r"One of (.*?)\.", line)
    assert set(listed.split(", ")) == names


FORMER = {
    "--experts-per-token 2": "--experts-per-token is called --top-k now",
    "--shared 0.3333": "--shared is called --shared-fraction now",
    "--total 1": "--total is called --overlap now",
    "--fresh": "--fresh is called --restart now",
    "--set shared=0.3333": "shared is called shared_fraction now",
}


@pytest.mark.parametrize("flags", FORMER)
def test_a_flags_former_name_is_taken_with_a_note(flags, moefy, pico):
    done = moefy("convert", pico("llama"), "--plan", *flags.split())
    assert (done.code, done.err) == (0, f"moefy: {FORMER[flags]}\n")
    assert f"{flags.split()[0]} " not in moefy("convert", "--help").out or "--set" in flags


def test_the_former_flags_of_a_fine_tune(moefy, converted, pico):
    """Each is noted before what it sets is refused."""
    run = converted(pico("llama"))
    done = moefy("finetune", run, "--resume", "--dtype", "as-stored", "--accumulate", "0")
    assert done.code == 2
    assert done.err.splitlines() == [
        "moefy: --accumulate is called --gradient-accumulation-steps now",
        "moefy: --dtype is called --compute-dtype now",
        "moefy: compute_dtype as-stored is called auto now",
        "moefy: --resume is what happens without it now; --restart starts over",
        "moefy: --gradient-accumulation-steps is 0; expected at least 1",
    ]


# --- signals -------------------------------------------------------------------------------------


def test_a_terminated_command_leaves_nothing(moefy, pico, text, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def watching(*, quiet: bool):
        yield lambda stage, *_: signal.raise_signal(signal.SIGTERM) if stage == "copy" else None

    monkeypatch.setattr("moefy.progress.watching", watching)
    done = moefy("convert", pico("llama"), tmp_path / "out", *FEW, "--calibration", text)
    assert_refused(done, 130, "interrupted")
    assert listing(tmp_path) == {}


def test_an_interrupted_process_leaves_nothing(pico, tmp_path):
    """While the model writes its own calibration text, which it would do for minutes."""
    command = [sys.executable, "-m", "moefy", "convert", str(pico("llama")), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--tokens", "4000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not list(tmp_path.glob(".out.moefy-part")):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "moefy: interrupted; nothing was written"
    assert all(line.startswith("moefy: ") for line in err.splitlines())
    assert list(tmp_path.iterdir()) == []
