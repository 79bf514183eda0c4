"""The jinja2 templates of the pages, which lie beside this module."""

from __future__ import annotations

from importlib import resources
from typing import Any


def template(name: str, **filters: Any) -> Any:
    """A template by its file's name; it escapes what it shows if it is one of HTML."""
    from jinja2 import Environment

    environment = Environment(
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    source = resources.files("moefy.report").joinpath(name).read_text("utf-8")
    return environment.from_string(source)
