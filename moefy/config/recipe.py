"""One conversion, declared: read from TOML, overridden by flags, checked before any model opens."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a conversion, but for the versions of the libraries."""

    model: str
    """A folder, a hub id, or `demo`."""
    revision: str | None = None
    active: float = 0.5
    """FFN neurons executed per token, shared ones included, as a fraction of the dense FFN's."""
    experts: int | None = None
    experts_per_token: int | None = None
    shared: float | None = None
    total: float = 1.0
    """FFN neurons stored, as a multiple of the dense FFN's; above one, experts overlap."""
    layers: str = ":"
    """Layers to convert: `:` all, `4:` from the fifth on, `0,3,7` these; the rest stay dense.
    `auto` keeps those dense that would lose most, and gives the others many small experts;
    `active` then counts all layers."""
    partition: str = "alternating"
    router: str = "linear"
    refit: bool = True
    drift: float = 0.5
    """Share of what the residual stream has lost in the layers below that a refit makes good."""
    target: str = "auto"
    engines: str = ""
    """Engines that must run the result, comma-separated; they narrow `target`."""
    calibration: str = "self"
    """File of text, rows or chats, folder, `datasets` id, or `self`: text of the model itself."""
    text_field: str = "text"
    tokens: int = 16384
    sequence_length: int = 512
    stratify: bool = True
    """Draw documents so that each kind of text has about its share, however few are drawn."""
    seed: int = 0
    dtype: str = "as-stored"
    compute_dtype: str = "auto"
    """Dtype in which the dense model writes text of its own; `auto` is the stored one where the
    machine has it, else float32."""
    max_shard_size: str = "5GB"
    """Bytes in a file of the result at most, as `save_pretrained` takes them: `5GB`, `200MiB`."""
    ignore_index: bool = False
    """Go by what the shards hold, not by what their index says of them."""
    device: str = "auto"
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    router_options: Mapping[str, Any] = field(default_factory=dict)


DTYPES = ("as-stored", "float32", "bfloat16", "float16")
COMPUTE_DTYPES = ("auto", *DTYPES[1:])
FIELDS = {spec.name: spec for spec in dataclasses.fields(Recipe)}
TABLES = ("partition_options", "router_options")
ADDED = ("made", "inputs", "finetune", "report")
"""Tables of a recipe that are no part of the conversion's: what a run adds, and later stages."""


def build(file: Path | None, flags: Mapping[str, Any], settings: list[str]) -> Recipe:
    """A checked recipe from a TOML file, then flags that are not None, then `key=value` settings.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = read(file) if file else {}
    values.update({key: value for key, value in flags.items() if value is not None})
    for setting in settings:
        _set(values, setting)
    if "model" not in values:
        raise MoefyError("no MODEL given; expected a folder, a hub id or `demo`", code=2)
    for key, value in values.items():
        check_type(key, value, FIELDS)
    recipe = Recipe(**located(values, "model", "calibration"))
    _check_ranges(recipe)
    return recipe


def located(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`values`, of which those of `names` that lead to a file or folder are absolute paths.

    So they mean the same from every working directory. Hub ids and the word `self` stay.
    """
    found = dict(values)
    for name in names:
        path = os.path.expanduser(values.get(name) or "self")
        if path != "self" and os.path.exists(path):
            found[name] = os.path.abspath(path)
    return found


def read(file: Path) -> dict[str, Any]:
    """The keys of a recipe file that are a conversion's; tables that a run adds are ignored."""
    return {key: value for key, value in read_toml(file).items() if key not in ADDED}


def read_toml(file: Path) -> dict[str, Any]:
    """All that is in a recipe file.

    Raises:
        MoefyError: code 2, for a file that cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MoefyError(f"cannot read recipe {file}: {error.strerror}", code=2) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MoefyError(f"recipe {file} is not TOML: {error}", code=2) from None


def render(recipe: Recipe, **extra: Mapping[str, Any]) -> str:
    """The recipe as TOML that `read` gives back, with `extra` tables behind it."""
    values = dataclasses.asdict(recipe)
    lines = [
        f"{key} = {_toml(value)}"
        for key, value in values.items()
        if key not in TABLES and value is not None
    ]
    tables = {**{key: values[key] for key in TABLES if values[key]}, **extra}
    return "\n".join(lines) + "\n" + "".join(render_table(*table) for table in tables.items())


def render_table(name: str, table: Mapping[str, Any]) -> str:
    """One table of a recipe, with an empty line before it; values that are None are left out."""
    lines = [
        f"{_toml_key(key)} = {_toml(value)}" for key, value in table.items() if value is not None
    ]
    return "\n".join(["", f"[{name}]", *lines, ""])


def chosen_layers(text: str, num_layers: int) -> list[int]:
    """Indices that `layers` names, of a model of `num_layers`.

    >>> chosen_layers("4:", 6), chosen_layers("0,3", 6), chosen_layers("1:3,5", 6)
    ([4, 5], [0, 3], [1, 2, 5])

    Raises:
        MoefyError: code 2, for what is no layer, or none at all.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            start = int(first) if first or not colon else 0
            stop = (int(last) if last else num_layers) if colon else start + 1
        except ValueError:
            start, stop = 0, -1
        if not 0 <= start < stop <= num_layers:
            raise MoefyError(
                f"--layers {text}: {part.strip()!r} names no layers of 0 to {num_layers - 1}; "
                "expected forms like `:`, `4:`, `0,3,7`, or `auto`",
                code=2,
            )
        found.update(range(start, stop))
    return sorted(found)


def num_bytes(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes that a size like `5GB` stands for.

    >>> num_bytes("5GB"), num_bytes("1.5 kb"), num_bytes("2MiB")
    (5000000000, 1500, 2097152)

    Raises:
        MoefyError: code 2, for what is no size, or less than a byte.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    number, prefix, binary = found.groups() if found else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
    if size < 1 or (binary and not prefix):
        raise MoefyError(f"{flag} is {text!r}; expected a size like 5GB", code=2)
    return size


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


def _set(values: dict[str, Any], setting: str) -> None:
    """Apply one `key=value`; `partition.rounds=6` reaches into the options of the method."""
    key, value = parse_setting(setting)
    table, dot, option = key.partition(".")
    if dot and f"{table}_options" in TABLES:
        options = values.get(f"{table}_options", {})
        check_type(f"{table}_options", options, FIELDS)
        values[f"{table}_options"] = {**options, option: value}
    else:
        values[key.replace("-", "_")] = value


def parse_setting(setting: str) -> tuple[str, Any]:
    """The key and the value of `key=value`: TOML, or what is none as a string.

    Raises:
        MoefyError: code 2, where there is no `=`.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise MoefyError(f"--set {setting!r} has no `=`; expected key=value", code=2)
    try:
        return key.strip(), tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def check_type(key: str, value: Any, fields: Mapping[str, dataclasses.Field]) -> None:
    """Refuse, with code 2, a key that is no field and a value of another type than the field's."""
    if key not in fields:
        raise MoefyError(f"unknown recipe key {key!r}; {nearest(key, list(fields))}", code=2)
    kinds = {
        "str": str,
        "str | None": str,
        "int": int,
        "int | None": int,
        "float": (int, float),
        "float | None": (int, float),
        "bool": bool,
        "Mapping[str, Any]": Mapping,
    }
    wanted = str(fields[key].type)
    if not isinstance(value, kinds[wanted]) or (isinstance(value, bool) and wanted != "bool"):
        raise MoefyError(f"recipe key {key} is {value!r}; expected {wanted.split(' |')[0]}", code=2)


def _check_ranges(recipe: Recipe) -> None:
    for flag, value, known in (
        ("--dtype", recipe.dtype, DTYPES),
        ("--compute-dtype", recipe.compute_dtype, COMPUTE_DTYPES),
    ):
        if value not in known:
            raise MoefyError(f"{flag} {value!r}: {nearest(value, list(known))}", code=2)
    for name, value, least in (
        ("--sequence-length", recipe.sequence_length, 8),
        ("--tokens", recipe.tokens, 8 * recipe.sequence_length),
        ("--seed", recipe.seed, 0),
    ):
        if value < least:
            raise MoefyError(f"{name} is {value}; expected at least {least}", code=2)
    if not 0 <= recipe.drift <= 1:
        raise MoefyError(f"drift is {recipe.drift:g}; expected a share from 0 to 1", code=2)
    num_bytes(recipe.max_shard_size)
    if recipe.seed >= 2**32:  # layers draw from seed * 1,000,003 + layer, which 64 bits must hold
        raise MoefyError(f"--seed is {recipe.seed}; expected less than {2**32}", code=2)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # In a locale that is not UTF-8, names of files have stand-ins for their bytes.
    text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
    return f'"{escaped}"'


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml(key)
