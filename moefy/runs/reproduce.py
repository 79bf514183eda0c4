"""Repeat a run from its recipe, and compare the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefy import environment
from moefy.config.recipe import build, read
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import some
from moefy.progress import Watch
from moefy.runs.folder import read_report

RECIPE = "moefy/recipe.toml"


def reproduce(
    recipe: Path,
    out: Path,
    *,
    model: str | None = None,
    force: bool = False,
    restart: bool = False,
    memory: int | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Repeat the conversion that wrote `recipe`, and compare all files with those of its report.

    `model` is the dense model's place now, if it has moved. Gives the new report with
    `reproduced`: whether the bytes are the same, which files differ, and what may be the cause:
    the calibration text, versions, or the machine.

    Raises:
        MoefyError: code 3 if the model is another one, or `recipe` is not in a run; all that
            `convert` raises.
    """
    values = read(recipe)
    if model:
        values["model"] = model
        values.pop("revision", None)  # of the model that the recipe names
    recorded = read_report(recipe.resolve().parent.parent)
    job = prepare(build(None, values, []))
    folder = job.checkpoint.folder
    if other := [
        name for name, digest in recorded["inputs"].items() if _other(folder / name, digest)
    ]:
        raise MoefyError(
            f"{folder} is not the model that was converted: {some(other)} differ; name it as MODEL"
        )
    attempt = Attempt(force=force, restart=restart, memory=memory)
    result = convert(job, out, attempt, watch=watch)
    names = recorded["outputs"].keys() | result["outputs"].keys()
    differ = [n for n in sorted(names) if recorded["outputs"].get(n) != result["outputs"].get(n)]
    # It names the libraries and the model's folder, which may differ.
    differ = [name for name in differ if name != RECIPE]
    result["reproduced"] = {
        "run": str(recipe),
        "same": not differ,
        "files_that_differ": differ,
        "because": environment.differences(_facts(recorded), _facts(result)) if differ else [],
    }
    return result


def _other(file: Path, digest: str) -> bool:
    return not file.is_file() or sha256(file) != digest


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    """The facts of a report that may explain other bytes."""
    facts = {key: summary.get(key, {}) for key in ("moefy", "versions", "machine", "device")}
    return {**facts, "calibration": {"sha256": summary["calibration"]["sha256"]}}
