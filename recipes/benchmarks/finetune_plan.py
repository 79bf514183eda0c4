"""What `moefy finetune --plan` says, and what the same fine-tune then takes.

    python recipes/benchmarks/finetune_plan.py RUN --data TEXT --out FILE --case '' \
        --case '--gradient-checkpointing' --case '--train lora' -- --tokens 4096

Every case is the options behind `--` and its own. Its plan and its fine-tune are commands of their
own, one behind the other; the latter's tokens per second are those it reports, and its memory is
the peak of the whole process. A case is a line of FILE. Other programs beside this one slow both.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import records
import typer

from moefy.environment import processor

MOEFY = [sys.executable, "-m", "moefy", "finetune"]


def main(
    run: Path,
    options: list[str] = typer.Argument(None, help="Options of all cases."),
    data: list[str] = typer.Option(...),
    out: Path = typer.Option(...),
    case: list[str] = typer.Option([""], help="Options of one case."),
) -> None:
    """Measure every case, and print a table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = [word for source in data for word in ("--data", source)]
    rows = []
    for more in case:
        command = [*MOEFY, str(run), *text, *(options or []), *shlex.split(more)]
        plan = json.loads(subprocess.check_output([*command, "--plan", "--json"]))
        row = {
            "run": run.name,
            "case": more,
            "processor": processor(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "tokens": plan["tokens"],
            "tokens_per_step": plan["tokens_per_step"],
            "planned": of_plan(plan),
            "measured": measured(command, out.parent),
        }
        records.append(out, row)
        rows.append(
            (
                more,
                *(row[kind]["tokens_per_second"] for kind in ("planned", "measured")),
                *(f"{row[kind]['memory_bytes'] / 1e9:.2f} GB" for kind in ("planned", "measured")),
            )
        )
    header = ("case", "tokens per second, planned", "measured", "memory, planned", "measured")
    print(records.table(header, rows))


def of_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of time and memory."""
    kept = ("tokens_per_second", "seconds", "memory_bytes", "memory_stage")
    return {key: plan[key] for key in kept}


def measured(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a fine-tune; give its speed, its seconds, and the peak of its process."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        result = Path(home) / "out"
        process = subprocess.Popen([*command, "--out", str(result), "--quiet"])
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"the fine-tune ended with {os.waitstatus_to_exitcode(status)}")
        report = json.loads((result / "moefy" / "finetune.json").read_text())
    return {
        "tokens_per_second": report["tokens_per_second"],
        "seconds": report["seconds"],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "memory_bytes": used.ru_maxrss * 1024,
        "dtype": report["compute"]["student"],
    }


if __name__ == "__main__":
    typer.run(main)
