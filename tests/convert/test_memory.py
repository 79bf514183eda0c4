"""Where the calibration states lie changes no byte, and what is planned is kept to."""

import dataclasses
import errno
import json
import math
import os
import re

import pytest
import torch

from moefy.config.recipe import build
from moefy.convert import memory, write
from moefy.convert.estimate import estimate
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.distributed import Group
from moefy.errors import MoefyError
from moefy.files import buffers
from moefy.files.buffers import Store
from moefy.files.resume import State


@pytest.fixture
def job(pico, text):
    given = {"calibration": str(text), "tokens": 4352, "sequence_length": 64}
    return prepare(build(None, {"model": str(pico("llama")), **given}, []))


def hollow_llama(folder, hidden, neurons, layers, vocabulary):
    """A llama of which the files hold no bytes."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 32, "vocab_size": vocabulary, "dtype": "bfloat16"}
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        own = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        own |= {f"mlp.{part}_proj": (neurons, hidden) for part in ("gate", "up")}
        own |= {"mlp.down_proj": (hidden, neurons)}
        own |= {f"{part}_layernorm": (hidden,) for part in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def too_little(job) -> int:
    """A byte less than it takes to hold the states in memory."""
    return memory.fit(job, write.slots(job)).peak_bytes - 1


# --- the store -----------------------------------------------------------------------------------


def test_tensors_in_files_are_tensors(tmp_path):
    kept = Store(tmp_path)
    rows = kept.empty(3, 1000)
    rows[:] = torch.arange(3000.0).view(3, 1000)
    part = rows[1]
    del rows
    kept.release()
    assert torch.equal(part, torch.arange(1000.0, 2000.0))
    assert kept.empty(2, 3, dtype=torch.uint8).dtype == torch.uint8
    assert kept.empty(0, 3).shape == (0, 3)


def test_nothing_is_left_of_a_file(tmp_path):
    """It has no name, and its room is free again when its last tensor is gone."""
    before = os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_frsize
    kept = Store(tmp_path)
    part = kept.empty(32 << 20, dtype=torch.uint8)[:5]
    assert os.listdir(tmp_path) == [] and len(kept._maps) == 1
    held = os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_frsize
    assert before - held > 16 << 20
    del part
    assert len(kept._maps) == 0


def test_pages_that_are_released_are_not_held(tmp_path):
    def held() -> int:
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) << 10

    kept, before = Store(tmp_path), held()
    rows = kept.empty(64 << 20, dtype=torch.uint8).fill_(7)
    assert held() - before > 48 << 20
    kept.release()
    assert held() - before < 16 << 20 and int(rows[12345]) == 7


# --- conversions ---------------------------------------------------------------------------------


def test_states_in_files_give_the_same_bytes(job, tmp_path, monkeypatch):
    plain = convert(job, tmp_path / "plain")
    made = []

    class Noted(Store):
        def empty(self, *size, **options):
            made.append((self.folder, size))
            return super().empty(*size, **options)

    monkeypatch.setattr("moefy.convert.memory.Store", Noted)
    filed = convert(job, tmp_path / "filed", Attempt(memory=too_little(job)))
    assert filed["outputs"] == plain["outputs"]
    assert plain["memory"]["file_bytes"] == 0
    assert filed["memory"]["file_bytes"] == memory.state_arrays(job)
    assert {folder for folder, _ in made} == {tmp_path / ".filed.moefy-part"}
    # Of two layers: states once; inputs, activations, and outputs.
    tokens, hidden, neurons = 4352, 32, 96
    states, wide, narrow = (136, 64, hidden), (tokens, neurons), (tokens, hidden)
    layer = [(68, 64, hidden), wide, narrow]
    assert [size for _, size in made] == [states, *layer, *layer]
    assert sum(4 * torch.Size(size).numel() for _, size in made[:4]) == memory.state_arrays(job)
    assert sorted(os.listdir(tmp_path)) == ["filed", "plain"]


def test_activations_that_are_computed_again_give_the_same_bytes(job, tmp_path, monkeypatch):
    """As on a GPU; here where experts overlap, of which each neuron is there several times."""
    job = prepare(dataclasses.replace(job.recipe, overlap=2.0, layers="1:2"))
    plain = convert(job, tmp_path / "plain")
    places = {"cpu": (memory.Place("memory", keeps_activations=False),)}
    monkeypatch.setattr(memory, "PLACES", places)
    again = convert(job, tmp_path / "again")
    assert again["outputs"] == plain["outputs"]
    less = plain["memory"]["planned_bytes"] - again["memory"]["planned_bytes"]
    assert less == 4 * 4352 * 96


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_file_that_loses_what_is_released_is_seen(job, tmp_path, monkeypatch):
    """The planted fault: pages that are let go before they are written."""
    plain = convert(job, tmp_path / "plain")

    def forget(self):
        for mapped in self._maps:
            mapped[: len(mapped) // 2] = bytes(len(mapped) // 2)

    monkeypatch.setattr(buffers.Store, "release", forget)
    try:
        filed = convert(job, tmp_path / "filed", Attempt(memory=too_little(job)))
    except MoefyError:
        return
    assert filed["outputs"] != plain["outputs"]


def test_a_disk_without_room_for_the_states(job, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(MoefyError, match="No space left.*make room") as caught:
        convert(job, tmp_path / "out", Attempt(memory=too_little(job)))
    assert caught.value.code == 5
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_even_so_says_what_to_lower(job, tmp_path):
    with pytest.raises(MoefyError, match=r"--memory allows 0\.1 GB; the most is for") as caught:
        convert(job, tmp_path / "out", Attempt(memory=10**8))
    assert caught.value.code == 5 and os.listdir(tmp_path) == []
    assert "--memory allows 0.1 GB" in estimate(job, 10**8)["notes"][-1]


def test_plans_grow_by_the_states_alone(pico, text):
    """Twice the tokens take that much more memory, and none with the states in files."""
    peaks = {}
    for tokens in (65536, 131072):
        given = {"model": str(pico("llama")), "calibration": str(text), "tokens": tokens}
        job = prepare(build(None, given, []))
        slots = write.slots(job)
        for files in (False, True):
            peaks[tokens, files] = memory.predicted(
                job, slots, memory.IN_FILES if files else memory.IN_MEMORY
            )
    few, many = peaks[65536, False]["refit"], peaks[131072, False]["refit"]
    assert many - few == 65536 * 4 * (4 * 32 + 96)
    assert peaks[65536, True]["refit"] == peaks[131072, True]["refit"]
    assert peaks[65536, True]["reopen"] == peaks[131072, False]["reopen"]


def test_a_quarter_million_tokens_of_a_small_model_fit_four_gigabytes(text, tmp_path):
    """Their states and activations alone are more than that: they lie in files."""
    model = hollow_llama(tmp_path / "135m", 576, 1536, 30, 49152)
    given = {"model": str(model), "calibration": str(text), "tokens": 262_144, "device": "cpu"}
    for overlap in (1, 4):
        job = prepare(build(None, {**given, "overlap": overlap}, []))
        plan = memory.fit(job, write.slots(job), 4 * 10**9)
        assert not plan.refusal and plan.place.where == "files"
        assert plan.peak_bytes < 4 * 10**9 < memory.predicted(job, write.slots(job))["refit"]


def test_a_million_tokens_of_seven_billion_parameters_fit_a_small_gpu(text, tmp_path, monkeypatch):
    """24 GB of a GPU and 40 GB of the host; a tenth of that GPU is refused in one line. A GPU that
    holds the states takes more of the host."""
    model = hollow_llama(tmp_path / "7b", 4096, 11008, 32, 32000)
    given = {"model": str(model), "calibration": str(text), "tokens": 1_000_448}
    job = prepare(build(None, {**given, "device": "cpu"}, []))
    monkeypatch.setattr(type(job), "device", torch.device("cuda"))
    monkeypatch.setattr("moefy.memory.available", lambda: 80 * 10**9)
    rooms = {}
    for room, host in ((10**12, 80), (10**11, 80), (24 * 10**9, 40), (2 * 10**9, 40)):
        monkeypatch.setattr(memory, "device_memory", lambda device, room=room: room)
        rooms[room] = memory.fit(job, write.slots(job), host * 10**9)
    places = [(plan.place.where, plan.place.keeps_activations) for plan in rooms.values()]
    assert places == [("device", True), ("device", False), ("files", False), ("files", False)]
    # States on the GPU are copied to the host while they are saved, the dense model's too.
    assert rooms[10**12].peak_bytes > 2 * 4 * 1_000_448 * 4096 > rooms[24 * 10**9].peak_bytes
    assert rooms[24 * 10**9].device_bytes < 12 * 10**9 and not rooms[24 * 10**9].refusal
    assert re.match(r"this conversion .* of the GPU's memory, cuda has 2", rooms[2 * 10**9].refusal)


def test_several_processes_share_the_memory_and_hold_what_they_gather(job, monkeypatch):
    slots, where = write.slots(job), memory.Place("files")
    alone, room = memory.predicted(job, slots, where), memory.host_room()
    assert not memory.fit(job, slots).refusal
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.host_room() == room // 2
    held = {
        stage: num_bytes - alone[stage]
        for stage, num_bytes in memory.predicted(job, slots, where).items()
    }
    both = 2 * 4 * job.recipe.tokens * job.size("hidden_size")  # the dense model's states, too
    assert held.pop("reopen") == 0
    assert set(held.values()) == {2 * both}  # the parts, and the whole
    monkeypatch.setattr("moefy.memory.available", lambda: max(alone.values()))
    assert "there are" in memory.fit(job, slots).refusal


def test_two_processes_do_not_take_one_gpu(job, tmp_path):
    named = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, device="cuda:0"))
    with pytest.raises(MoefyError, match="--device is 'cuda:0' for 2 processes") as caught:
        convert(named, tmp_path / "out", Attempt(group=Group(0, 2)))
    assert caught.value.code == 2 and not (tmp_path / "out").exists()


def test_a_plan_counts_what_is_kept_until_the_model_is_whole(job, tmp_path, monkeypatch):
    sizes, save = [], State.save_tensors

    def measured(self, *arguments, **options):
        save(self, *arguments, **options)
        sizes.append(sum(file.stat().st_size for file in self.folder.rglob("*.safetensors")))

    monkeypatch.setattr(State, "save_tensors", measured)
    planned = estimate(job)["state_bytes"]
    convert(job, tmp_path / "out")
    # Two generations of the states, and room for one that is being written.
    assert planned / 2 < max(sizes) < planned
