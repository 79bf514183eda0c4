"""Every command behind `convert` refuses in one line what cannot be, and then changes nothing.

The rows are in `refusal_cases`; those of `convert` and `inspect` are run by `test_refused_models`
and `test_refused_runs`. Numbers out of range are asked of every option that takes one.
"""

import shutil
from pathlib import Path

import pytest
from command import assert_refused, listing
from pico import RECIPE
from refusal_cases import CASES, WHOLE, arrange

from moefy import pipeline
from moefy.cli.finetune import Finetune
from moefy.config import finetune, report
from moefy.config.options import fields
from moefy.config.recipe import Recipe
from moefy.runs import gguf

pytestmark = pytest.mark.usefixtures("never_hangs")


@pytest.fixture(scope="module")
def whole(pico, text, tmp_path_factory) -> Path:
    """A folder with a model, its conversion `out`, the fine-tune of it, and a text."""
    place = tmp_path_factory.mktemp("whole")
    model = Path(shutil.copytree(pico("llama"), place / "model"))
    shutil.copy(text, place / "text.txt")
    recipe = place / "small.toml"
    least = "tokens = 128\nsequence_length = 64\ncontrols = false\n"
    recipe.write_text((RECIPE + least).format(model=model, text=place / "text.txt"))
    for _ in pipeline.run(pipeline.stages(pipeline.declared(recipe), place / "out")):
        pass
    return place


@pytest.fixture
def place(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be changed at will, and to be in."""
    copy = Path(shutil.copytree(whole, tmp_path / "place"))
    arrange(copy)
    monkeypatch.chdir(copy)
    # The converter is another program, of which only the exit code is ours.
    monkeypatch.setattr(gguf, "_check_programs", lambda kind: None)
    monkeypatch.setattr(gguf, "_convert", lambda run, out, kind: out.write_bytes(b"GGUF"))
    return copy


@pytest.mark.parametrize("command", WHOLE)
def test_what_is_whole_is_not_refused(command, place, moefy):
    done = moefy(*WHOLE[command].split())
    assert done.code == 0, done


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case, place, moefy):
    if case.damage:
        folder = next(word for word in case.line.split() if word.startswith("out"))
        case.damage(place / folder)
    before = listing(place)
    assert_refused(moefy(*case.line.split()), case.code, *case.says)
    assert listing(place) == before


def test_rows_are_not_repeated():
    assert len({case.name for case in CASES}) == len(CASES)


# --- numbers -------------------------------------------------------------------------------------

COMMANDS = {
    "convert model new --calibration text.txt --quiet": (Recipe,),
    WHOLE["finetune"]: (finetune.Settings, Finetune),
    WHOLE["report"]: (report.Settings,),
}
NUMBERS = {int: ("-1",), float: ("-1", "nan", "inf")}
"""What no option can be."""
RANGES = [
    (line, option.flag, number)
    for line, tables in COMMANDS.items()
    for table in tables
    for option in fields(table).values()
    for number in NUMBERS.get(option.kind, ())
    if option.option.flag
]


@pytest.mark.parametrize(("line", "flag", "number"), RANGES, ids=lambda word: word.split()[0])
def test_a_number_out_of_range(line, flag, number, place, moefy):
    before = listing(place)
    assert_refused(moefy(*line.split(), flag, number), 2, f"{flag} is {number}")
    assert listing(place) == before
