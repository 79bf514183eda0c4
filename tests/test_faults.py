"""Every bad input has one line to say, an exit code, and no way to hang or to run code.

A row is a fault: what is done to a copy of a whole checkpoint, which stage refuses it, with which
exit code, and what the message must name. The stages before must accept it.
"""

import json
import os
import random
import shutil
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moefy import families
from moefy.checkpoint import Checkpoint
from moefy.errors import MoefyError
from moefy.validate import check_tensors, open_checkpoint, scan_finite

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = QUERY.replace("q_proj", "k_proj")
EMBEDDING = "model.embed_tokens.weight"

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Fault:
    """One row; `stage` is the key of `STAGES` that refuses it."""

    name: str
    damage: Damage
    says: tuple[str, ...]
    code: int = 3
    stage: str = "open"


# --- what a fault is made of ---------------------------------------------------------------------


def write(name: str, data: bytes | str) -> Damage:
    """Replace a whole file."""
    return lambda folder: (folder / name).write_bytes(
        data if isinstance(data, bytes) else data.encode()
    )


def append(name: str, data: bytes) -> Damage:
    return lambda folder: write(name, (folder / name).read_bytes() + data)(folder)


def cut(name: str, length: int) -> Damage:
    return lambda folder: write(name, (folder / name).read_bytes()[:length])(folder)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def then(*steps: Damage) -> Damage:
    return lambda folder: [step(folder) for step in steps]


def config(**changes: object) -> Damage:
    """Change keys of config.json; `...` removes a key."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / CONFIG).read_text()) | changes
        kept = {key: item for key, item in value.items() if item is not ...}
        write(CONFIG, json.dumps(kept))(folder)

    return damage


def other_config(**value: object) -> Damage:
    return write(CONFIG, json.dumps(value))


def tensors(**changes: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None) -> Damage:
    """Change tensors by name, with a function, a new value, or None to remove one."""

    def damage(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        for name, change in changes.items():
            value = change(stored[name]) if callable(change) else change
            stored = {key: item for key, item in stored.items() if key != name}
            stored |= {} if value is None else {name: value.contiguous()}
        save_file(stored, folder / SINGLE, metadata={"format": "pt"})

    return damage


def tensor(name: str, change: Any = None) -> Damage:
    return tensors(**{name: change})


def header(change: Callable[[dict], object]) -> Damage:
    """Change the header of the single file, which safetensors' own writer would not write so."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        change(value)
        text = json.dumps(value).encode()
        write(SINGLE, struct.pack("<Q", len(text)) + text + data[8 + length :])(folder)

    return damage


def huge_header(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # sparse: no disk is used


def split(folder: Path) -> None:
    """Make two shards and an index of the single file."""
    stored = load_file(folder / SINGLE)
    names = sorted(stored)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: stored[name] for name in part}, folder / shard, metadata={"format": "pt"})
    where = {name: SHARDS[name in parts[1]] for name in names}
    write(INDEX, json.dumps({"metadata": {}, "weight_map": where}))(folder)
    (folder / SINGLE).unlink()


def index(change: Callable[[dict], object]) -> Damage:
    """Split, then change the index's weight map in place."""

    def damage(folder: Path) -> None:
        split(folder)
        value = json.loads((folder / INDEX).read_text())
        change(value["weight_map"])
        write(INDEX, json.dumps(value))(folder)

    return damage


def sharded(*steps: Damage) -> Damage:
    return then(split, *steps)


def elsewhere(name: str) -> Damage:
    """Make the index name the file `name`, which is a whole shard outside the folder."""

    def damage(folder: Path) -> None:
        split(folder)
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / SHARDS[1], outside)
        target = name.replace("ABSOLUTE", str(outside))
        write(INDEX, (folder / INDEX).read_text().replace(SHARDS[1], target))(folder)

    return damage


def link(name: str, to: str, *, move: bool = False) -> Damage:
    """Put a link in a file's place; with `move` the file goes to where the link leads."""

    def damage(folder: Path) -> None:
        place = folder / to
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, place) if move else (folder / name).unlink()
        (folder / name).symlink_to(place)

    return damage


def special(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something that is no regular file in a file's place."""
    return lambda folder: [(folder / name).unlink(), make(folder / name)]


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def code_of_its_own(folder: Path) -> None:
    (folder / "model.py").write_text("open('it-ran', 'w')\n")
    config(auto_map={key: "model.Model" for key in ("AutoConfig", "AutoModelForCausalLM")})(folder)


def first_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(matrix: torch.Tensor) -> torch.Tensor:
        matrix[0, :3] = value
        return matrix

    return change


def quantised(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix * 30).to(torch.int8)


# --- the rows, numbered as the faults they belong to ---------------------------------------------

FAULTS = [
    Fault("1 truncated", cut(SINGLE, 90_000), (SINGLE, "90000")),
    Fault("1 truncated shard", sharded(cut(SHARDS[1], 9_000)), (SHARDS[1], "9000")),
    Fault("2 empty", write(SINGLE, b""), (SINGLE, "0 bytes")),
    Fault("2 random bytes", write(SINGLE, random.Random(0).randbytes(5_000)), (SINGLE,)),
    Fault("3 trailing bytes", append(SINGLE, b"PK\x03\x04"), (SINGLE, "end")),
    Fault("3 header of 2^62 bytes", write(SINGLE, struct.pack("<Q", 2**62) + b"{}"), (SINGLE,)),
    Fault("3 header over 100 MB", huge_header, (SINGLE, "100000001")),
    Fault(
        "3 overlapping",
        header(lambda value: value[UP].update(data_offsets=value[GATE]["data_offsets"])),
        (SINGLE, "starts at byte"),
    ),
    Fault("3 unknown dtype", header(lambda value: value[UP].update(dtype="F3")), (SINGLE, "F3")),
    Fault("3 shape", header(lambda value: value[UP].update(shape=[-96, -32])), (SINGLE, UP)),
    Fault("4 one shard", sharded(remove(SHARDS[1])), (SHARDS[1], "hf download")),
    Fault("4 all shards", sharded(remove(*SHARDS)), (*SHARDS, "hf download")),
    Fault("5 cut index", sharded(cut(INDEX, 200)), (INDEX,)),
    Fault("5 list", sharded(write(INDEX, "[]")), (INDEX, "object")),
    Fault("5 no map", sharded(write(INDEX, '{"metadata": {}}')), (INDEX, "weight_map")),
    Fault("5 empty map", sharded(write(INDEX, '{"weight_map": {}}')), (INDEX, "weight_map")),
    Fault("5 list map", sharded(write(INDEX, '{"weight_map": ["a"]}')), (INDEX, "weight_map")),
    Fault("5 number", index(lambda names: names.update({UP: 7})), (INDEX, "7")),
    Fault("5 null", index(lambda names: names.update({UP: None})), (INDEX, "None")),
    Fault("5 repeated key", sharded(write(INDEX, '{"a": 1, "a": 2}')), (INDEX, "twice")),
    Fault("6 index lacks", index(lambda names: names.pop(UP)), (INDEX, UP, "not listed")),
    Fault(
        "6 index has more",
        index(lambda names: names.update(x=SHARDS[0])),
        (INDEX, "'x'", "no shard"),
    ),
    Fault(
        "6 in two shards", sharded(lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1])), SHARDS[1:]
    ),
    Fault("7 no FFN", tensor(UP), (UP,)),
    Fault("7 no embedding", tensor(EMBEDDING), (EMBEDDING,)),
    Fault("7 no attention", tensor(QUERY), (QUERY,), stage="tensors"),
    Fault("7 no norm", tensor("model.norm.weight"), ("model.norm.weight",), stage="tensors"),
    Fault("7 no head", tensor("lm_head.weight"), ("lm_head.weight",), stage="tensors"),
    Fault(
        "8 extra",
        tensor("lora_A.weight", torch.ones(2)),
        ("lora_A.weight", "llama"),
        stage="tensors",
    ),
    Fault("9 FFN", tensor(UP, lambda w: w[:95]), (UP, "[95, 32]", "[96, 32]")),
    Fault("9 embedding", tensor(EMBEDDING, lambda w: w[:127]), ("[127, 32]", "[128, 32]")),
    Fault("9 query", tensor(QUERY, lambda w: w[:31]), (QUERY, "[31, 32]", "[32, 32]")),
    Fault("9 key", tensor(KEY, lambda w: w[:, :31]), (KEY, "[16, 31]", "[16, 32]")),
    Fault("9 head_dim", config(head_dim=16), (QUERY, "[32, 32]", "[64, 32]")),
    Fault("10 NaN", tensor(UP, first_value(float("nan"))), (UP, "3 of 3072"), stage="values"),
    Fault(
        "10 infinity", tensor(QUERY, first_value(float("-inf"))), (QUERY, "3 of"), stage="values"
    ),
    Fault("11 zeros", tensor(UP, torch.zeros_like), (UP, "zeros"), stage="values"),
    Fault(
        "12 two of them",
        then(
            lambda f: shutil.copy(f / SINGLE, f / "x"),
            split,
            lambda f: shutil.move(f / "x", f / SINGLE),
        ),
        (SINGLE, INDEX, "ambiguous"),
    ),
    Fault("13 parent", elsewhere("../outside.safetensors"), (INDEX, "security", "../outside")),
    Fault("13 absolute", elsewhere("ABSOLUTE"), (INDEX, "security")),
    Fault("13 backslash", elsewhere(r"..\\outside.safetensors"), (INDEX, "security")),
    Fault("13 drive", elsewhere("C:outside.safetensors"), (INDEX, "security")),
    Fault("13 NUL", elsewhere(r"a\u0000.safetensors"), (INDEX, "security")),
    Fault("13 line break", elsewhere(r"a\n.safetensors"), (INDEX, "security")),
    Fault("13 dots", elsewhere(".."), (INDEX, "security")),
    Fault("13 nothing", elsewhere(""), (INDEX, "security")),
    Fault("13 pickle", elsewhere("pytorch_model.bin"), (INDEX, "security")),
    Fault("15 link out", link(SINGLE, "../outside.safetensors", move=True), (SINGLE, "outside")),
    Fault("15 shard out", sharded(link(SHARDS[0], "../a", move=True)), (SHARDS[0], "outside")),
    Fault("15 config out", link(CONFIG, "../config.json", move=True), (CONFIG, "outside")),
    Fault("15 blobs of no cache", link(SINGLE, "../../blobs/x", move=True), (SINGLE, "outside")),
    Fault("15 device", link(SINGLE, "/dev/zero"), (SINGLE, "regular")),
    Fault("15 broken link", link(SINGLE, "gone"), (SINGLE, "hf download")),
    Fault("15 loop", link(SINGLE, SINGLE), (SINGLE, "hf download")),
    Fault("15 pipe", special(SINGLE, os.mkfifo), (SINGLE, "regular")),
    Fault("15 pipe as shard", sharded(special(SHARDS[1], os.mkfifo)), (SHARDS[1], "regular")),
    Fault("15 pipe as index", sharded(special(INDEX, os.mkfifo)), (INDEX, "regular")),
    Fault("15 pipe as config", special(CONFIG, os.mkfifo), (CONFIG, "regular")),
    Fault("15 folder", special(SINGLE, os.mkdir), (SINGLE, "regular")),
    Fault("15 socket", special(SINGLE, unix_socket), (SINGLE, "regular")),
    Fault(
        "16 pickle only",
        lambda folder: shutil.move(folder / SINGLE, folder / "pytorch_model.bin"),
        ("pytorch_model.bin", "save_pretrained"),
    ),
    Fault("16 no weights", remove(SINGLE), (SINGLE, INDEX)),
    Fault("17 no config", remove(CONFIG), (CONFIG,)),
    Fault("17 empty", write(CONFIG, ""), (CONFIG,)),
    Fault("17 cut", cut(CONFIG, 100), (CONFIG,)),
    Fault("17 list", write(CONFIG, '[{"model_type": "llama"}]'), (CONFIG, "object")),
    Fault("17 nested", config(note=json.loads("[" * 60 + "]" * 60)), (CONFIG, "50 deep")),
    Fault("17 deep", write(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000), (CONFIG,)),
    Fault(
        "17 repeated key",
        write(CONFIG, '{"model_type": "bert", "model_type": "llama"}'),
        ("twice",),
    ),
    Fault("17 over 1 MB", config(note="x" * 1_000_000), (CONFIG, "1000000")),
    Fault("17 not UTF-8", write(CONFIG, b'{"model_type": "\xff"}'), (CONFIG,)),
    Fault("17 long number", write(CONFIG, '{"a": ' + "9" * 5_000 + "}"), (CONFIG,)),
    Fault("17 no model_type", config(model_type=...), (CONFIG, "model_type", "moefy families")),
    Fault(
        "17 odd model_type", config(model_type=["llama"]), (CONFIG, "model_type", "moefy families")
    ),
    Fault("18 FFN of 10^12", config(intermediate_size=10**12), ("mlp.gate_proj", str(10**12))),
    Fault("18 10^12 wide", config(hidden_size=10**12), (EMBEDDING, str(10**12))),
    Fault("18 10^12 tokens", config(vocab_size=10**12), (EMBEDDING, str(10**12))),
    Fault(
        "18 10^12 heads", config(num_attention_heads=10**12), ("num_attention_heads", str(10**12))
    ),
    Fault("18 10^6 layers", config(num_hidden_layers=10**6), ("num_hidden_layers", "2 layers")),
    Fault("18 fewer layers", config(num_hidden_layers=1), ("num_hidden_layers", "2 layers")),
    Fault("18 head groups", config(num_key_value_heads=3), ("num_key_value_heads", "3")),
    Fault("18 no head groups", config(num_key_value_heads=0), ("num_key_value_heads", "0")),
    Fault("18 epsilon", config(rms_norm_eps="small"), (CONFIG, "rms_norm_eps"), stage="tensors"),
    Fault("18 padding", config(pad_token_id=10**9), (CONFIG,), stage="tensors"),
    Fault(
        "18 rope",
        config(rope_parameters={"rope_type": "spiral"}),
        (CONFIG, "spiral"),
        stage="tensors",
    ),
    Fault("19 code", code_of_its_own, (CONFIG, "auto_map"), 4),
    Fault("19 kernel", config(attn_implementation="evil/kernel"), (CONFIG, "kernel"), 4),
    Fault(
        "20 encoder",
        other_config(model_type="electra", type_vocab_size=2),
        ("'electra'", "encoder"),
        4,
    ),
    Fault(
        "20 masked", other_config(model_type="x", architectures=["XForMaskedLM"]), ("encoder",), 4
    ),
    Fault(
        "20 two halves", other_config(model_type="bart", is_encoder_decoder=True), ("encoder",), 4
    ),
    Fault("20 SSM", other_config(model_type="mamba", state_size=16), ("state-space", "qwen3"), 4),
    Fault("20 recurrent", other_config(model_type="rwkv"), ("'rwkv'", "recurrent"), 4),
    Fault("20 MoE", other_config(model_type="mixtral", num_local_experts=8), ("Mixture",), 4),
    Fault("20 MoE again", other_config(model_type="qwen3_moe", num_experts=8), ("Mixture",), 4),
    Fault(
        "20 deepseek", other_config(model_type="deepseek_v3", n_routed_experts=8), ("Mixture",), 4
    ),
    Fault("20 picture", other_config(model_type="llava", vision_config={"a": 1}), ("several",), 4),
    Fault("20 typo", config(model_type="lama"), ("'lama'", "unknown", "nearest is llama"), 4),
    Fault("20 path", config(model_type="../llama"), ("unknown", ", ".join(families.names())), 4),
    Fault("20 no module", config(model_type="family"), ("unknown",), 4),
    Fault("21 biases", config(mlp_bias=True), (CONFIG, "mlp_bias"), 4),
    Fault(
        "21 biases that are not there",
        config(attention_bias=True),
        (CONFIG, "self_attn.q_proj.bias"),
        stage="tensors",
    ),
    Fault("21 not gated", other_config(model_type="bloom", n_embed=32), ("'bloom'", "unknown"), 4),
    Fault("21 activation", config(hidden_act="relu2"), ("relu2", "silu"), 4),
    Fault("21 odd activation", config(hidden_act=["silu"]), ("hidden_act", "gelu"), 4),
    Fault("22 config", config(quantization_config={"quant_method": "x"}), ("dequantise",), 4),
    Fault("22 config of MLX", config(quantization={"bits": 4}), ("dequantise",), 4),
    Fault("22 int8", tensor(UP, quantised), (UP, "I8", "dequantise"), 4),
    Fault("22 fp8", tensor(UP, lambda w: w.to(torch.float8_e4m3fn)), (UP, "F8_E4M3"), 4),
    Fault(
        "22 packed",
        then(tensor(UP), tensor(UP.replace("weight", "qweight"), torch.ones(4, 96).int())),
        ("qweight", "I32", "dequantise"),
        4,
    ),
]

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
FAULTS += [
    Fault(f"18 {key} {value!r}", config(**{key: value}), (CONFIG, key))
    for key in SIZES
    for value in (-64, 0, True, "64", 64.0, float("nan"), None, [64], ...)
]


# --- the stages and the tests --------------------------------------------------------------------


def values(checkpoint: Checkpoint) -> None:
    for name in checkpoint.entries:
        scan_finite(name, checkpoint.tensor(name), ffn=".mlp." in name)


def tensors_of(checkpoint: Checkpoint) -> list[str]:
    return check_tensors(checkpoint, families.load(str(checkpoint.config["model_type"])))[1]


STAGES = {"open": open_checkpoint, "tensors": tensors_of, "values": values}


def run(folder: Path, last: str = "values") -> None:
    """Run the stages up to and with `last`."""
    checkpoint = open_checkpoint(folder)
    for stage in list(STAGES)[1 : list(STAGES).index(last) + 1]:
        STAGES[stage](checkpoint)


@pytest.fixture(autouse=True)
def never_hangs():
    """Interrupt what does not return, even from within a system call."""

    def late(*_):
        raise TimeoutError("still running after a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, own_pico, monkeypatch):
    folder = own_pico("llama")
    monkeypatch.chdir(folder.parent)
    fault.damage(folder)
    stages = list(STAGES)
    if fault.stage != "open":
        run(folder, stages[stages.index(fault.stage) - 1])
    with pytest.raises(MoefyError) as caught:
        run(folder, fault.stage)
    message = str(caught.value)
    assert caught.value.code == fault.code, message
    assert message.isprintable() and len(message) < 1000, message
    assert [part for part in fault.says if part not in message] == [], message
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("model_type", families.names())
def test_an_unharmed_model_passes(model_type, pico):
    run(pico(model_type))
    assert tensors_of(open_checkpoint(pico(model_type))) == []


def test_names_are_not_repeated():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def cached(folder: Path) -> None:
    """Lay the folder out as the hub cache does: every file a link to a blob beside `snapshots`."""
    blobs = folder.parent / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.rmdir()
    folder.symlink_to(snapshot)


HARMLESS = {
    "two shards": split,
    "6 index points to the wrong shard": index(
        lambda names: names.update({name: SHARDS[1 - SHARDS.index(names[name])] for name in names})
    ),
    "8 buffers of old versions": tensors(
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "14 hub cache": cached,
    "14 hub cache of shards": sharded(cached),
    "14 link within the folder": link(SINGLE, "weights/model.safetensors", move=True),
    "other files": write("consolidated.safetensors", b"not ours to read"),
    "23 dtypes are mixed": then(
        tensor(UP, lambda w: w.bfloat16()), tensor(QUERY, lambda w: w.half())
    ),
    "24 tied, no head stored": then(config(tie_word_embeddings=True), tensor("lm_head.weight")),
    "null where a default is meant": config(head_dim=None, quantization_config=None),
    "an attention implementation of transformers": config(attn_implementation="sdpa"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name, own_pico):
    folder = own_pico("llama")
    HARMLESS[name](folder)
    run(folder)


def test_an_ignored_tensor_is_noted(own_pico):
    folder = own_pico("llama")
    tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    (note,) = tensors_of(open_checkpoint(folder))
    assert "layers.0.self_attn.rotary_emb.inv_freq" in note


def test_tied_embeddings(pico, own_pico):
    tied = open_checkpoint(pico("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in tied.entries and tensors_of(tied) == []
    folder = own_pico("llama", tie_word_embeddings=True)
    tensor("lm_head.weight", load_file(folder / SINGLE)[EMBEDDING])(folder)
    assert tensors_of(open_checkpoint(folder)) == []
    tensor("lm_head.weight", lambda head: head + 1)(folder)
    (note,) = tensors_of(open_checkpoint(folder))
    assert "lm_head.weight differs" in note


def test_damaged_bytes_never_escape(own_pico):
    """Whatever one byte of a header, an index or a configuration is, the answer is a MoefyError."""
    folder = own_pico("llama")
    split(folder)
    dice = random.Random(0)
    refused = 0
    for name in (SHARDS[0], INDEX, CONFIG):
        whole = (folder / name).read_bytes()
        length = len(whole) if name != SHARDS[0] else 8 + struct.unpack("<Q", whole[:8])[0]
        for _ in range(300):
            place = dice.randrange(length)
            byte = bytes([dice.choice(b'0123456789"{}[],:\\/-.en\x00\xff')])
            (folder / name).write_bytes(whole[:place] + byte + whole[place + 1 :])
            try:
                tensors_of(open_checkpoint(folder))
            except MoefyError as error:
                assert str(error).isprintable(), str(error)
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 500
    run(folder)


def test_scan_finite_takes_every_stored_dtype():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        scan_finite("a", torch.ones(3, 4, dtype=dtype), ffn=True)
        scan_finite("norm", torch.zeros(3, dtype=dtype))
        with pytest.raises(MoefyError, match="1 of 2"):
            scan_finite("a", torch.tensor([1.0, float("inf")], dtype=dtype))
