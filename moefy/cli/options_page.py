"""The page of options: `python -m moefy.cli.options_page > recipes/guide/options.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moefy.cli.convert import Convert
from moefy.cli.finetune import Finetune
from moefy.cli.parameters import default_of, flags
from moefy.cli.report import Report
from moefy.config import finetune, report
from moefy.config.options import MOST, Field, fields, number
from moefy.config.recipe import Recipe

HEAD = """# Options

`python -m moefy.cli.options_page` makes this page from the declarations that also check the values
and make `--help`.

Names with two dashes are flags. Every name of a first table is also a key of a recipe, with `_` for
`-`: `--top-k 2` is `top_k = 2` in the file, or `--set top_k=2`. Names without dashes are keys only.
`moefy run` takes a recipe: the keys of `moefy convert`, and those of `moefy finetune` and
`moefy report` in the tables `[finetune]` and `[report]`. Names of the version before this one still
work, with a note."""

COMMANDS = {"convert": (Recipe, Convert), "finetune": (finetune.Settings, Finetune)}
COMMANDS |= {"report": (report.Settings, Report)}
KINDS = {
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    bool: "true or false",
    Mapping: "table",
}


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for command, (keys, switches) in COMMANDS.items():
        parts += [f"\n## moefy {command}\n", *_table(keys), "\nOn the command line only:\n"]
        parts += _table(switches)
    return "\n".join(parts) + "\n"


def _table(options: type) -> Iterator[str]:
    yield "| option | takes | default | what it is |"
    yield "|---|---|---|---|"
    for option in fields(options).values():
        if option.option.hidden:
            continue
        line = option.option.help
        if option.option.old:
            line += f" Formerly `{option.option.old}`."
        names = " ".join(f"`{name}`" for name in flags(option).split("/"))
        cells = (names, _takes(option), default_of(option), line)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(option: Field) -> str:
    """The choices or the range of an option, else its type."""
    if option.option.choices:
        return ", ".join(f"`{choice}`" for choice in option.option.choices if choice)
    kind = KINDS[option.kind]
    if option.kind is bool and option.option.flag:
        return ""
    if option.kind not in MOST:
        return kind
    if option.option.course:
        return "number from 0, or a course"
    if option.option.most is None:
        return f"{kind} from {number(option.option.least)}"
    return f"{kind} from {number(option.option.least)} to {number(option.option.most)}"


if __name__ == "__main__":
    print(page(), end="")
