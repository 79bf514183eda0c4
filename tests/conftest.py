"""Tiny dense models and a text to try them on. Nothing is fetched."""

import os

# Before anything imports torch, so that child processes and this one are alike.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
if "MOEFY_TEST_GPU" not in os.environ:  # tests fork, and compare bytes: both go wrong on a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pico import build_model, build_tokenizer, write_text

# nohup, or a shell's `&`, would have them ignored, here and in children.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def never_hangs():
    """Interrupt what does not return, even from within a system call."""

    def late(*_):
        pytest.fail("still running after five minutes")  # a TimeoutError is an OSError: caught

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def pico(tmp_path_factory) -> Callable[..., Path]:
    """`pico(model_type, **overrides)`: the folder of a tiny model, to be read only."""
    made: dict[str, Path] = {}

    def make(model_type: str, **overrides: object) -> Path:
        key = json.dumps([model_type, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"pico-{model_type}")
            build_model(folder, model_type, overrides)
            build_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def own_pico(pico, tmp_path) -> Callable[..., Path]:
    """`own_pico(model_type, **overrides)`: a copy of such a folder, to be changed at will."""

    def copy(model_type: str, **overrides: object) -> Path:
        return Path(shutil.copytree(pico(model_type, **overrides), tmp_path / "models" / "own"))

    return copy


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """The file of `write_text`."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(file)
    return file


@pytest.fixture(scope="session")
def converted(text, tmp_path_factory) -> Callable[..., Path]:
    """`converted(model, **recipe)`: the folder of a conversion on 512 tokens, to be read only."""
    made: dict[str, Path] = {}

    def convert(model: Path, **recipe: object) -> Path:
        from moefy.config.recipe import build
        from moefy.convert import prepare
        from moefy.convert import run as convert

        given = {"tokens": 512, "sequence_length": 64, "calibration": str(text)} | recipe
        key = json.dumps([str(model), given], sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            convert.convert(prepare.prepare(build(None, {"model": str(model), **given}, [])), out)
            made[key] = out
        return made[key]

    return convert


@pytest.fixture
def moefy(monkeypatch, capsys) -> Iterator[Callable[..., Any]]:
    """`moefy(*arguments)`: the command, run in this process."""

    from fault_cases import Done

    from moefy import cli

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["moefy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Done(stop.value.code, captured.out, captured.err)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)
