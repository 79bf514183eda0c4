"""Do a run again from its recipe, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefy import environment
from moefy.config.recipe import build, read
from moefy.convert.prepare import Watch, prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import some
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
    """Run the conversion again that wrote `recipe`, and compare all files with those of its report.

    `model` is where the dense model lies now, if not where it did. Gives the new report with
    `reproduced`: whether the bytes are the same, which files differ, and what else does: the
    calibration text, versions, or the machine.

    Raises:
        MoefyError: code 3 when the model is another one, or `recipe` lies in no run; all that
            `convert` raises.
    """
    values = read(recipe)
    if model:
        values["model"] = model
        values.pop("revision", None)  # of the model that was named then
    told = read_report(recipe.resolve().parent.parent)
    job = prepare(build(None, values, []))
    folder = job.checkpoint.folder
    if other := [name for name, digest in told["inputs"].items() if _other(folder / name, digest)]:
        raise MoefyError(
            f"{folder} is not the model that was converted: {some(other)} differ; name it as MODEL"
        )
    attempt = Attempt(force=force, restart=restart, memory=memory)
    made = convert(job, out, attempt, watch=watch)
    names = told["outputs"].keys() | made["outputs"].keys()
    differ = [n for n in sorted(names) if told["outputs"].get(n) != made["outputs"].get(n)]
    # It names the libraries and the folder of the model, which may have other ones.
    differ = [name for name in differ if name != RECIPE]
    made["reproduced"] = {
        "run": str(recipe),
        "same": not differ,
        "files_that_differ": differ,
        "because": environment.differences(_facts(told), _facts(made)) if differ else [],
    }
    return made


def _other(file: Path, digest: str) -> bool:
    return not file.is_file() or sha256(file) != digest


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a report may explain other bytes."""
    facts = {key: summary.get(key, {}) for key in ("moefy", "versions", "machine", "device")}
    return {**facts, "calibration": {"sha256": summary["calibration"]["sha256"]}}
