"""Commands whose parameters are the fields of dataclasses; see `moefy.config.options`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from typing import Annotated, Any, TypeVar

import typer

from moefy.cli.shared import note
from moefy.config.options import Field, as_flag, check, fields, number, renamed

Options = Mapping[str, Any]
"""The options of a recipe that the command line names, without defaults."""
Switches = TypeVar("Switches")


def command(
    recipe: type, switches: type[Switches]
) -> Callable[[Callable[[Options, Switches], None]], Callable[..., None]]:
    """A command that takes the fields of `recipe` and of `switches`.

    The function gets the options of `recipe` that the command line names, since a recipe's file
    sets the others, and a value of the class `switches`.
    """

    def decorate(function: Callable[[Options, Switches], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def invoke(**values: Any) -> None:
            values = {name: value for name, value in values.items() if value is not None}
            for options in (recipe, switches):
                values = renamed(options, values, note, as_flag)
            others = {name: values.pop(name) for name in fields(switches) if name in values}
            function(values, switches(**check(switches, others)))

        parameters = [*_parameters(recipe, optional=True), *_parameters(switches, optional=False)]
        parameters.sort(key=lambda parameter: not _is_argument(parameter))
        # typer reads the signature, and the annotations for what the signature lacks.
        invoke.__dict__["__signature__"] = inspect.Signature(parameters)
        invoke.__annotations__ = {}
        return invoke

    return decorate


def flags(option: Field) -> str:
    """The flag of an option; `--refit/--no-refit` for one that may be on by default."""
    if option.kind is not bool or option.default is False or not option.option.flag:
        return option.flag
    return f"{option.flag}/--no-{option.flag.removeprefix('--')}"


def default_of(option: Field) -> str:
    """An option's default in words; empty where it has none."""
    value = option.default
    if option.option.unset:
        return option.option.unset
    if isinstance(value, bool):
        on = option.flag.removeprefix("--") if option.option.flag else "true"
        return on if value else ""
    if isinstance(value, int | float):
        return number(value)
    return value if isinstance(value, str) else ""


def _parameters(options: type, *, optional: bool) -> Iterator[inspect.Parameter]:
    """The parameters of a command, a hidden one for each name of an earlier version."""
    for option in fields(options).values():
        if not option.option.flag:
            continue
        kind: Any = str if option.option.course else option.kind
        kind = list[kind] if option.many else kind
        default = None if optional or option.many else option.default
        if default is MISSING:
            default = inspect.Parameter.empty
        yield _parameter(option.name, kind | None, default, _declared(option))
        if option.option.old:
            hidden = typer.Option(as_flag(option.option.old), hidden=True)
            yield _parameter(option.option.old, kind | None, None, hidden)


def _parameter(name: str, kind: Any, default: Any, declared: Any) -> inspect.Parameter:
    annotation = Annotated[kind, declared]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _declared(option: Field) -> Any:
    """What typer wants to know of an option; the help says what it is, its choices and default."""
    line = option.option.help
    if choices := ", ".join(filter(None, option.option.choices)):
        line += f" One of {choices}."
    if default := default_of(option):
        line += f" (default: {default})"
    line = line.replace("[", "\\[")  # brackets are markup to typer
    if option.option.argument:
        return typer.Argument(help=line, show_default=False)
    return typer.Option(flags(option), help=line, show_default=False, hidden=option.option.hidden)


def _is_argument(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.annotation.__metadata__[0], typer.models.ArgumentInfo)
