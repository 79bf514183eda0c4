"""Folders as the package and as the safetensors library read them."""

import json
import signal
import struct
from pathlib import Path

import torch
from hypothesis import currently_in_test_context, event
from safetensors import SafetensorError, safe_open

from moefy.config.recipe import build
from moefy.convert.prepare import Job, prepare
from moefy.errors import MoefyError

SECONDS = 30
"""An example that takes longer counts as one that hangs."""


def late(*_):
    raise TimeoutError(f"still running after {SECONDS} seconds")


def prepared(folder: Path, **given: object) -> Job | None:
    """The job that a folder makes, or None where it is refused as it should be."""
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return prepare(build(None, {"model": str(folder), "sequence_length": 8, **given}, []))
    except MoefyError as error:
        assert 2 <= error.code <= 5, error
        assert str(error).isprintable() and len(str(error)) < 2000
        if currently_in_test_context():
            event(f"refused, {error.code}")
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_header(whole: bytes, text: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


def header_of(whole: bytes) -> dict:
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length])


def assert_read_as_by_the_library(job: Job) -> None:
    """Every tensor is what the safetensors library reads of the same file."""
    for name, entry in job.checkpoint.entries.items():
        try:
            with safe_open(entry.file, "pt") as file:
                other = file.get_tensor(name)
        except SafetensorError as error:
            raise AssertionError(f"the library refuses {entry.file}") from error
        mine = job.checkpoint.tensor(name)
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
