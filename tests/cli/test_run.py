"""`moefy run` does what a recipe asks for, once, and never on what another recipe has made."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from pico import RECIPE as SMALL

from moefy import pipeline
from moefy.config.finetune import Settings
from moefy.config.options import fields
from moefy.config.recipe import Recipe, read
from moefy.errors import MoefyError
from moefy.evaluate.run import evaluate

RECIPE = f"# A comment\n{SMALL}tokens = 300\nsequence_length = 100\n"


@pytest.fixture(scope="module")
def finished(pico, text, tmp_path_factory):
    """The recipe's file and the folder of its run, with every stage done."""
    place = tmp_path_factory.mktemp("run")
    file = place / "small.toml"
    file.write_text(RECIPE.format(model=pico("llama"), text=text))
    return file, place / "out", go(file, place / "out")


def go(file: Path, out: Path, **options) -> dict[str, bool]:
    """Run the recipe; whether each stage had to be done."""
    wanted = pipeline.stages(pipeline.declared(file), out, **options)
    return {stage.name: told is not None for stage, told in pipeline.run(wanted, **options)}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of all that, to be changed at will."""
    file, out, _ = finished
    shutil.copytree(out.parent, tmp_path / "run")
    return tmp_path / "run" / file.name, tmp_path / "run" / out.name


def bytes_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_all_stages_are_done_once(finished):
    file, out, done = finished
    assert done == {"convert": True, "finetune": True, "report": True}
    tuned = out.with_name("out-finetuned")
    for folder in (out, tuned):
        assert (folder / "moefy" / "conversion.json").is_file()
    assert (tuned / "moefy" / "report.html").is_file()
    assert not (out / "moefy" / "report.json").exists()
    report = json.loads((tuned / "moefy" / "report.json").read_text())
    assert {told["kind"] for told in report["models"].values()} >= {
        "dense",
        "converted",
        "finetuned",
    }
    before = bytes_of(out.parent)
    assert go(file, out) == {"convert": False, "finetune": False, "report": False}
    assert bytes_of(out.parent) == before


def test_what_a_run_did_is_in_its_folder(finished):
    file, out, _ = finished
    wanted, folder = pipeline.declared(file), out.with_name("out-finetuned") / "moefy"
    assert Recipe(**read(folder / "recipe.toml")) == wanted.recipe
    assert Recipe(**read(out / "moefy" / "recipe.toml")) == wanted.recipe
    again = pipeline.declared(folder / "recipe.toml")  # a run's own recipe is one to run again
    assert (again.recipe, again.finetune) == (wanted.recipe, wanted.finetune)
    told = json.loads((folder / "report.json").read_text())["settings"]
    assert told == wanted.report.as_json()


def test_a_stage_that_is_gone_is_done_again(copied):
    file, out = copied
    (out.with_name("out-finetuned") / "moefy" / "report.json").unlink()
    assert go(file, out) == {"convert": False, "finetune": False, "report": True}
    shutil.rmtree(out.with_name("out-finetuned"))
    assert go(file, out) == {"convert": False, "finetune": True, "report": True}


@pytest.mark.parametrize("folder", ["out", "out-finetuned"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_stage_that_lost_a_file_is_not_skipped(folder, name, copied):
    file, out = copied
    out.with_name(folder).joinpath(name).unlink()
    kept = bytes_of(out.parent)
    with pytest.raises(
        MoefyError, match=f"{folder}.*{name}.*--force to do all stages anew"
    ) as caught:
        go(file, out)
    assert caught.value.code == 3
    assert bytes_of(out.parent) == kept


def test_a_stage_that_lost_a_file_is_done_anew_by_force(copied):
    file, out = copied
    out.joinpath("model.safetensors").unlink()
    out.with_name("out-finetuned").joinpath("config.json").unlink()
    assert set(go(file, out, force=True).values()) == {True}
    assert set(go(file, out).values()) == {False}


def test_other_measurements_are_made_without_the_rest(copied):
    file, out = copied
    file.write_text(file.read_text().replace("tokens = 300", "tokens = 200"))
    assert go(file, out) == {"convert": False, "finetune": False, "report": True}


def test_a_report_made_by_hand_counts_for_what_it_is_of(copied):
    file, out = copied
    tuned = out.with_name("out-finetuned")
    settings = pipeline.declared(file).report
    evaluate(tuned, settings)
    assert go(file, out)["report"] is False
    evaluate(tuned, dataclasses.replace(settings, tokens=100))
    assert go(file, out) == {"convert": False, "finetune": False, "report": True}
    told = json.loads((tuned / "moefy" / "report.json").read_text())
    assert told["settings"] == settings.as_json()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("tokens = 512\nsequence_length = 64\n\n", "active = 0.25\ntokens = 512\n\n",
         ("active is 0.5 there and 0.25", "sequence_length is 64 there and 512")),
        ("batch_size = 2", "batch_size = 1", ("fine-tuned by", "batch_size is 2 there and 1")),
    ],
)  # fmt: skip
def test_another_recipe_is_refused(before, after, says, copied):
    file, out = copied
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after).replace("tokens = 512\n\n", "tokens = 4096\n\n", 1))
    kept = bytes_of(out.parent)
    with pytest.raises(MoefyError) as caught:
        go(file, out)
    assert caught.value.code == 2
    assert all(word in str(caught.value) for word in (*says, "--force"))
    assert bytes_of(out.parent) == kept


def test_a_run_of_former_names_counts_as_done(copied):
    """What an earlier version wrote is opened, and is the same run."""
    file, out = copied
    for folder in (out, out.with_name("out-finetuned")):
        recipe = folder / "moefy" / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("overlap = ", "total = "))
        assert "total = 1.0" in recipe.read_text()
    told = out.with_name("out-finetuned") / "moefy" / "finetune.json"
    summary = json.loads(told.read_text())
    before = {option.option.old: name for name, option in fields(Settings).items()}
    before = {old: summary["settings"].pop(name) for old, name in before.items() if old}
    assert "warmup" in before and "soft" in before
    summary["settings"] |= before
    told.write_text(json.dumps(summary))
    assert go(file, out) == {"convert": False, "finetune": False, "report": False}


@pytest.mark.parametrize("line", ['device = "cpu"', "ignore_index = true"])
def test_what_decides_nothing_may_differ(line, copied):
    file, out = copied
    file.write_text(f"{line}\n{file.read_text()}")
    assert go(file, out) == {"convert": False, "finetune": False, "report": False}


def test_what_says_how_text_is_read_matters_to_text_alone(tmp_path):
    of_text = {"model": "demo", "calibration": "text.txt"}
    for key, value in (("text_field", "content"), ("stratify", False)):
        same, other = ({"model": "demo"}, {"model": "demo", key: value})
        assert pipeline._deciding(Recipe(**same)) == pipeline._deciding(Recipe(**other))
        assert pipeline._deciding(Recipe(**of_text)) != pipeline._deciding(
            Recipe(**of_text, **{key: value})
        )
    ways = [
        [pipeline._deciding(Recipe(**told, compute_dtype=name)) for name in ("auto", "float32")]
        for told in (of_text, {"model": "demo"})
    ]
    assert [first == second for first, second in ways] == [True, False]


def test_a_run_is_known_by_relative_paths_too(finished, monkeypatch):
    """The recipe of a run holds absolute paths, whatever was typed."""
    file, out, _ = finished
    text = Path(pipeline.declared(file).recipe.calibration)
    monkeypatch.chdir(text.parent)
    near = out.parent / "near.toml"
    near.write_text(file.read_text().replace(f'"{text}"', f'"{text.name}"'))
    try:
        done = {stage.name: stage.done() for stage in pipeline.stages(pipeline.declared(near), out)}
    finally:
        near.unlink()
    assert done["convert"] and done["finetune"]


def test_a_model_that_was_trained_further_is_converted_anew(copied, own_pico):
    file, out = copied
    model = own_pico("llama")
    file.write_text(file.read_text().replace(pipeline.declared(file).recipe.model, str(model)))
    for folder in (out, out.with_name("out-finetuned")):
        recipe = folder / "moefy" / "recipe.toml"
        recipe.write_text(recipe.read_text().replace(read(recipe)["model"], str(model)))
    assert go(file, out) == {"convert": False, "finetune": False, "report": False}
    with (model / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    with pytest.raises(MoefyError, match="was converted from other weights than .* --force") as no:
        go(file, out)
    assert no.value.code == 2


def test_a_fine_tune_of_another_conversion_is_refused(copied):
    file, out = copied
    told = out / "moefy" / "conversion.json"
    summary = json.loads(told.read_text())
    summary["outputs"]["model.safetensors"] = "0" * 64
    told.write_text(json.dumps(summary))
    with pytest.raises(MoefyError) as caught:
        go(file, out)
    assert caught.value.code == 2 and "from another conversion" in str(caught.value)


def test_what_only_tells_of_a_fine_tune_may_differ(copied):
    file, out = copied
    file.write_text(file.read_text().replace("save_every = 2", "save_every = 9"))
    assert go(file, out) == {"convert": False, "finetune": False, "report": False}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[report]\ntxt = 'a'", "unknown [report] key 'txt'"),
        ("[report]\ntokens = 'many'", "--tokens is 'many'; expected int"),
        ("[report]\ntokens = true", "expected int"),
        ("[report]\ntext = [1]", "expected a list of strings"),
        ("[report]\neffort = 'ful'", "did you mean full"),
        ("[report]\nlimit = 0", "--limit is 0; expected at least 1"),
        ("report = 3", "expected a table"),
        ("[finetune]\nbatch = 1", "did you mean batch_size"),
        ("finetune = 3", "no table [finetune]"),
        ("actve = 0.5", "did you mean active"),
    ],
)
def test_what_is_wrong_in_a_recipe(table, says, tmp_path):
    file = tmp_path / "a.toml"
    head, tail = ("", table) if table.startswith("[") else (table + "\n", "")
    file.write_text(f'{head}model = "demo"\n{tail}')
    with pytest.raises(MoefyError) as caught:
        pipeline.declared(file)
    assert caught.value.code == 2 and says in str(caught.value)


def test_a_recipe_without_tables_is_converted_and_reported(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('model = "demo"\n')
    names = [stage.name for stage in pipeline.stages(pipeline.declared(file), tmp_path / "out")]
    assert names == ["convert", "report"]


GALLERY = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


TUNING = [file for file in GALLERY if "model" not in read(file)]
"""Those of a fine-tune alone, for any run."""


def head(file: Path) -> str:
    """What a recipe tells of itself."""
    return "".join(line for line in file.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize(
    "file", [f for f in GALLERY if f not in TUNING], ids=lambda file: file.stem
)
def test_the_gallery_holds_recipes_with_results(file, pico, text, tmp_path):
    """Every recipe parses, would prepare for a model of its family, and tells what it came to."""
    from moefy.convert.prepare import prepare

    assert "moefy run" in head(file)
    assert "perplexity" in head(file), "no result at the top"
    wanted = pipeline.declared(file)
    width = 2048 if "gemma" in file.stem else 1536  # that of Gemma 3 270M, or of SmolLM2-135M
    model = pico("llama", hidden_size=96, intermediate_size=width)
    job = prepare(Recipe(**{**read(file), "model": str(model), "calibration": str(text)}))
    assert wanted.recipe.target in ("auto", job.target.model_type)
    assert len(GALLERY) >= 5


@pytest.mark.parametrize("file", TUNING, ids=lambda file: file.stem)
def test_the_gallery_tells_what_fine_tunes_came_to(file):
    from moefy.config.finetune import build

    assert build(file, {"data": "text.txt"}, []).tokens > 0
    assert "moefy finetune" in head(file)
    assert "perplexity" in head(file) or "Not measured" in head(file)
