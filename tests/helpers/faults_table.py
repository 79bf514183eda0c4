"""Print what every case of the fault matrix comes to.

    python tests/helpers/faults_table.py [ROW ...]

Each case runs the command line in a process of its own, on a copy of a tiny model. What is refused
before torch is imported is `python -m moefy` from its start; for the rest a process that has
imported everything is forked, so that the table does not take hours. Seconds are the command's.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pico
from fault_cases import CASES as MODELS
from fault_cases import Case, Done, Place
from run_cases import CASES as RUNS
from run_cases import LIMIT, forked, nothing

LINE = "| {} | {} | {} | {} | {} | {} | {:.1f} |"
HEADS = "| # | fault | how it was made | exit | message | left on disk | s |"
CASES = [*MODELS, *RUNS]


def command(*arguments: object) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "moefy", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def row(case: Case, whole: Path) -> tuple[str, list[str]]:
    """A line of the table, and what is not as it must be."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder) / "place"
        shutil.copytree(whole, root)
        place = Place(root, command if case.early else partial(forked, nothing))
        case.arrange(place)
        before = names(root)
        here = os.getcwd()
        os.chdir(root)
        start = time.perf_counter()
        done = case.act(place)
        seconds = time.perf_counter() - start
        os.chdir(here)
        after = names(root)
        said = done.err.strip().replace(f"{root}/", "").replace(str(root), ".")
    new = {name.split("/")[0] for name in after - before}
    wrong = [f"exit code {done.code}, expected {case.code}"] * (done.code != case.code)
    wrong += [f"does not say {part!r}" for part in case.says if part not in done.err]
    wrong += [f"left {name}" for name in new - {*case.leaves}]
    wrong += [f"lost {name}" for name in before - after]
    wrong += ["a traceback"] * ("Traceback" in done.err)
    left = "OUT, whole" if new == {"out"} else ", ".join(sorted(new)) or "nothing"
    cells = (case.name.partition(" ")[2], case.words, str(done.code), said, left)
    clean = (cell.replace("\n", "; ").replace("|", "\\|") for cell in cells)
    return LINE.format(case.row, *clean, seconds), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, help="Rows of the matrix. (default: all)")
    rows = parser.parse_args().rows
    chosen = [case for case in CASES if not rows or case.row in rows]
    faults = []
    for name in ("moefy.convert.run", "moefy.evaluate.run"):
        importlib.import_module(name)  # what commands import, before they are forked
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        pico.build_model(whole / "model", "llama", {})
        pico.build_tokenizer(whole / "model")
        pico.write_text(whole / "text.txt")
        print(HEADS)
        print("|" + " --- |" * 7)
        for case in sorted(chosen, key=lambda case: case.row):
            line, wrong = row(case, whole)
            print(line, flush=True)
            faults += [f"{case.name}: {what}" for what in wrong]
    print(f"\n{len(chosen)} cases of {len({case.row for case in chosen})} rows", file=sys.stderr)
    print(*faults, sep="\n", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
