"""What every command that takes a run asks of it: that it is one, whole, and of its dense model."""

import json
import shutil
from pathlib import Path

import damage as d
import pytest
from command import assert_refused, listing
from pico import write_tuning
from safetensors.torch import load_file, save_file

from moefy.config.finetune import Settings as Tuning
from moefy.config.recipe import build
from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate.run import evaluate
from moefy.finetune import inputs
from moefy.runs import folder as runs

FINETUNED = "moefy/finetune.json"
FEW = ("--tokens", "128", "--sequence-length", "64", "--quick", "--no-controls", "--no-speed")
COMMANDS = {
    "report": lambda run: ("report", run, *FEW),
    "finetune": lambda run: ("finetune", run, "--tokens", "512"),
    "verify": lambda run: ("verify", run),
    "push": lambda run: ("push", run, "me/model", "--dry-run"),
    "export": lambda run: ("export", "gguf", run),
}


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A copy of a run, to be changed at will."""
    return Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))


def dense(folder: Path, pico) -> None:
    shutil.copytree(pico("llama"), folder)


def mixture(folder: Path, pico) -> None:
    dense(folder, pico)
    d.config(num_experts=4)(folder)


def adapter(folder: Path, pico) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")


def ggufs(folder: Path, pico) -> None:
    folder.mkdir()
    (folder / "model.gguf").write_text("GGUF")


OTHERS = {
    "dense": (dense, "a dense model: convert it first"),
    "mixture": (mixture, "a Mixture of Experts without the report of a conversion"),
    "adapter": (adapter, "an adapter: merge it first"),
    "ggufs": (ggufs, "a folder of GGUF files"),
    "empty": (lambda folder, pico: folder.mkdir(), "an empty folder"),
    "model.gguf": (lambda folder, pico: folder.write_text("GGUF"), "a GGUF file"),
    "text.txt": (lambda folder, pico: folder.write_text("text"), "a file"),
    "nothing": (lambda folder, pico: None, "no such folder"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_run_is_named(command, name, moefy, pico, tmp_path):
    make, says = OTHERS[name]
    make(tmp_path / name, pico)
    before = listing(tmp_path)
    done = moefy(*COMMANDS[command](tmp_path / name))
    assert_refused(done, 3, f"{name} is not a whole run of moefy ({says}")
    assert "fetch it again" not in done.err
    assert listing(tmp_path) == before


BROKEN = [
    d.cut(FINETUNED, 100),
    d.write(FINETUNED, ""),
    d.write(FINETUNED, "[]"),
    d.write(FINETUNED, "{}"),
    d.write(FINETUNED, "null"),
    d.write(FINETUNED, b"\xff"),
    d.write(FINETUNED, '{"a": ' * 10_000),
    d.pipe(FINETUNED),
    d.config(FINETUNED, outputs=...),
    d.config(FINETUNED, outputs=["model.safetensors"]),
    d.config(FINETUNED, outputs={"model.safetensors": 3}),
    d.config(FINETUNED, tokens="many"),
    d.config(FINETUNED, tokens=None),
    d.config(FINETUNED, train=[]),
    d.config(FINETUNED, train={}),
    d.config(FINETUNED, validation={"before": {"loss": 1.0}}),
    d.config(FINETUNED, validation={"before": {"loss": "1"}, "after": {"loss": 1.0}}),
    d.config(FINETUNED, parent="elsewhere"),
    d.config(FINETUNED, settings=3),
    d.config(FINETUNED, guard=[1]),
]


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        *(("verify", damage) for damage in BROKEN),
        *((command, damage) for command in ("report", "push") for damage in BROKEN[:3]),
    ],
    ids=lambda value: getattr(value, "words", value),
)
def test_a_broken_report_of_a_fine_tune(command, damage, moefy, run):
    write_tuning(run)
    damage(run)
    before = listing(run)
    assert_refused(moefy(*COMMANDS[command](run)), 3, "not a whole run of moefy", "finetune.json")
    assert listing(run) == before


CONVERSION = "moefy/conversion.json"


BROKEN_CONVERSION = [
    d.cut(CONVERSION, 300),
    d.config(CONVERSION, reopened=...),
    d.write(CONVERSION, "[]"),
    *(
        d.config(CONVERSION, **{key: 3})
        for key in ("moefy", "task", "engines", "outputs", "layers_left_dense", "hub_id")
    ),
    d.config(CONVERSION, reopened={}),
    d.config(CONVERSION, outputs={"config.json": None}),
    d.config(CONVERSION, layers=[3]),
    d.config(CONVERSION, notes=[{}]),
    d.config(CONVERSION, inputs=[]),
]


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        *(("verify", damage) for damage in BROKEN_CONVERSION),
        *((command, damage) for command in COMMANDS for damage in BROKEN_CONVERSION[:2]),
    ],
    ids=lambda value: getattr(value, "words", value),
)
def test_a_broken_report_of_a_conversion(command, damage, moefy, run):
    damage(run)
    assert_refused(moefy(*COMMANDS[command](run)), 3, "not a whole run of moefy", "conversion.json")


def test_a_whole_report_is_read(run):
    """The negative control: what `write_tuning` writes as a fine-tune's report is one."""
    assert runs.read_tuning(run) is None
    report = write_tuning(run)
    assert runs.read_tuning(run) == report


@pytest.mark.parametrize(
    "report", ["[]", "{", "{}", '{"format": 1}', '{"format": 2, "texts": [1], "models": {}}']
)
def test_a_broken_report_is_not_pushed(report, moefy, run):
    (run / "moefy" / "report.json").write_text(report)
    assert_refused(
        moefy("push", run, "me/model", "--dry-run", "--quiet"), 7, "measure again: moefy report"
    )


# --- its dense model -----------------------------------------------------------------------------


def other_weights(folder: Path) -> None:
    """Train a dense model further, as it were."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1.1
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def pair(own_pico, text, tmp_path) -> tuple[Path, Path]:
    """A dense model of its own, and a run that was made from it."""
    from moefy.convert.prepare import prepare
    from moefy.convert.run import convert

    model = own_pico("llama")
    few = {"tokens": 512, "sequence_length": 64, "calibration": str(text)}
    out = tmp_path / "pair"
    convert(prepare(build(None, {"model": str(model), **few}, [])), out)
    return model, out


def scored(run: Path, text: Path, **more) -> dict:
    few = {"tokens": 128, "sequence_length": 64, "speed": False, "effort": "quick"}
    return evaluate(run, Settings(text=(text,), **(few | more)))


def taught(run: Path, **more) -> Path:
    return inputs.teacher_folder(inputs.open_run(run), Tuning(**more))[0]


def test_a_model_that_was_trained_further_is_not_the_run_s_own(pair, run, text):
    model, out = pair
    assert scored(out, text)["notes"] == [] and taught(out) == model
    other_weights(model)
    for ask in (lambda: scored(out, text), lambda: taught(out)):
        with pytest.raises(MoefyError, match="its weights differ; name that one") as caught:
            ask()
        assert caught.value.code == 3
    # Who names it knows it: what is held against it is said of the report.
    report = scored(out, text, dense=str(model))
    assert "converted from other weights" in report["notes"][0]
    assert report["models"]["dense"]["meaning"] == "a model that --dense names"
    assert taught(out, teacher=str(model)) == model


def test_a_run_of_another_model_does_not_stand_beside(pair, run, text):
    """Both are as large, and their tokenizers are the same."""
    model, out = pair
    other_weights(model)
    assert scored(run, text, against=(str(out),))["texts"]  # its own was made from the same files
    d.config("moefy/conversion.json", inputs={"model.safetensors": "0" * 64})(out)
    with pytest.raises(MoefyError, match="pair was not converted from .* its weights differ"):
        scored(run, text, against=(str(out),))


def test_a_model_that_has_moved_is_used_everywhere(pair, text, tmp_path, monkeypatch):
    """Controls and methods are converted from it too; before it is named, it is missed."""
    model, out = pair
    model.rename(tmp_path / "moved")
    for ask, flag in ((lambda: scored(out, text), "--dense"), (lambda: taught(out), "--teacher")):
        with pytest.raises(MoefyError, match=f"is not at {model}; name its folder by {flag}"):
            ask()
    assert taught(out, teacher=str(tmp_path / "moved")) == tmp_path / "moved"
    more = {"controls": True, "against": ("partition=moefication",)}
    report = scored(out, text, dense=str(tmp_path / "moved"), **more)
    reasons = [row["reason"] for row in report["not_run"]]
    assert {"static", "partition=moefication"} <= report["texts"]["text"].keys(), reasons
    assert report["notes"] == []


def test_controls_are_made_from_the_model_that_was_converted(pair, text):
    model, out = pair
    other_weights(model)
    asked = {"dense": str(model)}
    for more in ({"controls": True}, {"against": ("partition=moefication",)}):
        with pytest.raises(MoefyError, match="controls and methods of --against") as caught:
            scored(out, text, **asked, **more)
        assert caught.value.code == 2


def test_paths_are_recorded_so_that_they_lead_there_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "text.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    recipe = build(None, {"model": "m", "calibration": "text.txt", "tokens": 4096}, [])
    assert recipe.model == str(tmp_path / "m")
    assert recipe.calibration == str(tmp_path / "text.txt")
    assert build(None, dict(vars(recipe)), []) == recipe
    for name in ("owner/name", "demo"):  # what is no path here stays
        assert build(None, {"model": name}, []).model == name
    (tmp_path / "self").mkdir()  # and a word stays a word
    assert build(None, {"model": "demo", "calibration": "self"}, []).calibration == "self"


def test_a_run_is_known_from_another_folder(pico, text, moefy, tmp_path, monkeypatch):
    shutil.copytree(pico("llama"), tmp_path / "m")
    shutil.copyfile(text, tmp_path / "t.txt")
    monkeypatch.chdir(tmp_path)
    few = ("--tokens", "512", "--sequence-length", "64", "--calibration", "t.txt", "--quiet")
    assert moefy("convert", "m", "out", *few).code == 0
    told = json.loads((tmp_path / "out" / CONVERSION).read_text())
    assert (told["model"], told["hub_id"]) == (str(tmp_path / "m"), None)
    recipe = runs.read_recipe(tmp_path / "out")
    assert (recipe.model, recipe.calibration) == (str(tmp_path / "m"), str(tmp_path / "t.txt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = moefy("convert", "--reproduce", "../out/moefy/recipe.toml", "again", "--quiet")
    assert again.code == 0, again
    done = moefy("report", "../out", "--text", "../t.txt", *FEW, "--quiet")
    assert done.code == 0, done
