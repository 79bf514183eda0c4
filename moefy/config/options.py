"""Options of a command: the type, range, default and help line of each, and the check of a value.

An option is a field of a dataclass (`Recipe`, the settings of a fine-tune and of a report) that
`option` or `key` declares. The checks here, the command line (`moefy.cli.parameters`) and the page
of options (`moefy.cli.options_page`) are all made from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moefy.config import course
from moefy.errors import MoefyError

Note = Callable[[str], None]
"""What takes a line for the user that stops nothing."""

MOST = {int: 10**12, float: 1e30}
"""The most that a number may be where an option sets no limit: far beyond use, and no overflow."""

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Option:
    """What a stranger needs to know of an option beside its name, type and default."""

    help: str
    least: float = 0
    most: float | None = None
    choices: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    """Choices that help does not show, because only reports use them."""
    unset: str = ""
    """The default in words, where its value says nothing."""
    flag: bool | str = True
    """Whether the command line has it, or by which name; if not, a recipe and `--set` take it."""
    separator: str = ""
    """What stands between several values in one."""
    hidden: bool = False
    """Whether help leaves it out."""
    argument: bool = False
    """Whether the command line takes it by its position."""
    old: str = ""
    """Its name in earlier versions."""
    old_values: Mapping[str, str] = field(default_factory=dict)
    """Choices of earlier versions, and what they are called now."""
    course: bool = False
    """Whether a number may change in the course of a training; see `moefy.config.course`."""


def option(default: Any, what: str | Option, **details: Any) -> Any:
    """A field of a dataclass that is an option; `what` is its line of help."""
    metadata = {"option": what if isinstance(what, Option) else Option(what, **details)}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def key(default: Any, what: str, **details: Any) -> Any:
    """An option without a flag: a recipe and `--set` take it."""
    return option(default, what, flag=False, **details)


@dataclass(frozen=True)
class Field:
    """A field of a dataclass that is an option."""

    name: str
    kind: Any
    """`bool`, `int`, `float`, `str`, `Path` or `Mapping`."""
    many: bool
    """Whether it holds a tuple of that kind."""
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The name on the command line, or the key of a recipe where it has no flag."""
        if self.option.argument:
            return self.name.upper()
        name = self.option.flag if isinstance(self.option.flag, str) else self.name
        return as_flag(name) if self.option.flag else self.name

    @property
    def most(self) -> float:
        """The most that a number may be."""
        return MOST[self.kind] if self.option.most is None else self.option.most

    def checked(self, value: Any) -> Any:
        """A value as the field holds it.

        Raises:
            MoefyError: code 2 for a value of another type or out of range.
        """
        if self.many:
            words = [value] if isinstance(value, str) else value
            if not isinstance(words, list | tuple) or not all(map(self._fits, words)):
                raise MoefyError(f"{self.flag} is {value!r}; expected a list of strings", code=2)
            if separator := self.option.separator:
                words = [part for word in words for part in word.split(separator) if part]
            return tuple(map(self.kind, words))
        if self.option.course and isinstance(value, str):
            return course.normal(value, self.flag)
        if not self._fits(value):
            expected = "table" if self.kind is Mapping else self.kind.__name__
            raise MoefyError(f"{self.flag} is {value!r}; expected {expected}", code=2)
        if self.option.choices and value not in (*self.option.choices, *self.option.unlisted):
            expected = nearest(value, [word for word in self.option.choices if word])
            raise MoefyError(f"{self.flag} is {value!r}; {expected}", code=2)
        if self.kind in MOST:
            self._check_range(value)
        return Path(value) if self.kind is Path else value

    def _fits(self, value: Any) -> bool:
        kinds = {float: (int, float), Path: (str, Path)}.get(self.kind, self.kind)
        return isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))

    def _check_range(self, value: float) -> None:
        if not self.option.least <= value <= self.most:  # nor is NaN
            expected = f"at least {number(self.option.least)}"
            if self.option.most is not None or value > self.option.least:
                expected += f" and at most {number(self.most)}"
            raise MoefyError(f"{self.flag} is {number(value)}; expected {expected}", code=2)


@functools.cache
def fields(options: type) -> Mapping[str, Field]:
    """The options of a dataclass by their names."""
    hints = get_type_hints(options)
    return {
        spec.name: _field(spec, hints[spec.name], spec.metadata["option"])
        for spec in dataclasses.fields(options)
        if "option" in spec.metadata
    }


def check(
    options: type,
    values: Mapping[str, Any],
    note: Note = lambda line: None,
    table: str = "recipe",
) -> dict[str, Any]:
    """The values of a dataclass's options under today's names, each as its field holds it.

    `note` gets a line about each name of an earlier version.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    known, values = fields(options), renamed(options, values, note)
    for key in values:
        if key not in known:
            raise MoefyError(f"unknown {table} key {key!r}; {nearest(key, [*known])}", code=2)
    return {key: known[key].checked(value) for key, value in values.items()}


def as_flag(name: str) -> str:
    """A key as the command line writes it."""
    return f"--{name.replace('_', '-')}"


def renamed(
    options: type,
    values: Mapping[str, Any],
    note: Note = lambda line: None,
    spell: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The values under today's names; `note` gets a line about each name of an earlier version."""
    result = dict(values)
    for name, known in fields(options).items():
        old, new = known.option.old, known.option.old_values
        if old and old in result:
            value = result.pop(old)
            result.setdefault(name, value)
            note(f"{spell(old)} is called {spell(name)} now")
        value = result.get(name)
        if isinstance(value, str) and value in new:
            result[name] = new[value]
            note(f"{name} {value} is called {new[value]} now")
    return result


def located(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`values`, where those of `names` that lead to a file or folder are absolute paths.

    They then mean the same from every working directory. Hub ids and the word `self` stay.
    """
    result = dict(values)
    for name in names:
        path = os.path.expanduser(values.get(name) or "self")
        if path != "self" and os.path.exists(path):
            result[name] = os.path.abspath(path)
    return result


def parse_setting(setting: str) -> tuple[str, Any]:
    """The key and the value of `key=value`; what is not TOML is a string.

    Raises:
        MoefyError: code 2, where there is no `=`, or a value that is too long to be read.
    """
    key, equals, text = setting.partition("=")
    key = key.strip().replace("-", "_")
    if not equals:
        raise MoefyError(f"--set {setting!r} has no `=`; expected key=value", code=2)
    try:
        return key, tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key, text
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        raise MoefyError(
            f"--set {key}: a value of {len(text):,} characters cannot be read; expected a shorter "
            "one",
            code=2,
        ) from None


MANY = 100
"""So many names are too many for one line."""


def nearest(word: str, known: list[str]) -> str:
    """`expected a, b, c`, and the likeliest of them when `word` looks like a typo.

    Of more than `MANY` names only the likeliest are named.

    >>> nearest("kat", ["cat", "dog"])
    'expected one of cat, dog; did you mean cat?'
    >>> nearest("n7x", [f"n{number}" for number in range(2000)])
    'expected one of 2,000 names; did you mean n7, n97, n87?'
    """
    many = len(known) > MANY
    close = difflib.get_close_matches(word, known, 3 if many else 1)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"expected one of {f'{len(known):,} names' if many else ', '.join(known)}{hint}"


def number(value: float) -> str:
    """A number for a message or a page; the digits of a very long one are cut off.

    >>> number(16384), number(2e-4), number(10**40)
    ('16,384', '0.0002', '10,000,000,000,000,...')
    """
    text = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return text if len(text) < 30 else f"{text[:19]}..."


def _field(spec: dataclasses.Field, kind: Any, option: Option) -> Field:
    default = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if isinstance(kind, UnionType):
        kind, *_ = [part for part in get_args(kind) if part is not NoneType]
    many = get_origin(kind) is tuple
    kind = get_args(kind)[0] if many else get_origin(kind) or kind
    return Field(spec.name, kind, many, default, option)
