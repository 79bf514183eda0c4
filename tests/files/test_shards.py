"""What is written are safetensors files, what is read is what they hold, and OUT appears whole.

The judge is the safetensors library itself.
"""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.files.publish import check_free, publishing, sha256
from moefy.files.safetensors_header import read_header
from moefy.files.shards import CODES, ShardWriter, Slot

INDEX = "model.safetensors.index.json"


def random_tensors(seed: int, most: int = 12) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of 0 to 4 axes, some of them empty."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {}
    for number in range(dice.randint(1, most)):
        shape = [dice.choice((0, 1, 2, 3, 5, 8)) for _ in range(dice.randint(0, 4))]
        values = torch.randn(shape).mul(9)
        dtype = dice.choice(list(CODES))
        if not dtype.is_floating_point:
            values = values.abs()
        name = dice.choice(("a", "B", "layer.0.", "läyer.", "x y ")) + str(number)
        tensors[name] = values.to(dtype)
    return tensors


def slots(tensors: dict[str, torch.Tensor]) -> dict[str, Slot]:
    return {name: Slot(CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def write_all(folder: Path, tensors: dict[str, torch.Tensor], order: list[str], **options) -> dict:
    """Write tensors in `order`; give the bytes of every file."""
    folder.mkdir()
    writer = ShardWriter(folder, slots(tensors), **options)
    for name in order:
        writer.write(name, tensors[name])
    files = writer.finish()
    assert sorted(files) == sorted(folder.iterdir())
    return {file.name: file.read_bytes() for file in files}


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype and result.shape == expected.shape
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (result, expected)]
    assert torch.equal(*raw)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_headers_are_read_as_safetensors_reads_them(seed, tmp_path):
    tensors = random_tensors(seed)
    file = tmp_path / "any.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "x" * seed})
    entries = read_header(file)
    assert entries.keys() == tensors.keys()
    checkpoint = Checkpoint(tmp_path, {}, entries)
    with safe_open(file, "pt") as opened:
        for name, entry in entries.items():
            assert list(entry.shape) == opened.get_slice(name).get_shape()
            assert entry.dtype == opened.get_slice(name).get_dtype()
            assert entry.num_elements == tensors[name].numel()
            assert_same(checkpoint.tensor(name), opened.get_tensor(name))


def test_an_empty_tensor_may_stand_anywhere_in_a_header(tmp_path):
    """Not only before the tensor that starts where it does, as safetensors itself writes it."""
    spec = {
        "full": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
    }
    text = json.dumps(spec).encode()
    text += b" " * (-len(text) % 8)
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"ab")
    assert set(load_file(file)) == {"full", "empty"}
    assert read_header(file).keys() == {"full", "empty"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_matrix(dtype, tmp_path):
    matrix = torch.randn(50, 7).to(dtype)
    save_file({"other": torch.ones(3), "matrix": matrix}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint(tmp_path, {}, read_header(tmp_path / "a.safetensors"))
    for ids in (torch.tensor([[3, 3, 49], [0, 7, 3]]), torch.tensor(5), torch.arange(50)):
        rows = checkpoint.rows("matrix", ids)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, matrix.float()[ids])


def test_a_file_that_shrank_since_it_was_looked_at_is_told(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, file)
    checkpoint = Checkpoint(tmp_path, {}, read_header(file))
    os.truncate(file, 200)
    with pytest.raises(MoefyError, match="ends inside tensor a"):
        checkpoint.tensor("a")


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_one_file(seed, tmp_path):
    tensors = random_tensors(seed)
    write_all(tmp_path / "out", tensors, list(tensors))
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert_same(opened.get_tensor(name), tensor)
    assert read_header(file).keys() == tensors.keys()


@pytest.mark.parametrize("seed", range(20))
def test_several_files_and_their_index(seed, tmp_path):
    tensors = random_tensors(seed, most=30) | {"one": torch.ones(40), "two": torch.ones(40)}
    files = write_all(tmp_path / "out", tensors, list(tensors), shard_bytes=200)
    index = json.loads(files.pop(INDEX))
    assert set(index["weight_map"]) == set(tensors)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    count = len(files)
    assert sorted(files) == [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, 1 + count)
    ]
    result = {name: load_file(tmp_path / "out" / name) for name in files}
    for name, tensor in tensors.items():
        assert_same(result[index["weight_map"][name]][name], tensor)
    assert sum(map(len, result.values())) == len(tensors)
    for held in result.values():
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 200


@pytest.mark.parametrize("shard_bytes", [200, 10**9])
def test_the_order_of_writing_leaves_no_trace(shard_bytes, tmp_path):
    tensors = random_tensors(3, most=30)
    names = list(tensors)
    forwards = write_all(tmp_path / "a", tensors, names, shard_bytes=shard_bytes)
    backwards = write_all(tmp_path / "b", tensors, names[::-1], shard_bytes=shard_bytes)
    twice = write_all(tmp_path / "c", tensors, names + names[:3], shard_bytes=shard_bytes)
    assert forwards == backwards == twice


def test_a_copy_is_the_same_bytes(tmp_path):
    tensors = random_tensors(5)
    save_file(tensors, tmp_path / "source.safetensors")
    entries = read_header(tmp_path / "source.safetensors")
    (tmp_path / "copied").mkdir()
    writer = ShardWriter(tmp_path / "copied", slots(tensors))
    for name, entry in entries.items():
        writer.copy(name, entry)
    writer.finish()
    written = write_all(tmp_path / "written", tensors, list(tensors))
    copied = (tmp_path / "copied" / "model.safetensors").read_bytes()
    assert {"model.safetensors": copied} == written


def test_nothing_can_be_opened_before_all_is_written(tmp_path):
    tensors = {f"tensor {number}": torch.full((30,), number) for number in range(4)}
    writer = ShardWriter(tmp_path, slots(tensors), shard_bytes=500)

    def readable() -> list[str]:
        result = []
        for file in sorted(tmp_path.iterdir()):
            try:
                with safe_open(file, "pt"):
                    result.append(file.name)
            except SafetensorError:
                pass
        return result

    assert len(list(tmp_path.iterdir())) == 2
    for name, tensor in tensors.items():
        assert readable() == []
        with pytest.raises(AssertionError, match="never written"):
            writer.finish()
        writer.write(name, tensor)
    assert readable() == []
    assert not (tmp_path / INDEX).exists()
    writer.finish()
    assert len(readable()) == 2  # the index is no safetensors file
    assert (tmp_path / INDEX).is_file()


def test_a_tensor_of_another_shape_or_dtype_is_our_own_mistake(tmp_path):
    writer = ShardWriter(tmp_path, {"a": Slot("F32", (2, 3))})
    for wrong in (torch.ones(3, 2), torch.ones(2, 3).half()):
        with pytest.raises(AssertionError):
            writer.write("a", wrong)
    with pytest.raises(KeyError):
        writer.write("b", torch.ones(2, 3))


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "file") == known


# --- publishing ----------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def a_run(out: Path, content: str = "old") -> Path:
    """A folder like those that moefy writes."""
    (out / "moefy").mkdir(parents=True)
    (out / "moefy" / "conversion.json").write_text("{}")
    (out / "config.json").write_text(content)
    return out


def publish(out: Path, content: str = "new", **options) -> None:
    with publishing(out, **options) as part:
        assert part.parent.parent == out.parent
        (part / "config.json").write_text(content)


def test_a_folder_appears_whole(tmp_path):
    publish(tmp_path / "deep" / "er" / "out")
    assert listing(tmp_path / "deep") == {"er": None, "er/out": None, "er/out/config.json": b"new"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    assert listing(tmp_path) == {"out": None, "out/config.json": b"new"}


def test_a_run_is_replaced_by_force_alone(tmp_path):
    out = a_run(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(MoefyError, match="--force") as caught:
        publish(out)
    assert caught.value.code == 2
    assert listing(tmp_path) == before
    publish(out, force=True)
    assert listing(tmp_path) == {"out": None, "out/config.json": b"new"}


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path):
    (tmp_path / f".out.moefy-part-{os.getpid()}").mkdir()
    publish(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


@pytest.mark.parametrize("force", [False, True])
def test_what_appeared_in_the_meantime_is_not_replaced(force, tmp_path):
    with pytest.raises(MoefyError) as caught, publishing(tmp_path / "out", force=force) as part:
        (part / "config.json").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert caught.value.code == 2
    assert listing(tmp_path) == {"out": None, "out/thesis.tex": b"mine"}


def occupied_by_file(out: Path) -> None:
    out.write_text("mine")


def occupied_by_link(out: Path) -> None:
    out.symlink_to(a_run(out.with_name("elsewhere")))


def occupied_by_broken_link(out: Path) -> None:
    out.symlink_to(out.with_name("gone"))


def occupied_by_others(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def occupied_by_a_project_with_that_name_in_it(out: Path) -> None:
    (out / "moefy").mkdir(parents=True)
    (out / "moefy" / "cli.py").write_text("mine")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "occupy",
    [
        occupied_by_file,
        occupied_by_link,
        occupied_by_broken_link,
        occupied_by_others,
        occupied_by_a_project_with_that_name_in_it,
    ],
)
def test_what_moefy_did_not_write_is_never_replaced(occupy, force, tmp_path):
    out = tmp_path / "out"
    occupy(out)
    before = listing(tmp_path)
    for refusing in (check_free, publish):
        with pytest.raises(MoefyError) as caught:
            refusing(out, force=force)
        assert caught.value.code == 2
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MoefyError, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_what_fails_leaves_no_trace(error, force, tmp_path):
    out = a_run(tmp_path / "out") if force else tmp_path / "out"
    before = listing(tmp_path)
    with pytest.raises(error), publishing(out, force=force) as part:
        (part / "model.safetensors").write_bytes(b"half of it")
        raise error("stop")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("which", [1, 2])
def test_an_old_run_survives_what_happens_while_it_is_replaced(error, which, tmp_path, monkeypatch):
    out = a_run(tmp_path / "out")
    before = listing(tmp_path)
    rename, calls = Path.rename, []

    def fail(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == which:
            raise error("stop")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else MoefyError):
        publish(out, force=True)
    assert len(calls) >= which
    assert listing(tmp_path) == before


def test_an_interrupt_after_the_rename_leaves_the_new_folder_alone(tmp_path, monkeypatch):
    out = a_run(tmp_path / "out")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        done = rename(path, target)
        if target == out:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(out, force=True)
    assert listing(tmp_path) == {"out": None, "out/config.json": b"new"}


def test_a_place_that_cannot_be_written_is_code_5(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MoefyError, match="cannot write beside") as caught:
        publish(tmp_path / "file" / "out")
    assert caught.value.code == 5
    with pytest.raises(MoefyError, match="cannot write beside") as caught:
        publish(tmp_path / ("x" * 250))
    assert caught.value.code == 5


def test_a_full_disk_is_code_5_and_leaves_no_trace(tmp_path):
    with pytest.raises(MoefyError, match="No space left") as caught, publishing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert caught.value.code == 5
    assert listing(tmp_path) == {}
