"""Headers, indexes and configurations that were changed at random: refused, or read rightly.

What is refused is refused by a `MoefyError` of code 2 to 5, in seconds. Of what is accepted, every
tensor is what the safetensors library reads, and the converted model computes what transformers'
dense one does. `MOEFY_FUZZ=N` runs N examples of each test instead of a few.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import damage as d
import pytest
from damage import CONFIG, INDEX, SHARDS, SINGLE
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reading import assert_read_as_by_the_library, header_of, prepared, with_header
from stock import WRITTEN, dense_logits, distance, logits, opened
from transformers import AutoConfig

from moefy.convert.run import convert
from moefy.errors import MoefyError

MANY = int(os.environ.get("MOEFY_FUZZ", "0"))

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "bert", "t5", "lfm2", "phi3", "opt")
ALL_ACTIVE = {"experts": 2, "top_k": 2, "active": 1.0, "refit": False}
ALL_ACTIVE |= {"partition": "shuffle", "router_options": {"steps": 0}, "tokens": 64}


def few(count: int):
    return settings(
        max_examples=MANY or count,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )


# --- what is done --------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2, 3, 7, 8, 16, 32, 96, 128, 2**31, 2**63, 10**12, 10**30]
NUMBERS += [0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf")]
WORDS = ["", "64", "silu", "gelu", "a/b", "../x", "eager", "float16", "full_attention", "\0", "é\n"]
NESTED = [[], {}, [1, 2], [0.0], ["full_attention", "sliding_attention"], [["x"]], {"a": {}}]
NESTED += [{"rope_type": kind, "factor": 2.0} for kind in ("default", "linear", "yarn", "x")]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(NESTED),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
)
BYTES = st.binary(min_size=1, max_size=4) | st.sampled_from([b"{", b'"', b":", b"9", b"e9", b"\0"])


@st.composite
def patched(draw, data: bytes) -> bytes:
    """Some bytes replaced, put in or taken out."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(BYTES) + data[at + draw(st.integers(0, 6)) :]
    return data


@st.composite
def spoiled(draw, value: dict) -> dict:
    """The JSON of a header or index with some of its values, at any depth, replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inside = value
        while inside:
            key = draw(st.sampled_from(sorted(inside)))
            if isinstance(inside[key], dict) and draw(st.booleans()):
                inside = inside[key]
                continue
            what = draw(st.sampled_from(["replace", "remove", "rename", "swap"]))
            other = draw(st.sampled_from(sorted(inside)))
            if what == "replace":
                near = inside[other] if draw(st.booleans()) else draw(VALUES)
                inside[key] = near
            elif what == "swap":
                inside[key], inside[other] = inside[other], inside[key]
            else:
                kept = inside.pop(key)
                if what == "rename":
                    inside[draw(st.text(max_size=8))] = kept
            break
    return value


# --- headers and indexes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(pico, tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz") / "single"
    shutil.copytree(pico("llama"), folder)
    return folder, (folder / SINGLE).read_bytes()


@pytest.fixture(scope="module")
def sharded(pico, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    shutil.copytree(pico("llama"), folder)
    d.split(folder)
    return folder, {name: (folder / name).read_bytes() for name in (INDEX, *SHARDS)}


@few(60)
@given(data=st.data())
def test_headers(single, data):
    folder, whole = single
    header = header_of(whole)
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(spoiled(header))).encode()
    else:
        text = data.draw(patched(json.dumps(header).encode()))
    (folder / SINGLE).write_bytes(with_header(whole, text))
    if job := prepared(folder):
        event("accepted")
        assert_read_as_by_the_library(job)


@few(30)
@given(data=st.data())
def test_any_bytes_of_a_file(single, data):
    folder, whole = single
    (folder / SINGLE).write_bytes(data.draw(patched(whole[:9000])) + whole[9000:])
    if job := prepared(folder):
        event("accepted")
        assert_read_as_by_the_library(job)


@few(60)
@given(data=st.data())
def test_indexes(sharded, data):
    folder, whole = sharded
    index = json.loads(whole[INDEX])
    if data.draw(st.booleans()):
        changed = json.dumps(data.draw(spoiled(index))).encode()
    else:
        changed = data.draw(patched(whole[INDEX]))
    (folder / INDEX).write_bytes(changed)
    if job := prepared(folder):
        event("accepted")
        assert_read_as_by_the_library(job)
        assert len(job.checkpoint.entries) == len(index["weight_map"])


# --- configurations ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(pico, tmp_path_factory) -> dict[str, tuple[Path, dict, list[str]]]:
    """For every family a folder, its configuration, and the keys that transformers knows."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("fuzz") / family
        shutil.copytree(pico(family), folder)
        config = json.loads((folder / CONFIG).read_text())
        keys = {*config, *AutoConfig.for_model(family).to_dict(), "num_labels", "rope_scaling"}
        made[family] = (folder, config, sorted(keys))
    return made


@st.composite
def changed(draw, config: dict, keys: list[str]) -> dict:
    config = dict(config)
    for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)):
            config[key] = draw(VALUES)
        else:
            config.pop(key, None)
    return config


@few(120)
@given(data=st.data())
def test_configurations(models, data):
    folder, config, keys = models[data.draw(st.sampled_from(FAMILIES))]
    (folder / CONFIG).write_text(json.dumps(data.draw(changed(config, keys))))
    if prepared(folder):
        event("accepted")


@few(12)
@given(data=st.data())
def test_accepted_configurations_give_the_dense_model(models, text, tmp_path_factory, data):
    folder, config, keys = models[data.draw(st.sampled_from(FAMILIES))]
    # What a model is for decides with which class it is opened, here and there.
    kept = {"architectures": config["architectures"]}
    (folder / CONFIG).write_text(json.dumps(data.draw(changed(config, keys)) | kept))
    job = prepared(folder, calibration=str(text), **ALL_ACTIVE)
    if job is None:
        return
    out = tmp_path_factory.mktemp("fuzz") / "out"
    try:
        convert(job, out)
    except MoefyError as error:
        event(f"refused while converting, {error.code}")
        assert not out.exists()
        return
    try:
        expected = dense_logits.__wrapped__(folder)
    except Exception:
        event("transformers itself cannot run it")
    else:
        event("converted")
        assert distance(logits(opened(out)), expected) < WRITTEN
    shutil.rmtree(out)
