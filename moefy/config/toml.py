"""Recipe files: TOML, read and written."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError


def read_toml(file: Path) -> dict[str, Any]:
    """All that is in a recipe file.

    Raises:
        MoefyError: code 2, for a file that cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MoefyError(f"cannot read recipe {file}: {error.strerror}", code=2) from None
    except RecursionError:
        raise MoefyError(f"recipe {file} is not TOML: brackets nest too deep", code=2) from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise MoefyError(f"recipe {file} is not TOML: {error}", code=2) from None


def render_table(name: str, table: Mapping[str, Any]) -> str:
    """One table of a recipe, with an empty line before it."""
    return f"\n[{name}]\n{render_keys(table)}"


def render_keys(table: Mapping[str, Any]) -> str:
    """A line for each key; values that are None are left out."""
    return "".join(
        f"{_key(key)} = {_value(value)}\n" for key, value in table.items() if value is not None
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    # In a locale that is not UTF-8, names of files have stand-ins for their bytes.
    text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
    return f'"{escaped}"'


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)
