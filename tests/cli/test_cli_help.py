"""What needs no tensor answers before anything slow is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from moefy.cli.options_page import COMMANDS, page
from moefy.config.options import fields

GUIDE = Path(__file__).parents[2] / "recipes" / "guide" / "options.md"

SLOW_TO_IMPORT = {"torch", "transformers", "numpy", "sklearn", "scipy", "datasets"}


def run(*arguments: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The finished `python ARGUMENTS` and the top-level packages that it imported."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line]
    return done, {name.split(".")[0] for name in names}


def test_help_imports_nothing_slow():
    done, imported = run("-m", "moefy", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    assert "typer" in imported
    assert imported & SLOW_TO_IMPORT == set()


@pytest.mark.parametrize("command", ["inspect", "families"])
def test_what_reads_headers_imports_nothing_slow(command, pico):
    done, imported = run("-m", "moefy", command, *([pico("phi3")] if command == "inspect" else []))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "glm4_moe" in done.stdout
    assert "moefy" in imported
    assert imported & SLOW_TO_IMPORT == set()


def test_an_import_inside_a_function_is_seen():
    _, imported = run("-c", "def late():\n    import scipy\nlate()")
    assert imported & SLOW_TO_IMPORT == {"numpy", "scipy"}


@pytest.mark.parametrize("command", ["convert", "finetune", "report", "run"])
def test_the_help_of_a_command_imports_nothing_slow(command):
    done, imported = run("-m", "moefy", command, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    assert imported & SLOW_TO_IMPORT == set()


def test_the_page_of_options_is_the_real_one():
    assert GUIDE.read_text(encoding="utf-8") == page(), "make it by moefy.cli.options_page"


def test_every_option_has_a_line_of_help_and_of_the_page():
    for options in (table for tables in COMMANDS.values() for table in tables):
        for option in fields(options).values():
            assert option.option.hidden or option.option.help.endswith(".")
            assert option.option.hidden or f"`{option.flag}`" in page()
