"""Every bad input has one line to say, an exit code, and no way to hang or to run code.

The cases are in `fault_cases`; a table of what happens is printed by `faults_table`.
"""

import random
import shutil
from pathlib import Path

import damage as d
import pytest
import torch
from command import listing
from damage import CONFIG, EMBEDDING, HEAD, QUERY, SINGLE, UP
from fault_cases import CASES as MODELS
from fault_cases import Place
from run_cases import CASES as RUNS
from safetensors.torch import load_file

from moefy.checkpoint.check_finite import scan
from moefy.checkpoint.tensors import Checkpoint
from moefy.checkpoint.validate import check_tensors, open_checkpoint
from moefy.errors import MoefyError
from moefy.inspect import describe
from moefy.models import families
from moefy.text.tokenizer import load_tokenizer


def tensors_of(checkpoint: Checkpoint) -> list[str]:
    return check_tensors(checkpoint, families.load(str(checkpoint.config["model_type"])))[1]


def run(folder: Path) -> tuple[str, ...]:
    """Everything that is asked of a checkpoint; gives what is noted."""
    checkpoint = open_checkpoint(folder)
    return (*tensors_of(checkpoint), *scan(checkpoint).notes)


pytestmark = pytest.mark.usefixtures("never_hangs")

CASES = [*MODELS, *RUNS]
HERE = [case for case in CASES if not case.elsewhere]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_case(case, moefy, pico, text, tmp_path, monkeypatch):
    root = tmp_path / "case"
    shutil.copytree(pico("llama"), root / "model")
    shutil.copy(text, root / "text.txt")
    place = Place(root, moefy)
    case.arrange(place)
    monkeypatch.chdir(root)
    before = listing(root)
    if case.early:
        with pytest.raises(MoefyError):
            open_checkpoint(place.model)
    done = case.act(place)
    assert done.code == case.code, done
    assert done.out == ""
    assert [part for part in case.says if part not in done.err] == [], done.err
    if case.code:
        (line,) = done.err.splitlines()
        assert line.startswith("moefy: ") and line.isprintable() and len(line) < 1000, line
    after = listing(root)
    # Who holds a lock is no matter, and what a case leaves may have been there before.
    same = [name for name in before if name.split("/")[0] not in case.leaves]
    same = [name for name in same if not name.endswith("/lock")]
    assert [name for name in same if before[name] != after.get(name)] == []
    assert {name.split("/")[0] for name in after.keys() - before.keys()} <= {*case.leaves}


@pytest.mark.parametrize("case", [c for c in HERE if c.early], ids=lambda case: case.name)
def test_inspect_judges_as_convert_does(case, pico, text, tmp_path):
    shutil.copytree(pico("llama"), tmp_path / "model")
    shutil.copy(text, tmp_path / "text.txt")
    case.arrange(Place(tmp_path, lambda *_: None))
    try:
        code = describe(str(tmp_path / "model"))["code"]
    except MoefyError as error:
        code = error.code
    assert code == case.code


def test_names_are_not_repeated():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("model_type", families.names())
def test_an_unharmed_model_passes(model_type, pico):
    assert run(pico(model_type)) == ()


@pytest.mark.parametrize("model_type", families.names())
def test_a_model_without_a_tokenizer_has_none(model_type, own_pico):
    """Although transformers makes an empty one of some classes, which gives no token for a text."""
    folder = own_pico(model_type)
    assert load_tokenizer(folder)("a river")["input_ids"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MoefyError, match="has no tokenizer that loads"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "harmless",
    [
        d.write("consolidated.safetensors", b"not ours to read"),
        d.config(head_dim=None, quantization_config=None),
        d.config(attn_implementation="sdpa"),
    ],
    ids=lambda harmless: harmless.words,
)
def test_harmless(harmless, own_pico):
    folder = own_pico("llama")
    harmless(folder)
    run(folder)


def test_tied_embeddings(pico, own_pico):
    tied = open_checkpoint(pico("llama", tie_word_embeddings=True))
    assert HEAD not in tied.entries and tensors_of(tied) == []
    folder = own_pico("llama", tie_word_embeddings=True)
    d.tensor(HEAD, load_file(folder / SINGLE)[EMBEDDING])(folder)
    assert tensors_of(open_checkpoint(folder)) == []
    d.tensor(HEAD, lambda head: head + 1)(folder)
    (note,) = tensors_of(open_checkpoint(folder))
    assert "lm_head.weight differs" in note


def test_damaged_bytes_of_a_configuration_never_escape(own_pico):
    """Whatever one byte of it is; those of headers and indexes are changed in `test_fuzz`."""
    folder = own_pico("llama")
    whole = (folder / CONFIG).read_bytes()
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        place = dice.randrange(len(whole))
        byte = bytes([dice.choice(b'0123456789"{}[],:\\/-.en\x00\xff')])
        (folder / CONFIG).write_bytes(whole[:place] + byte + whole[place + 1 :])
        try:
            tensors_of(open_checkpoint(folder))
        except MoefyError as error:
            assert str(error).isprintable(), str(error)
            refused += 1
    assert refused > 150
    (folder / CONFIG).write_bytes(whole)
    run(folder)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_looked_at(dtype, own_pico):
    folder = own_pico("llama")
    d.tensor(QUERY, lambda weight: weight.to(dtype))(folder)
    assert run(folder) == ()
    d.tensor(QUERY, d.first_value(float("inf"), 1))(folder)
    with pytest.raises(MoefyError, match="1 of 1024"):
        run(folder)


@pytest.mark.parametrize("block", [64, 1 << 24])
def test_the_size_of_blocks_changes_nothing(block, own_pico, monkeypatch):
    from moefy.files import shards
    from moefy.files.publish import sha256

    monkeypatch.setattr(shards, "BLOCK", block)
    folder = own_pico("llama")
    d.flip_bit(QUERY, 1000, 30)(folder)
    d.tensor("model.norm.weight", torch.ones_like)(folder)
    d.tensor(UP, torch.ones_like)(folder)
    scanned = scan(open_checkpoint(folder))
    assert len(scanned.notes) == 2  # a norm of ones is as it starts
    assert f"{UP} is all 1" in "".join(scanned.notes) and QUERY in "".join(scanned.notes)
    assert scanned.digests == {name: sha256(folder / name) for name in (SINGLE, CONFIG)}
    with pytest.raises(MoefyError, match="all 1"):
        scan(open_checkpoint(folder), {UP})


@pytest.mark.parametrize("bit", [26, 27, 28, 29, 30])
def test_a_flipped_bit_of_the_exponent_is_told_where_it_is_absurd(bit, own_pico):
    """Bits 27 to 30 stand for factors of 2**16 to 2**128; bit 26 for 2**8, as trained ones have."""
    folder = own_pico("llama")
    value = 0.3 if bit == 30 else 0.3 * 2.0 ** -(1 << (bit - 23))  # where the bit is not set
    d.tensor(HEAD, d.first_value(value, 1))(folder)
    assert run(folder) == ()
    d.flip_bit(HEAD, 0, bit)(folder)
    large = load_file(folder / SINGLE)[HEAD][0, 0].abs() > 1e4
    assert bool(run(folder)) == bool(large)
