"""Kill a moefy command again and again at random moments, and see that it ends with the same bytes.

    python benchmarks/kill.py --kills 100 --place DIR -- convert MODEL OUT --calibration FILE

The word OUT stands for the folder that the command writes. The command is run once undisturbed;
then it is started, killed (SIGKILL) after a random delay of up to the time that it took, started
again, and so on until it ends by itself. Whenever it was killed, nothing may be named OUT; whenever
it ends, OUT must hold the files of the undisturbed run, byte for byte. Of JSON, what is measured
(seconds, memory) is not compared, and Markdown drawn from it not at all.

Libraries are imported once, and every attempt is forked from there, so that no kill is wasted on
the seconds that imports take. A fine-tune takes

    --state '.out.moefy-finetune/checkpoint-*' --again --resume -- finetune RUN --out OUT ...
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer

MEASURED = {"seconds", "peak_resident_bytes", "peak_bytes", "tokens_per_second", "created"}
"""Keys of JSON objects that no two runs share."""


def main(
    command: list[str] = typer.Argument(..., help="A moefy command, with the word OUT in it."),
    place: Path = typer.Option(..., help="Folder to work in; made, and removed at the end."),
    kills: int = 100,
    seed: int = 0,
    state: str = typer.Option(
        ".out.moefy-part/state/*", help="What a killed attempt may leave to go on from."
    ),
    again: list[str] = typer.Option([], help="Word to add where there is such a state."),
) -> None:
    """Kill, resume, compare; print one line a chain and a summary."""
    import transformers  # noqa: F401

    import moefy.cli.convert
    import moefy.convert  # noqa: F401

    place.mkdir(parents=True)
    dice = random.Random(seed)
    start = time.perf_counter()
    status = attempt(command, place / "reference", None)
    took = time.perf_counter() - start
    if status:
        raise SystemExit(f"the undisturbed command ended with {status}")
    expected = contents(place / "reference")
    print(f"undisturbed: {took:.2f} s, {len(expected)} files", flush=True)
    done = chains = resumed = 0
    while done < kills:
        out, killed = place / "out", 0
        more: list[str] = []
        while (status := attempt(command + more, out, dice.uniform(0, took))) == -signal.SIGKILL:
            killed += 1
            assert not out.exists(), f"{out} is there though the command was killed"
            more = again if any(place.glob(state)) else []
            resumed += any(place.glob(state))
        if status:
            raise SystemExit(f"the command ended with {status} after {killed} kills")
        wrong = different(expected, contents(out))
        assert not wrong, f"after {killed} kills these differ: {wrong}"
        leftover = [path.name for path in place.iterdir() if path.name not in ("out", "reference")]
        assert not leftover, leftover
        shutil.rmtree(out)
        done, chains = done + killed, chains + 1
        print(f"{done} kills, {chains} runs to the end, all of the same bytes", flush=True)
    print(
        f"{done} kills, of which {resumed} left a state to go on from; {chains} runs ended, all "
        "with the bytes of the undisturbed one; nothing was named OUT in between"
    )
    shutil.rmtree(place)


def attempt(command: list[str], out: Path, delay: float | None) -> int:
    """Run the command in a process of its own, killed after a delay; give how that ended."""
    child = os.fork()
    if not child:
        sys.argv = ["moefy", *(str(out) if word == "OUT" else word for word in command), "--quiet"]
        from moefy.cli import main

        try:
            main()
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, Any]:
    """Files by name: their bytes, or what their JSON says less what is measured."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = unmeasured(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [unmeasured(json.loads(line)) for line in lines]
        elif path.is_file():
            found[name] = path.name if path.suffix == ".md" else path.read_bytes()
    return found


def unmeasured(value: Any) -> Any:
    """JSON without the keys of what is measured."""
    if isinstance(value, dict):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def different(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of files that are not the same."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


if __name__ == "__main__":
    typer.run(main)
