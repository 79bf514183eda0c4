"""Rows 33 to 47 of the fault matrix: places, disks, signals, memory, states, fine-tunes, reports.

What cannot be done from without (a signal at a certain layer, a disk that fills up there) is done
in a forked process just before the command starts in it.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fault_cases import FEW, Case, Done, Place, sentence
from safetensors.torch import load_file, save_file

from moefy import cli
from moefy.files.lock import locked
from moefy.files.publish import STATE, place_of

LIMIT = 300
"""Seconds after which a command counts as hung."""


def forked(before: Callable[[], object], *arguments: object) -> Done:
    """The command line in a process of its own, in which `before` is called first."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            signal.alarm(LIMIT)
            with open(os.devnull) as nothing:
                for stream, number in ((nothing, 0), (out, 1), (err, 2)):
                    os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            sys.argv = ["moefy", *map(str, arguments)]
            code = 1
            try:
                before()
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return Done(code, out.read().decode(), err.read().decode())


def converting(place: Place, before: Callable[[], object], *flags: object) -> Done:
    text = ("--calibration", place.text)
    return forked(before, "convert", place.model, place.out, *FEW, *text, *flags, "--quiet")


def at(stage: str, act: Callable[[], object]) -> Callable[[], None]:
    """A change of the command by which it acts where a stage begins."""

    def change() -> None:
        import moefy.progress

        @contextlib.contextmanager
        def watching(*, quiet: bool) -> Iterator[Callable[..., None]]:
            yield lambda now, *_: act() if now.startswith(stage) else None

        moefy.progress.watching = watching  # pyright: ignore[reportAttributeAccessIssue]

    return change


def nothing(*_: object) -> None:
    """No more than there is."""


def case(
    name: str,
    words: str,
    says: tuple[str, ...],
    code: int,
    act: Callable[[Place], Done],
    arrange: Callable[[Place], object] = nothing,
    leaves: tuple[str, ...] = (),
    elsewhere: str = "",
) -> Case:
    return Case(name, words, says, code, arrange, act, leaves=leaves, elsewhere=elsewhere)


def plain(place: Place) -> Done:
    return place.convert()


# --- 33 to 35: where it is written ---------------------------------------------------------------


def file_in_place(place: Place) -> None:
    place.out.write_text("mine")


def others_in_place(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("mine")


def run_in_place(place: Place) -> None:
    (place.out / "moefy").mkdir(parents=True)
    (place.out / "moefy" / "conversion.json").write_text("{}")


def link_in_place(place: Place) -> None:
    (place.root / "elsewhere").mkdir()
    place.out.symlink_to(place.root / "elsewhere")


def converted(place: Place) -> None:
    done = place.convert()
    assert done.code == 0, done


def to(*parts: str) -> Callable[[Place], Done]:
    """Convert to another OUT."""

    def act(place: Place) -> Done:
        text = ("--calibration", place.text)
        return place.run("convert", place.model, Path(place.root, *parts), *FEW, *text, "--quiet")

    return act


def twice(place: Place) -> Done:
    """Replace a run by one of another seed."""
    before = (place.out / "model.safetensors").read_bytes()
    done = place.convert("--force", "--seed", "3")
    same = (place.out / "model.safetensors").read_bytes() == before
    return Done(done.code, done.out, done.err or f"replaced: {not same}")


def no_larger_files() -> None:
    """Every write from now on fails as one past a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))


def small_disk() -> None:
    import shutil

    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=10_000)


def read_only(place: Place) -> Done:
    """Needs the right to mount, as root has it."""
    disk = place.root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "moefy-test", str(disk)], check=True)
    try:
        return to("disk", "out")(place)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KEPT = (".out.moefy-part",)
CASES = [
    case("33 OUT is a file", "a file named OUT", ("OUT", "file"), 2, plain, file_in_place),
    case(
        "33 OUT is a file, with --force",
        "a file named OUT; --force",
        ("OUT", "file"),
        2,
        lambda place: place.convert("--force"),
        file_in_place,
    ),
    case("33 OUT is a run", "a run in OUT", ("exists already", "--force"), 2, plain, run_in_place),
    case(
        "33 MODEL is a file",
        "a file named as MODEL",
        ("text.txt is a file",),
        3,
        lambda place: place.run("convert", place.text, place.out, "--quiet"),
    ),
    case(
        "33 MODEL is not there",
        "no such MODEL",
        ("no such folder",),
        3,
        lambda place: place.run("convert", place.root / "none", place.out, "--quiet"),
    ),
    case(
        "33 OUT is full", "files in OUT", ("exists already", "--force"), 2, plain, others_in_place
    ),
    case(
        "33 OUT is others'",
        "files in OUT that moefy did not write; --force",
        ("did not write",),
        2,
        lambda place: place.convert("--force"),
        others_in_place,
    ),
    case("33 OUT is a link", "OUT links to a folder", ("link",), 2, plain, link_in_place),
    case("33 OUT is MODEL", "MODEL given twice", ("OUT",), 2, to("model")),
    case("33 OUT in MODEL", "OUT below MODEL", ("lies inside MODEL",), 2, to("model", "out")),
    case(
        "33 OUT replaced",
        "a run in OUT; --force --seed 3",
        ("replaced: True",),
        0,
        twice,
        converted,
        leaves=("out",),
    ),
    case(
        "34 read-only",
        "OUT on a tmpfs mounted read-only",
        ("cannot write beside", "Read-only"),
        5,
        read_only,
        leaves=("disk",),
        elsewhere="test_places",
    ),
    case("34 below a file", "OUT below a file", ("cannot write beside",), 5, to("text.txt", "out")),
    case("34 long name", "OUT of 300 letters", ("too long",), 5, to("x" * 300)),
    case(
        "35 too little room",
        "10 kB free, as the system tells it",
        ("GB free", "choose another OUT"),
        5,
        lambda place: converting(place, small_disk),
    ),
    case(
        "35 full at once",
        "no file may grow past 4,000 bytes (RLIMIT_FSIZE)",
        ("File too large",),
        5,
        lambda place: converting(place, no_larger_files),
    ),
    case(
        "35 full at layer 1",
        "no file may grow past 4,000 bytes from layer 1 on",
        ("File too large", "run the same command again"),
        5,
        lambda place: converting(place, at("layer 1", no_larger_files)),
        leaves=KEPT,
    ),
]


# --- 36 to 39: how it is stopped -----------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(place: Place) -> Done:
    """Kill at layer 1, then run the same command again."""
    first = converting(place, at("layer 1", die))
    assert first.code == -signal.SIGKILL and not place.out.exists()
    kept = place_of(place.out) / STATE
    assert kept.is_dir() and not list(kept.parent.rglob("config.json"))
    seen: list[str] = []
    done = place.run(
        *("convert", place.model, place.out, *FEW, "--calibration", place.text, "--quiet")
    )
    other = place.root.parent / "whole"
    clean = place.run("convert", place.model, other, *FEW, "--calibration", place.text, "--quiet")
    assert clean.code == 0, seen
    files = [name.read_bytes() for name in (place.out / SINGLE, other / SINGLE)]
    return Done(done.code, "", done.err or f"same bytes as undisturbed: {files[0] == files[1]}")


SINGLE = "model.safetensors"


def all_memory() -> None:
    bytearray(1 << 60)


def no_room_on_the_gpu() -> None:
    """Batches of more than one sequence raise what a GPU that is full raises."""
    from moefy.convert import forward

    one_layer = forward._one_layer

    def small(*arguments):
        model, *rest = one_layer(*arguments)

        def run(module, args, kwargs):
            if len(kwargs["inputs_embeds"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(run, with_kwargs=True)
        return model, *rest

    forward._one_layer = small


def no_room_at_all() -> None:
    from moefy.convert import forward

    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward._one_layer = none


CASES += [
    case(
        "36 kill -9",
        "SIGKILL at layer 1; then the same command again",
        ("same bytes as undisturbed: True",),
        0,
        killed,
        leaves=("out",),
    ),
    *[
        case(
            f"37 {number.name}",
            f"{number.name} at layer 1",
            ("interrupted; 1 layers are kept", "run the same command again"),
            130,
            lambda place, number=number: converting(
                place, at("layer 1", lambda: signal.raise_signal(number))
            ),
            leaves=KEPT,
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ],
    case(
        "37 early SIGINT",
        "SIGINT while weights are checked",
        ("interrupted; nothing was written",),
        130,
        lambda place: converting(
            place, at("check weights", lambda: signal.raise_signal(signal.SIGINT))
        ),
    ),
    case(
        "38 memory",
        "2**60 bytes asked for at layer 1",
        ("out of memory", "--tokens"),
        5,
        lambda place: converting(place, at("layer 1", all_memory)),
        leaves=KEPT,
    ),
    case(
        "39 no GPU",
        "--device cuda:7",
        ("CUDA devices found",),
        5,
        lambda place: place.convert("--device", "cuda:7"),
    ),
    case(
        "39 GPU too small for a batch",
        "OutOfMemoryError planted for batches of more than one sequence",
        (),
        0,
        lambda place: converting(place, no_room_on_the_gpu),
        leaves=("out",),
    ),
    case(
        "39 GPU too small for a sequence",
        "OutOfMemoryError planted for every batch",
        ("out of memory",),
        5,
        lambda place: converting(place, no_room_at_all),
        leaves=KEPT,
    ),
]


# --- 40 to 42, 46: fine-tunes and reports --------------------------------------------------------

SMALL = "--tokens 2048 --sequence-length 64 --batch-size 4 --set validation_tokens=512".split()


def tuned(*flags: str, before: Callable[[], object] = nothing) -> Callable[[Place], Done]:
    def act(place: Place) -> Done:
        where = ("--out", place.root / "tuned", "--data", place.text)
        return forked(before, "finetune", place.out, *where, *SMALL, *flags, "--quiet")

    return act


def collapsing(place: Place) -> Done:
    """Routers that learn far too fast."""
    wild = (
        "router_learning_rate=0.05 router_gradient=chosen guard_steps=8 router_z=0.0 tokens=16384 "
    )
    wild += "save_every=4 balance_weight=0.0 balance=none guard_restarts=8 learning_rate=3e-3"
    flags = [part for setting in wild.split() for part in ("--set", setting)]
    done = tuned(*flags)(place)
    if done.code:
        return done
    import json

    told = json.loads((place.root / "tuned" / "moefy" / "finetune.json").read_text())
    return Done(0, "", f"{told['guard'][0]['reason']}: {told['guard'][0]['action']}")


def no_balancing() -> None:
    """Take the balancing loss away."""
    from moefy.finetune import losses

    losses.LOSSES = tuple(loss for loss in losses.LOSSES if loss.name != "aux")


def reported(*flags: str) -> Callable[[Place], Done]:
    def act(place: Place) -> Done:
        few = "--tokens 128 --sequence-length 64 --quick --no-controls".split()
        where = ("report", place.out, "--text", place.text)
        done = place.run(*where, *few, *flags)
        said = [line for line in done.out.splitlines() if "not run" in line.lower()]
        return Done(done.code, "", done.err.splitlines()[-1] if done.code else "\n".join(said))

    return act


CASES += [
    case(
        "40 loss not finite",
        "moefy finetune --learning-rate 1e20",
        ("loss",),
        6,
        tuned("--learning-rate", "1e20", "--set", "rest_learning_rate=1e20"),
        converted,
        leaves=(".tuned.moefy-finetune",),
        elsewhere="test_finetune",
    ),
    case(
        "41 router collapse",
        "moefy finetune with routers that learn at 0.05 and no balance",
        ("experts of MoE layer", "switch balancing"),
        0,
        collapsing,
        converted,
        leaves=("tuned",),
        elsewhere="test_finetune",
    ),
    case(
        "42 balancing loss missing",
        "a class whose balancing loss is not computed (planted)",
        ("first step is missing",),
        6,
        tuned(before=no_balancing),
        converted,
        leaves=(".tuned.moefy-finetune",),
        elsewhere="test_finetune",
    ),
    case(
        "46 task that is not there",
        "moefy report --tasks no_such_task",
        ("no_such_task",),
        2,
        reported("--tasks", "no_such_task"),
        converted,
        leaves=("out",),
        elsewhere="test_measure",
    ),
    case(
        "46 task that cannot be fetched",
        "moefy report --tasks piqa --limit 4 offline",
        ("piqa",),
        0,
        reported("--tasks", "piqa", "--limit", "4"),
        converted,
        leaves=("out",),
        elsewhere="test_measure",
    ),
]


# --- 43 to 45, 47: states, locks, self-checks, surroundings --------------------------------------


def stopped(place: Place) -> None:
    first = converting(place, at("layer 1", die))
    assert first.code == -signal.SIGKILL


def stopped_and_cut(place: Place) -> None:
    stopped(place)
    file = place_of(place.out) / STATE / "facts.json"
    file.write_bytes(file.read_bytes()[:100])


def other_text(place: Place) -> None:
    stopped(place)
    place.text.write_text("\n\n\n".join(map(sentence, range(100))))


def locked_out(place: Place) -> Done:
    with locked(place_of(place.out) / "lock", place.out):
        return place.convert()


def wrong_result() -> None:
    """Change the sign of a matrix in the folder that is about to be published."""
    from moefy.convert import write as output

    write = output.write_folder

    def damaged(job, part) -> None:
        write(job, part)
        tensors = load_file(part / SINGLE)
        tensors["model.layers.0.self_attn.o_proj.weight"] *= -1
        save_file(tensors, part / SINGLE, metadata={"format": "pt"})

    output.write_folder = damaged


ODD = "my model\nof 😀 größe"


def oddly_named(place: Place) -> Done:
    """Spaces, line breaks and emoji in every path, a locale of ASCII, and no /tmp."""
    folder = place.root / ODD
    command = ["convert", folder / "dense", folder / "out put ✓", *FEW]
    command += ["--calibration", folder / "words ✓.txt", "--quiet"]
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    env |= {"TMPDIR": "/nowhere", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "moefy", *map(str, command)],
        capture_output=True,
        env=env,
        timeout=LIMIT,
        umask=0o027,
    )
    made = folder / "out put ✓" / SINGLE
    mode = f"mode {made.stat().st_mode & 0o777:o}" if made.exists() else ""
    return Done(done.returncode, "", done.stderr.decode() or mode)


def oddly_placed(place: Place) -> None:
    folder = place.root / ODD
    folder.mkdir()
    place.model.rename(folder / "dense")
    (folder / "words ✓.txt").write_bytes(place.text.read_bytes())


CASES += [
    case(
        "43 state of another seed",
        "killed at layer 1; the command again with --seed 3",
        ("seed",),
        7,
        lambda place: place.convert("--seed", "3"),
        stopped,
    ),
    case(
        "43 state of another text",
        "killed at layer 1; another text of that name",
        ("calibration",),
        7,
        plain,
        other_text,
    ),
    case(
        "43 truncated state",
        "killed at layer 1; its facts.json cut after 100 bytes",
        ("--restart",),
        7,
        plain,
        stopped_and_cut,
    ),
    case(
        "44 two at once",
        "the lock of OUT is held by another command",
        (f"process {os.getpid()} on",),
        5,
        locked_out,
        leaves=KEPT,
    ),
    case(
        "45 self-check",
        "a matrix negated in the finished folder before it is checked",
        ("other hidden states",),
        6,
        lambda place: converting(place, wrong_result),
    ),
    case(
        "47 odd names, locale C, no /tmp",
        "spaces, a line break and emoji in paths; LC_ALL=C, TMPDIR=/nowhere, umask 027",
        ("mode 640",),
        0,
        oddly_named,
        oddly_placed,
        leaves=(ODD,),
        elsewhere="test_places",
    ),
]
