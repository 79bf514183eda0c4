"""README, guide and results: short enough to read, and true of the code they speak of."""

import re
from pathlib import Path

import click
import pytest
from typer.main import get_command

from moefy.cli import app
from moefy.config import finetune, options, recipe

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "recipes" / "guide").glob("*.md"))
GENERATED = ("options.md", "families.md")
"""Pages that a program writes, as long as what they list."""
WRITTEN = [ROOT / "README.md", *GUIDE]
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.md"))]

OTHER_PROGRAMS = {
    "--help": "every command",
    "--no-deps": "pip",
    "--nproc-per-node": "torchrun",
    "--override-kv": "llama.cpp",
    **dict.fromkeys(("--cpu-moe", "--n-cpu-moe", "--no-mmap"), "llama.cpp"),
    **dict.fromkeys(("--cpu-offload-gb", "--cpu-offload-params"), "vLLM"),
    "--disable-shared-experts-fusion": "SGLang",
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code, in which no link and no heading stands."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def shown(command: click.Command) -> set[str]:
    """The options that the help of a command and of its subcommands shows."""
    names = {
        option
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    subcommands = getattr(command, "commands", {}).values()
    return names.union(*(shown(subcommand) for subcommand in subcommands))


SHOWN = shown(get_command(app)) | set(OTHER_PROGRAMS)
SETTINGS = {*options.fields(recipe.Recipe), *options.fields(finetune.Settings)}
BENCHMARKS = "".join(file.read_text() for file in (ROOT / "recipes" / "benchmarks").glob("*.py"))
SCRIPTS = {f"--{word.replace('_', '-')}" for word in re.findall(r"^    (\w+): ", BENCHMARKS, re.M)}
"""What looks like an option of a benchmark, which typer makes from a parameter."""


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


@pytest.mark.parametrize("page", [p for p in GUIDE if p.name not in GENERATED], ids=name)
def test_a_page_of_the_guide_is_short(page):
    assert len(page.read_bytes()) <= 6144


def test_the_gallery_is_short():
    assert len((ROOT / "recipes" / "README.md").read_bytes()) <= 6144


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_option_is_one_that_help_shows(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text("utf-8")))
    assert named <= (SHOWN if page in WRITTEN else SHOWN | SCRIPTS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_setting_is_one_that_a_recipe_holds(page):
    named = set(re.findall(r"--set\s+(\w+)=", page.read_text("utf-8")))
    assert named <= SETTINGS | {"key"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"\b((?:moefy|tests|recipes)/[\w./-]+\.(?:py|toml|md))\b", page.read_text())
    missing = [file for file in named if not (ROOT / file).exists() and "NAME" not in file]
    # What lies in a run is named in the same way.
    assert [file for file in missing if not re.match(r"moefy/(report|recipe)\.", file)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_paragraph_holds_more_than_five_numbers(page):
    text = re.sub(r"`[^`]*`|(?<=\])\([^)]*\)", "", prose(page))
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        if not paragraph.startswith(("|", "    ")):
            numbers = re.findall(r"(?<![\w.-])[-+]?\.?\d[\d,.e-]*(?![\w-])", paragraph)
            assert len(numbers) <= 5, paragraph
