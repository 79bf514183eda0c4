"""Kill a moefy command again and again at random moments, and see that it ends with the same bytes.

    python recipes/benchmarks/kill.py --kills 100 --place DIR -- convert MODEL OUT --calibration F

The word OUT stands for the folder that the command writes. The command is run once undisturbed;
then it is started, killed (SIGKILL) after a random part of the processor time that it took, started
again, and so on until OUT is there. (Processor time, because on a busy machine nothing ends in the
seconds that it took at first.) Whenever something is named OUT, because the command has ended or
was killed behind the publication, it must hold the files of the undisturbed run, byte for byte. Of
JSON, what is measured (seconds, memory) is not compared, and Markdown drawn from it not at all.

The command is run in this process first, which then has imported all that it takes, and every
attempt is forked from there: no kill is wasted on the seconds that imports take. A fine-tune takes

    --state '.out.moefy-finetune/checkpoint-*' -- finetune RUN --out OUT ...

With `--processes 2` the command runs in two processes with the variables that `torchrun` sets. When
the time has come one of them is killed, and half a second later at most the other.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # the others outlive no fork

import importlib
import json
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import records
import typer

from moefy.environment import processor

MEASURED = {"seconds", "stage_seconds", "peak_resident_bytes", "peak_bytes", "tokens_per_second"}
MEASURED |= {"created", "memory", "moefy/finetune.jsonl"}
"""Keys of JSON objects that no two runs share; the last is of the digest of a log."""


def main(
    command: list[str] = typer.Argument(..., help="A moefy command, with the word OUT in it."),
    place: Path = typer.Option(..., help="Folder to work in; made, and removed at the end."),
    kills: int = 100,
    seed: int = 0,
    state: str = typer.Option(
        ".out.moefy-part/state/*", help="What a killed attempt may leave to go on from."
    ),
    processes: int = 1,
    record: Path | None = typer.Option(None, "--out", help="File that gets a line of the figures."),
) -> None:
    """Kill, resume, compare; print one line a chain and a summary."""
    place.mkdir(parents=True)
    dice = random.Random(seed)
    if processes > 1:
        importlib.import_module("moefy.finetune.run")
    elif status := run(command, place / "out"):
        raise SystemExit(f"the command ended with {status}")
    shutil.rmtree(place / "out", ignore_errors=True)
    status = attempt(command, place / "reference", processes, None, dice)
    took = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    if status:
        raise SystemExit(f"the undisturbed command ended with {status}")
    expected = contents(place / "reference")
    print(f"undisturbed: {took:.2f} s of {processor()}; {len(expected)} files", flush=True)
    done = chains = resumed = late = 0
    while done < kills:
        out, killed = place / "out", 0
        while (
            status := attempt(command, out, processes, dice.uniform(0, took), dice)
        ) == -signal.SIGKILL:
            killed += 1
            if out.exists():  # killed between the publication and its end
                late += 1
                break
            resumed += any(place.glob(state))
        if status > 0:
            raise SystemExit(f"the command ended with {status} after {killed} kills")
        wrong = different(expected, contents(out))
        assert not wrong, f"after {killed} kills these differ: {wrong}"
        leftover = [path for path in place.iterdir() if path.name not in ("out", "reference")]
        assert status or not leftover, leftover
        for path in (out, *leftover):
            shutil.rmtree(path)
        done, chains = done + killed, chains + 1
        print(f"{done} kills, {chains} runs to the end, all of the same bytes", flush=True)
    print(
        f"{done} kills, of which {resumed} left a state to go on from and {late} came behind the "
        f"publication; {chains} runs were published, all with the bytes of the undisturbed one"
    )
    shutil.rmtree(place)
    if record:
        figures = {"command": " ".join(command), "processes": processes, "seed": seed}
        figures |= {"processor": processor(), "undisturbed_seconds": took, "kills": done}
        figures |= {"resumed": resumed, "late": late, "published": chains}
        records.append(record, figures)


def run(command: list[str], out: Path) -> int:
    """Run the command in this process; give its exit code."""
    from moefy.cli import main

    sys.argv = ["moefy", *(str(out) if word == "OUT" else word for word in command), "--quiet"]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    return 99


def attempt(
    command: list[str], out: Path, processes: int, budget: float | None, dice: random.Random
) -> int:
    """Run the command in processes of its own, killed when they have spent their budget of
    processor seconds; give how that ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(command, out, rank, processes, port) for rank in range(processes)]
    left, codes = list(children), []
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if left and len(left) == processes and budget is not None:
            if sum(map(spent, left)) >= budget:
                dice.shuffle(left)
                os.kill(left[0], signal.SIGKILL)
                time.sleep(dice.uniform(0, 0.5) * (processes > 1))
                for child in left[1:]:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return -signal.SIGKILL if -signal.SIGKILL in codes else max(codes)


def fork(command: list[str], out: Path, rank: int, processes: int, port: int) -> int:
    """Start the command in a process of its own, one of several as `torchrun` starts them."""
    if child := os.fork():
        return child
    if processes > 1:
        count = str(processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        os.environ.update(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_PORT=str(port))
    os._exit(run(command, out))


def spent(process: int) -> float:
    """Processor seconds that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def contents(folder: Path) -> dict[str, Any]:
    """Files by name: their bytes, or what their JSON says less what is measured."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            files[name] = unmeasured(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            files[name] = [unmeasured(json.loads(line)) for line in lines]
        elif path.is_file():
            files[name] = path.name if path.suffix == ".md" else path.read_bytes()
    return files


def unmeasured(value: Any) -> Any:
    """JSON without the keys of what is measured."""
    if isinstance(value, dict):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def different(expected: dict[str, Any], files: dict[str, Any]) -> list[str]:
    """Names of files that are not the same."""
    names = expected.keys() | files.keys()
    return sorted(name for name in names if expected.get(name) != files.get(name))


if __name__ == "__main__":
    typer.run(main)
