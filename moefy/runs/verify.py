"""Check that a run's files are as written, and that it computes the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moefy.checkpoint.check_finite import check_finite
from moefy.checkpoint.reload import reopen
from moefy.convert.summary import END
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import read_config, read_entries, read_header, some
from moefy.files.shards import read
from moefy.progress import Watch
from moefy.runs.folder import FINETUNED, REPORT, check_present, read_report, read_tuning, written

WITHOUT_DIGEST = ("README.md", *(f"moefy/{name}" for name in (REPORT, "conversion.md", FINETUNED)))
"""Files of a run without a digest: they hold the digests, or people may edit them."""

ADDED = ("moefy/report.*", "moefy/measured/*")
"""What `moefy report` adds."""

SLACK = 1e-3
"""By how much the error of the hidden states may differ from the report's: other versions and
thread counts round otherwise, and near-ties between experts may change."""


def verify(run: Path, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """The checks of a run's folder, and their results.

    Digests of all files, headers against files and configuration, finite values, then one forward
    pass through stock transformers, whose hidden states are compared with the conversion's. The
    first failure ends it. `code` is the exit code: 0, 3 for changed files, 6 for other numbers.

    Raises:
        MoefyError: code 3, if the folder holds no report of a run, or a broken one.
    """
    summary = read_report(run)
    digests = written(run, summary)
    checks: dict[str, Callable[[], str]] = {
        "digests": lambda: _digests(run, digests, watch),
        "headers": lambda: _headers(run),
        "values": lambda: _values(run, watch),
        "forward pass": lambda: _forward(run, summary),
    }
    results: list[dict[str, Any]] = []
    code = 0
    for done, (name, check) in enumerate(checks.items()):
        watch(f"verify {name}", done, len(checks))
        try:
            results.append({"check": name, "passed": True, "found": check()})
        except MoefyError as error:
            results.append({"check": name, "passed": False, "found": str(error)})
            code = error.code
            break
    left = list(checks)[len(results) :]
    return {"run": str(run), "passed": code == 0, "code": code, "checks": results, "not_run": left}


def check_files(run: Path, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """The report of a run's conversion, if every file of the run is as it was written.

    Raises:
        MoefyError: code 3, for missing or changed files.
    """
    summary = read_report(run)
    _digests(run, written(run, summary), watch)
    return summary


def _digests(run: Path, digests: Mapping[str, str], watch: Watch) -> str:
    check_present(run, digests)
    if added := sorted({file.name for file in run.glob("*.safetensors")} - digests.keys()):
        raise MoefyError(f"{run} holds {some(added)}, which the run did not write")
    changed = []
    for done, (name, digest) in enumerate(digests.items(), 1):
        if sha256(run / name) != digest:
            changed.append(name)
        watch("verify digests", done, len(digests))
    if changed:
        raise MoefyError(f"{run}: not as the run wrote it: {some(changed)}")
    others = _others(run, digests)
    more = f"; not checked, because the run has no digest of them: {some(others)}" if others else ""
    return f"{len(digests)} files are as they were written{more}"


def _others(run: Path, digests: Mapping[str, str]) -> list[str]:
    """Files without a digest: the run did not write them, or an older moefy did."""
    files = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    return sorted(
        name
        for name in files - digests.keys() - {*WITHOUT_DIGEST}
        if not any(fnmatch(name, pattern) for pattern in ADDED)
    )


def _headers(run: Path) -> str:
    read_config(run)
    entries = read_entries(run)
    return f"{len(entries)} tensors in {len({entry.file for entry in entries.values()})} files"


def _values(run: Path, watch: Watch) -> str:
    entries = read_entries(run)
    for done, (name, entry) in enumerate(entries.items(), 1):
        check_finite(name, read(name, entry))
        watch("verify values", done, len(entries))
    return f"{sum(entry.num_elements for entry in entries.values()):,} values are finite"


def _forward(run: Path, summary: dict[str, Any]) -> str:
    """Hidden states of the last calibration sequence, against those of the conversion."""
    entries = read_header(run / "moefy" / "calibration.safetensors")
    tensors = {name: read(name, entry) for name, entry in entries.items()}
    recorded = summary["reopened"]
    tuned = read_tuning(run) is not None
    end_TD = None if tuned else tensors.get(END)
    try:
        result = reopen(
            run,
            tensors["ids"][-1].long(),
            [end_TD] * (len(summary["layers"]) + len(summary["layers_left_dense"])),
            layer=recorded.get("prefix", "model.layers.{layer}."),
            task=summary["task"],
        )
    except MoefyError:
        raise
    except Exception as error:  # whatever a value of the configuration makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise MoefyError(f"transformers cannot open {run}: {reason}", code=6) from error
    loaded = f"{result['class']} loads {result['layers']} layers with no missing or unexpected key"
    if end_TD is None:
        why = "the weights were fine-tuned" if tuned else "the run stored none"
        return f"{loaded}; its states are finite; they are not compared: {why}"
    error, before = result["hidden_state_error"], recorded["hidden_state_error"]
    if abs(error - before) > SLACK + 0.1 * before:
        raise MoefyError(
            f"{run} computes hidden states with a relative error of {error:.3g}; the report says "
            f"{before:.3g}; other versions of the libraries may compute otherwise",
            code=6,
        )
    return f"{loaded}; relative error of its hidden states {error:.1e}, reported {before:.1e}"
