"""Where a conversion writes: disks that are full or closed, odd names, odd surroundings; and a
result that is not what was computed.

A small file system is made where this may mount one (as root), else by a limit on file sizes or by
permissions.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moefy import memory
from moefy.config.recipe import build, read
from moefy.convert import forward
from moefy.convert import memory as convert_memory
from moefy.convert.prepare import Job, prepare
from moefy.convert.run import convert
from moefy.errors import MoefyError
from moefy.files import lock
from moefy.files.publish import STATE, place_of

SINGLE = "model.safetensors"
FEW = {"tokens": 512, "sequence_length": 64}


@pytest.fixture
def a_job(pico, text) -> Callable[..., Job]:
    """`a_job(model)`: a conversion of a tiny model on few tokens."""

    def job(model: Path | None = None, **recipe: Any) -> Job:
        options = {"model": str(model or pico("llama")), "calibration": str(text), **FEW, **recipe}
        return prepare(build(None, options, []))

    return job


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """`disk(*options)`: a file system of its own, empty; skipped where none can be mounted."""
    places: list[Path] = []

    def mount(*options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "moefy-test", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def refused(code: int, job: Job, out: Path, *says: str, **options: Any) -> None:
    with pytest.raises(MoefyError) as caught:
        convert(job, out, **options)
    assert caught.value.code == code, caught.value
    assert [part for part in says if part not in str(caught.value)] == [], caught.value
    assert not out.exists()


def listing(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


# --- disks ---------------------------------------------------------------------------------------


def test_a_disk_that_fills_up(disk, a_job, converted, pico):
    place, job = disk("size=2m"), a_job()
    filler = place / "filler"

    def fill(stage: str, *_: int) -> None:
        if stage.startswith("layer 1") and not filler.exists():
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass

    refused(5, job, place / "out", "No space left", "run the same command again", watch=fill)
    assert (place_of(place / "out") / STATE).is_dir()
    filler.unlink()
    seen: list[str] = []
    convert(job, place / "out", watch=lambda stage, *_: seen.append(stage))
    assert not any(stage.startswith("layer 0") for stage in seen)
    assert os.listdir(place) == ["out"]
    assert (place / "out" / SINGLE).read_bytes() == (converted(pico("llama")) / SINGLE).read_bytes()


def test_a_disk_that_is_too_small(disk, a_job):
    place = disk("size=300k")
    refused(5, a_job(), place / "out", "free", "choose another OUT")
    assert os.listdir(place) == []


def test_no_inodes_are_left(disk, a_job):
    place = disk("size=4m", "nr_inodes=6")
    refused(5, a_job(), place / "out", "No space left")
    assert os.listdir(place) == []


def test_what_holds_the_room_is_told(disk, a_job):
    place = disk("size=300k")
    held = place / ".other.moefy-part" / "state"
    held.mkdir(parents=True)
    (held / "states-0.safetensors").write_bytes(b"x" * 100_000)
    refused(5, a_job(), place / "out", ".other.moefy-part (0.0 GB)")
    assert os.listdir(place) == [".other.moefy-part"]


def test_a_disk_that_is_read_only(disk, a_job):
    """Told before any work: nothing has been read, tokenised or computed."""
    place = disk("ro")
    seen: list[str] = []
    watch = lambda stage, *_: seen.append(stage)  # noqa: E731
    refused(5, a_job(), place / "out", "cannot write beside", "Read-only", watch=watch)
    refused(5, a_job(), place / "new" / "out", "cannot write beside", watch=watch)
    assert seen == [] and os.listdir(place) == []


def test_an_empty_disk_is_no_folder_to_replace(disk, a_job):
    place = disk("size=4m")
    before = os.listdir(place.parent)
    with pytest.raises(MoefyError, match="mount point") as caught:
        convert(a_job(), place)
    assert caught.value.code == 5
    assert os.listdir(place.parent) == before and os.listdir(place) == []


def test_a_link_in_the_place_of_what_is_unfinished(a_job, tmp_path):
    """What lies behind it is not ours to fill or to remove."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("mine")
    place_of(tmp_path / "out").symlink_to(tmp_path / "precious")
    refused(5, a_job(), tmp_path / "out", "is a link")
    assert os.listdir(tmp_path / "precious") == ["thesis.tex"]


# --- locks ---------------------------------------------------------------------------------------


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There the lock file itself is the lock: its owner's process may not be alive."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    file, what = tmp_path / "place" / "lock", tmp_path / "out"
    host = socket.gethostname()
    with lock.locked(file, what):
        assert file.read_text() == f"process {os.getpid()} on {host}"
        with pytest.raises(MoefyError, match=f"process {os.getpid()} on") as caught:
            with lock.locked(file, what):
                pass
        assert caught.value.code == 5
    dead = subprocess.Popen(["true"])
    dead.wait()
    for text in (f"process {dead.pid} on {host}", "", "{", "[]"):
        file.write_text(text)
        with lock.locked(file, what):
            pass
    file.write_text(f"process {dead.pid} on elsewhere")
    with pytest.raises(MoefyError, match="on elsewhere"), lock.locked(file, what):
        pass


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path):
    """Whoever waited for the folder of a run that has ended must not share it with a third."""
    file, what = tmp_path / "place" / "lock", tmp_path / "out"
    flock = fcntl.flock
    removed = []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append(shutil.rmtree(file.parent))  # the other run ends here
        flock(handle, how)

    fcntl.flock = late
    try:
        with lock.locked(file, what):
            assert removed and file.exists()
            with pytest.raises(MoefyError, match="is writing"), lock.locked(file, what):
                pass
    finally:
        fcntl.flock = flock


# --- memory --------------------------------------------------------------------------------------


def test_a_machine_that_is_too_small(a_job, tmp_path, monkeypatch):
    for module in (memory, convert_memory):
        monkeypatch.setattr(module, "available", lambda: 10**8)
    refused(5, a_job(), tmp_path / "out", "GB of memory, there are 0.1 GB", "--tokens")
    assert os.listdir(tmp_path) == []


def test_limits_of_control_groups_count(tmp_path, monkeypatch):
    """Of all groups that the process is in, the smallest."""
    own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].split("\n")[0]
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    machine = memory.available()
    folder = tmp_path / own / "x"
    folder.mkdir(parents=True)
    (folder.parent / "memory.max").write_text("max\n")
    assert memory.available() == machine
    (folder.parent / "memory.max").write_text("123456789\n")
    assert memory.available() == 123456789
    (tmp_path / "memory.max").write_text("1234567\n")
    assert memory.available() == 1234567


def test_a_gpu_with_no_room_for_a_batch_takes_halves(a_job, tmp_path, monkeypatch):
    """What a GPU would raise is raised here; halves of a batch give what the batch gives."""
    job = a_job()
    ids_BT = torch.randint(1, 128, (8, 16), generator=torch.Generator().manual_seed(0))

    def tapped() -> tuple[torch.Tensor, torch.Tensor]:
        states_BTD = forward.embed(job.checkpoint, job.family, ids_BT, job.device)
        x_TD, *_ = forward.tap(job.checkpoint, job.family, 0, states_BTD)
        return x_TD, states_BTD

    expected = tapped()
    seen, rows = [], [4]
    one_layer = forward._one_layer

    def small(*arguments: Any) -> Any:
        model, *rest = one_layer(*arguments)

        def run(module: Any, args: Any, kwargs: Any) -> None:
            seen.append(len(kwargs["inputs_embeds"]))
            if seen[-1] >= rows[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(run, with_kwargs=True)
        return model, *rest

    monkeypatch.setattr(forward, "_one_layer", small)
    for ours, theirs in zip(tapped(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert seen == [4, 2, 2, 4, 2, 2]
    rows[0] = 1
    with pytest.raises(torch.OutOfMemoryError):
        tapped()


# --- a result that is not what was computed ------------------------------------------------------


def dropped(part: Path) -> None:
    tensors = load_file(part / SINGLE)
    tensors.pop("model.layers.1.mlp.gate.weight")
    save_file(tensors, part / SINGLE, metadata={"format": "pt"})


def changed(part: Path) -> None:
    tensors = load_file(part / SINGLE)
    tensors["model.layers.0.mlp.shared_expert.down_proj.weight"] *= -1
    save_file(tensors, part / SINGLE, metadata={"format": "pt"})


def reconfigured(part: Path) -> None:
    file = part / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_experts_per_tok": 3}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (dropped, "does not load cleanly"),
        (changed, "other hidden states"),
        (reconfigured, "other hidden states"),
    ],
)
def test_a_result_that_checks_itself_and_fails(damage, says, a_job, tmp_path, monkeypatch):
    from moefy.convert import write as output

    write = output.write_folder

    def damaged(job: Job, part: Path) -> None:
        write(job, part)
        damage(part)

    monkeypatch.setattr(output, "write_folder", damaged)
    refused(6, a_job(), tmp_path / "out", says)
    assert os.listdir(tmp_path) == []


# --- names and surroundings ----------------------------------------------------------------------

ODD = "my model\nof 😀 größe"


def test_odd_names_in_an_ascii_world(pico, text, converted, tmp_path):
    """Spaces, line breaks and emoji in every path, and a locale that knows ASCII alone."""
    model = shutil.copytree(pico("llama"), tmp_path / ODD / "dense")
    words = Path(shutil.copy(text, tmp_path / ODD / "words ✓.txt"))
    out = tmp_path / ODD / "out put ✓"
    command = [sys.executable, "-m", "moefy", "convert", str(model), str(out)]
    command += ["--calibration", str(words), "--tokens", "512", "--sequence-length", "64"]
    ascii_world = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LANG": "C"}
    env = os.environ | ascii_world | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / SINGLE).read_bytes() == (converted(pico("llama")) / SINGLE).read_bytes()
    assert sorted(os.listdir(out.parent)) == ["dense", "out put ✓", "words ✓.txt"]
    summary = json.loads((out / "moefy" / "conversion.json").read_text(encoding="utf-8"))
    assert summary["calibration"]["source"] == str(words)
    assert read(out / "moefy" / "recipe.toml")["model"] == str(model)
    assert str(out).replace("\n", "") in done.stdout.decode().replace("\n", "")
    refused = subprocess.run([*command, "--quiet"], capture_output=True, env=env, timeout=300)
    assert refused.returncode == 2 and refused.stderr.count(b"\n") == 1


def test_nothing_is_written_elsewhere_and_no_clock_is_trusted(a_job, converted, pico, tmp_path):
    """No file outside of OUT's own folder: /tmp may be full. Time may run backwards."""
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    job = a_job()
    child = os.fork()
    if not child:
        code = 1
        with log.open("w") as seen:

            def audit(event: str, arguments: tuple[Any, ...]) -> None:
                if event == "open" and isinstance(arguments[0], str | bytes):
                    if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                        print(os.fsdecode(arguments[0]), file=seen, flush=True)

            sys.addaudithook(audit)
            times = iter(range(10**9, 0, -3600))
            time.time = lambda: float(next(times))
            with contextlib.suppress(BaseException):
                convert(job, place / "out")
                code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    written = [line for line in log.read_text().splitlines() if line != os.devnull]
    assert written and [path for path in written if not path.startswith(str(place))] == []
    assert (place / "out" / SINGLE).read_bytes() == (converted(pico("llama")) / SINGLE).read_bytes()


def test_the_hidden_folder_has_the_mode_of_the_umask(a_job, tmp_path):
    """What is unfinished is not for others to read where OUT will not be."""
    before = os.umask(0o077)
    modes: dict[str, int] = {}

    def look(stage: str, *_: int) -> None:
        if stage.startswith("layer 1"):
            place = place_of(tmp_path / "out")
            modes.update({str(p): p.stat().st_mode & 0o777 for p in (place, *place.rglob("*"))})

    try:
        convert(a_job(), tmp_path / "out", watch=look)
    finally:
        os.umask(before)
    assert len(modes) > 8
    assert {mode & 0o077 for mode in modes.values()} == {0}


def test_signals_are_handed_back(tmp_path):
    """A command run inside another program leaves its handlers as they were."""
    from moefy.cli.signals import STOPPING, interruptible

    before = [signal.getsignal(number) for number in STOPPING]
    with interruptible():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1
