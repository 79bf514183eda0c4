"""Several processes that share the calibration tokens make what one makes of all of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moefy
from moefy.config.options import as_flag
from moefy.config.recipe import build
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.distributed import ALONE, Group, Share, backend, launched, together
from moefy.errors import MoefyError

ROOT = Path(moefy.__file__).parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SEQUENCES = 80  # in blocks of 32; the last of three has all ten that are held out


def start(processes, model, out, text, *more, tokens=64 * SEQUENCES):
    given = ["--calibration", str(text), f"--tokens={tokens}", "--sequence-length=64", *more]
    launch = [*LAUNCH, f"--nproc-per-node={processes}"] if processes else [sys.executable]
    return subprocess.Popen(
        [*launch, "-m", "moefy", "convert", str(model), str(out), *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def finish(process):
    told, said = process.communicate(timeout=300)
    return process.returncode, told, said


def made(*arguments, **options):
    code, told, said = finish(start(*arguments, **options))
    assert code == 0, said[-3000:]
    return told


def running(out):
    """The processes that write `out`, the launcher first."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(out).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return sorted(found)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def apart(one, other):
    """The largest difference of the weights, relative to the tensor it is in."""
    old, new = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert old.keys() == new.keys()
    return max(float((old[name] - new[name]).abs().max() / old[name].abs().max()) for name in old)


KINDS = {
    "the default": (2, {}),
    "overlapping experts": (3, {"overlap": 2.0}),
    "states in files, a layer in the middle": (2, {"layers": "1", "router": "random"}),
    "dense layers chosen by what is lost": (2, {"layers": "auto", "active": 0.75}),
    "layers that are dropped": (2, {"drop_layers": "1", "active": 0.4}),
    "gates": (3, {"partition": "expertweaver", "router": "expertweaver"}),
    "marks of neurons": (2, {"partition": "cmoe"}),
    "copies": (2, {"method": "upcycle", "experts": 4, "top_k": 2}),
    "fluctuation": (2, {"partition": "static", "partition_options": {"metric": "fluctuation"}}),
}
"""How many processes, and what is not the default."""


def alone(model, out, text, **more):
    given = {"calibration": str(text), "tokens": 64 * SEQUENCES, "sequence_length": 64, **more}
    convert(prepare(build(None, {"model": str(model), **given}, [])), out)


def flags(more):
    plain = {key: value for key, value in more.items() if key != "partition_options"}
    found = [f"{as_flag(key)}={value}" for key, value in plain.items()]
    found += ["--memory=700MB"] if more.get("layers") == "1" else []
    options = more.get("partition_options", {}).items()
    return found + [f"--set=partition.{key}={value}" for key, value in options]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_one_process(pico, text, tmp_path, kind):
    processes, more = KINDS[kind]
    model = pico("llama", num_hidden_layers=3)
    one, several = tmp_path / "one", tmp_path / "several"
    alone(model, one, text, **more)
    told = made(processes, model, several, text, *flags(more))
    assert told.count("Report:") == 1  # one of them speaks
    assert weights(several) == weights(one)
    old, new = (json.loads((n / "moefy/conversion.json").read_text()) for n in (one, several))
    assert new["machine"]["processes"] == processes and "processes" not in old["machine"]
    assert new["calibration"] == old["calibration"]
    for row, other in zip(old["layers"], new["layers"], strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"seconds", "stage_seconds", "balance"}:
            assert other[key] == pytest.approx(row[key], rel=1e-9), key
    assert sorted(os.listdir(tmp_path)) == ["one", "several"]


def test_what_sums_nothing_is_far_from_it(pico, text, tmp_path):
    """The negative control: the half of the tokens that one of two processes has, and no other."""
    model = pico("llama", num_hidden_layers=3)
    alone(model, tmp_path / "one", text, layers=":")
    alone(model, tmp_path / "half", text, layers=":", tokens=32 * SEQUENCES)
    assert apart(tmp_path / "one", tmp_path / "half") > 1e-2


@pytest.mark.slow
def test_other_blocks_than_one_process_computes_by_are_the_same_to_rounding(pico, text, tmp_path):
    """21 sequences of 96 tokens stay together, which do not fill what is computed at a time."""
    model = pico("llama", num_hidden_layers=3)
    alone(model, tmp_path / "one", text, sequence_length=96)
    made(2, model, tmp_path / "two", text, "--sequence-length=96")
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.slow
def test_killed_it_goes_on_with_as_many_to_the_same_bytes(pico, text, tmp_path):
    model = pico("llama", num_hidden_layers=12)
    made(2, model, tmp_path / "whole", text)
    out, state = tmp_path / "out", tmp_path / ".out.moefy-part" / "state"
    process = start(2, model, out, text)
    while not (state / "layer-2.json").exists() and process.poll() is None:
        time.sleep(0.01)
    for number in running(out):
        os.kill(number, signal.SIGKILL)
    finish(process)
    assert not out.exists() and (state / "layer-2.json").exists()
    code, _, said = finish(start(0, model, out, text))
    assert code == 7 and "machine.processes" in said
    told = made(2, model, out, text)
    assert "Report:" in told
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_one_that_is_killed_stops_the_others_in_a_line(pico, text, tmp_path):
    process = start(2, pico("llama", num_hidden_layers=24), tmp_path / "out", text)
    state = tmp_path / ".out.moefy-part" / "state"
    while not (state / "layer-1.json").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(max(running(tmp_path / "out")), signal.SIGKILL)
    code, _, said = finish(process)
    assert code != 0 and "RuntimeError" not in said
    assert not (tmp_path / "out").exists() and (state / "layer-1.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ("--partition=llama-moe-v2",),
            "moefy: --partition llama-moe-v2 takes gradients of all tokens",
        ),
        (("--tokens=2048",), "2 processes share 32 sequences, 32 of which stay together; start 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(pico, text, tmp_path, more, line):
    code, _, said = finish(start(2, pico("llama"), tmp_path / "out", text, *more))
    assert code != 0 and line in said and 'File "' + str(ROOT / "moefy") not in said
    assert os.listdir(tmp_path) == []


def test_shares_are_blocks_of_sequences_in_order():
    rows = torch.arange(2 * 11 * 3).view(22, 3)
    own = [Share(Group(rank, 3), 11, 2).own(rows) for rank in range(3)]
    assert [len(part) for part in own] == [8, 8, 6]
    assert torch.equal(torch.cat([part.view(2, -1, 3) for part in own], 1).view(22, 3), rows)
    assert Share(ALONE, 11, 2).own(rows) is rows and Share(ALONE, 11, 2).whole(rows) is rows


def test_alone_nothing_is_copied_or_asked(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.ones(3)
    assert launched() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")  # some schedulers set it for whatever they start
    monkeypatch.delenv("RANK", raising=False)
    assert launched() is ALONE
    assert ALONE.gather(rows) is rows and ALONE.broadcast(rows) is rows
    assert (ALONE.total(2.0), ALONE.before(5)) == (2.0, (0, 5))
    ALONE.sum(rows)
    assert ALONE.broadcast_object("alone") == "alone"
    ALONE.in_turn(lambda: None, rows)
    assert rows.tolist() == [1, 1, 1]


def test_a_gpu_for_each_process_is_summed_by_nccl_and_all_else_by_gloo():
    assert backend(8, 8) == backend(1, 2) == "cpu:gloo,cuda:nccl"
    assert backend(2, 0) == backend(3, 2) == "gloo"


def test_only_a_process_that_is_gone_is_put_in_a_line():
    with pytest.raises(MoefyError, match="another process.*has stopped") as caught, together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert caught.value.code == 5
    with pytest.raises(RuntimeError, match="shape"), together():
        raise RuntimeError("shape mismatch")
