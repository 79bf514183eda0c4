"""A published run can be checked and done again, and neither says yes to what is not so."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import sha256_of, write_tuning
from safetensors.torch import load_file, save_file

from moefy import environment
from moefy.errors import MoefyError
from moefy.runs.reproduce import reproduce
from moefy.runs.verify import verify

SINGLE = "model.safetensors"
GOLDEN = Path(__file__).parent / "golden.json"
CHECKS = ["digests", "headers", "values", "forward pass"]


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A copy of a run, to be changed at will."""
    return Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))


def rewritten(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the report of a run."""
    file = run / "moefy" / "conversion.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def admitted(run: Path) -> None:
    """Let the report tell the digests that the files have now."""

    def change(told: dict[str, Any]) -> None:
        names = [name for name in told["outputs"] if (run / name).exists()]
        told["outputs"] = {
            name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names
        }

    rewritten(run, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        stored = load_file(run / SINGLE)
        change(stored)
        save_file(stored, run / SINGLE, metadata={"format": "pt"})

    return damage


def flip(name: str) -> Callable[[Path], object]:
    """Change one bit in the middle of a file."""

    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(bytes(data))

    return damage


def config(**changes: object) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        file = run / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("llama", {"partition": "static"}),
        ("gpt2", {"target": "moefy"}),
    ],
)
def test_a_run_that_is_whole(family, recipe, pico, converted):
    run = converted(pico(family), **recipe)
    found = verify(run)
    assert found["passed"] and found["code"] == 0 and found["not_run"] == []
    assert [check["check"] for check in found["checks"]] == CHECKS
    told = json.loads((run / "moefy" / "conversion.json").read_text())
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    reports = {"README.md", "moefy/conversion.json", "moefy/conversion.md"}
    assert set(told["outputs"]) == files - reports


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip(SINGLE), SINGLE),
    "a bit of the tokenizer": (flip("tokenizer.json"), "tokenizer.json"),
    "a bit of the tokens": (flip("moefy/calibration.safetensors"), "calibration.safetensors"),
    "a missing shard": (lambda run: (run / SINGLE).unlink(), f"lacks {SINGLE}"),
    "a missing configuration": (lambda run: (run / "config.json").unlink(), "lacks config.json"),
    "another configuration": (config(num_experts_per_tok=2), "config.json"),
    "another recipe": (lambda run: (run / "moefy/recipe.toml").write_text(""), "recipe.toml"),
    "a stale shard": (
        lambda run: shutil.copy(run / SINGLE, run / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors, which the run did not write",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed(name, run):
    damage, says = FILES[name]
    damage(run)
    found = verify(run)
    (check,) = found["checks"]
    assert (found["code"], found["passed"], check["passed"]) == (3, False, False)
    assert check["check"] == "digests" and says in check["found"]
    assert found["not_run"] == CHECKS[1:]


# Where the digests are those of the changed files, the other checks must find it.
INSIDE: dict[str, tuple[Callable[[Path], object], str, int, str]] = {
    "NaN": (
        tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "values",
        3,
        "model.norm.weight: 32 of 32 values are NaN",
    ),
    "a header": (lambda run: cut(run), "headers", 3, "not a whole safetensors file"),
    "a tensor too few": (
        tensors(lambda t: t.pop("model.layers.1.mlp.gate.weight")),
        "forward pass",
        6,
        "does not load cleanly",
    ),
    "fewer layers": (config(num_hidden_layers=1), "forward pass", 6, "cannot open"),
    "wider experts": (
        config(moe_intermediate_size=32),
        "forward pass",
        6,
        "does not load cleanly",
    ),
    "other experts per token": (config(num_experts_per_tok=2), "forward pass", 6, "hidden states"),
    "other weights": (
        tensors(lambda t: t["model.layers.0.mlp.experts.1.up_proj.weight"].mul_(2)),
        "forward pass",
        6,
        "hidden states",
    ),
    "slightly other weights": (
        tensors(lambda t: t["model.layers.0.mlp.shared_expert.up_proj.weight"].mul_(1.01)),
        "forward pass",
        6,
        "the report says",
    ),
}


def cut(run: Path) -> None:
    (run / SINGLE).write_bytes((run / SINGLE).read_bytes()[:-4])


@pytest.mark.parametrize("name", INSIDE)
def test_a_change_that_the_digests_admit(name, run):
    damage, stage, code, says = INSIDE[name]
    damage(run)
    admitted(run)
    found = verify(run)
    assert (found["code"], found["passed"]) == (code, False)
    last = found["checks"][-1]
    assert (last["check"], last["passed"]) == (stage, False)
    assert says in last["found"]


def test_a_run_of_before_the_states_were_kept(run):
    file = run / "moefy" / "calibration.safetensors"
    save_file({"ids": load_file(file)["ids"]}, file)
    admitted(run)
    found = verify(run)
    assert found["passed"] and "are not compared" in found["checks"][-1]["found"]


def test_weights_that_were_tuned(run):
    """Their digests are in the fine-tune's report, and their states are not the conversion's."""
    tensors(lambda t: t["model.layers.0.mlp.experts.1.up_proj.weight"].mul_(2))(run)
    admitted(run)
    outputs = json.loads((run / "moefy" / "conversion.json").read_text())["outputs"]
    write_tuning(run, outputs=outputs)
    rewritten(run, lambda told: told.update(outputs={SINGLE: "of the conversion"}))
    found = verify(run)
    assert found["passed"] and "fine-tuned" in found["checks"][-1]["found"]
    flip(SINGLE)(run)
    assert verify(run)["code"] == 3


WRITTEN = [SINGLE, "tokenizer.json", "generation_config.json", "moefy/recipe.toml"]
WRITTEN += ["moefy/conversion.json", "moefy/conversion.md", "moefy/calibration.safetensors"]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_file_that_a_fine_tune_wrote_has_a_digest(name, run):
    write_tuning(run)
    (check, *_) = verify(run)["checks"]
    assert check["passed"] and f"{len(sha256_of(run, '*')) - 2} files are as" in check["found"]
    with (run / name).open("ab") as file:
        file.write(b" ")
    found = verify(run)
    assert found["code"] == 3 and f"not as the run wrote it: {name}" in found["checks"][0]["found"]


def test_a_fine_tune_of_before_noted_its_weights_alone(run):
    """What it took over of the conversion has digests there; of its recipe there is none."""
    write_tuning(run, outputs=sha256_of(run, SINGLE, "config.json"))
    (run / "moefy" / "recipe.toml").write_text("model = 'elsewhere'\n")
    (check, *_) = verify(run)["checks"]
    assert check["passed"] and "no digest of them: moefy/recipe.toml" in check["found"]
    flip("tokenizer.json")(run)
    found = verify(run)
    assert found["code"] == 3 and "tokenizer.json" in found["checks"][0]["found"]


def test_what_a_run_did_not_write_is_named_and_not_refused(run):
    """Reports and what they keep are no strange files, nor is a card that people write on."""
    for name in ("README.md", "notes.txt", "moefy/report.md", "moefy/measured/reading-1.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("more")
    found = verify(run)
    assert found["passed"]
    assert found["checks"][0]["found"].endswith("the run has no digest of them: notes.txt")


def test_the_command(run, monkeypatch, capsys):
    from moefy import cli

    def moefy(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moefy", "verify", str(run), *flags])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    code, out, _ = moefy()
    assert code == 0 and all(f"ok      {name}" in out for name in CHECKS)
    assert moefy("--quiet")[:2] == (0, "")
    assert json.loads(moefy("--json")[1])["passed"] is True
    flip(SINGLE)(run)
    code, out, err = moefy("--json")
    assert code == 3 and json.loads(out)["passed"] is False
    assert SINGLE in err.splitlines()[-1] and err.splitlines()[-1].startswith("moefy: ")
    shutil.rmtree(run / "moefy")
    code, out, err = moefy("--quiet")
    assert (code, out) == (3, "") and "not a whole run" in err


# --- once more -----------------------------------------------------------------------------------


def test_a_run_done_again(run, tmp_path):
    made = reproduce(run / "moefy" / "recipe.toml", tmp_path / "again")
    assert made["reproduced"]["same"] and made["reproduced"]["files_that_differ"] == []
    assert (tmp_path / "again" / SINGLE).read_bytes() == (run / SINGLE).read_bytes()


def test_a_run_that_gives_other_bytes(run, tmp_path, monkeypatch):
    def change(told: dict[str, Any]) -> None:
        told["outputs"][SINGLE] = "0" * 64
        told["versions"]["torch"] = "2.99"
        told["machine"]["threads"] = 64

    rewritten(run, change)
    found = reproduce(run / "moefy" / "recipe.toml", tmp_path / "again")["reproduced"]
    assert not found["same"] and found["files_that_differ"] == [SINGLE]
    now = environment.versions()["torch"]
    assert f"versions.torch was 2.99, is {now}" in found["because"]
    assert "machine.threads was 64, is 1" in found["because"]
    assert len(found["because"]) == 2


def test_a_model_that_has_moved(run, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "moved")
    made = reproduce(run / "moefy" / "recipe.toml", tmp_path / "again", model=str(model))
    assert made["reproduced"]["same"] and made["model"] == str(model)


def test_another_model_is_refused(run, own_pico, tmp_path):
    model = own_pico("llama")
    flip(SINGLE)(model)
    with pytest.raises(MoefyError, match="not the model that was converted") as caught:
        reproduce(run / "moefy" / "recipe.toml", tmp_path / "again", model=str(model))
    assert caught.value.code == 3 and not (tmp_path / "again").exists()


def test_the_command_that_does_a_run_again(run, tmp_path, monkeypatch, capsys):
    from moefy import cli

    def moefy(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moefy", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    again = ["--reproduce", run / "moefy" / "recipe.toml", tmp_path / "again"]
    code, out, _ = moefy(*again)
    assert code == 0 and "byte for byte" in out
    rewritten(run, lambda told: told["outputs"].update({SINGLE: "0" * 64}))
    code, out, err = moefy(*again, "--force", "--json")
    assert code == 6 and json.loads(out)["reproduced"]["files_that_differ"] == [SINGLE]
    assert f"{SINGLE} differ; nothing else that is known of differs" in err
    for more in (["--seed", 3], ["--plan"], ["--set", "seed=3"]):
        code, _, err = moefy(*again, *more)
        assert code == 2 and "--reproduce" in err


# --- golden digests ------------------------------------------------------------------------------

GENERIC = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OMP_NUM_THREADS": "1",
}
"""Makes the libraries compute as on the oldest processor, so that digests hold on all others.
Two roundings are known all the same; what tells those processors apart was not found."""

CONVERT = """
import hashlib, sys
from pathlib import Path
from pico import build_model, build_tokenizer
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.convert.prepare import prepare
from moefy.config.recipe import build
place, text, *families = sys.argv[1:]
few = {"tokens": 512, "sequence_length": 64, "calibration": text}
for family in families:
    model, out = Path(place) / family, Path(place) / "moe" / family
    build_model(model, family, {})
    build_tokenizer(model)
    convert(prepare(build(None, {"model": str(model), **few}, [])), out, Attempt(keep=False))
    print(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
"""


LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
"""Whose next version may compute other last bits."""


def digests(text: Path, place: Path, families: list[str]) -> dict[str, str]:
    """SHA-256 of tiny models of some families, made and converted in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(place), str(text), *families],
        capture_output=True,
        text=True,
        cwd=GOLDEN.parent,
        env=os.environ | GENERIC | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(families, done.stdout.split(), strict=True))


def test_golden_digests(text, tmp_path):
    """The bytes of two conversions, by platform and versions, on one of the processors known.

    A change of these numbers is a change of results, and is to be told as one. With versions that
    are not in the file, two runs are compared with each other instead, and a warning says what to
    add to it.
    """
    versions = [f"{name} {version(name).split('+')[0]}" for name in LIBRARIES]
    key = ", ".join([f"{platform.system()} {platform.machine()}", *versions])
    families = ["llama", "qwen3"]
    found = digests(text, tmp_path / "once", families)
    golden = json.loads(GOLDEN.read_text()).get(key)
    if golden is None:
        warnings.warn(f"no golden digests of {key}: {json.dumps(found)}", stacklevel=1)
        golden = {"this one": digests(text, tmp_path / "twice", families)}
    assert found in golden.values()
