"""Tokens per second of a fine-tune against plain Trainer on the dense model, a step in turn each.

    python recipes/benchmarks/finetune_speed.py RUN --data TEXT [--steps 6]

Both in the dtype that a fine-tune computes in (`--set compute_dtype=...`), the same batches, AdamW,
CPU seconds of the process (a machine that does other things as well changes those less than the
clock). The teacher's expectations come from a file; the cost of computing them is printed beside.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import records
import torch
import typer
from torch.utils.data import StackDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moefy.config.finetune import build
from moefy.environment import processor
from moefy.finetune import teacher
from moefy.finetune.checkpoints import Checkpoints
from moefy.finetune.collapse_guard import CollapseGuard
from moefy.finetune.inputs import (
    compute_dtypes,
    load_student,
    load_teacher,
    open_run,
    teacher_folder,
    write_text,
)
from moefy.finetune.router_hooks import Routing
from moefy.finetune.text import read_text
from moefy.finetune.trainer import Finetuner, Setup, rows


class Clock(TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self.start)


def main(
    run: Path,
    data: str = typer.Option(...),
    steps: int = 5,
    batch_size: int = 2,
    settings: list[str] = typer.Option([], "--set"),
    out: Path | None = typer.Option(None, help="File that gets a line of the figures."),
) -> None:
    """Print CPU seconds per step of both, and the ratio of their medians."""
    text_of = {"data": data, "batch_size": batch_size, "tokens": batch_size * 512 * steps}
    built = build(None, {**text_of, "validation_tokens": 512, "guard_restarts": 0}, settings)
    parent = open_run(run)
    folder, _ = teacher_folder(parent, built)
    computed = compute_dtypes(parent, folder, built)
    print(f"{computed.student.name}, {processor()}")
    load = partial(load_teacher, folder, built, computed.student.dtype)
    write = partial(write_text, folder, built, computed.student.dtype)
    tokens = read_text(parent, built, 1, write, lambda *_: None)
    dense = load()
    ids_BT = tokens.ids_BT[:batch_size]
    live = teacher.live(dense, built)
    start = time.process_time()
    stored = live(torch.arange(batch_size), ids_BT)
    asked = time.process_time() - start
    dense.train().requires_grad_(True)
    train_BT = tokens.ids_BT[: -tokens.num_heldout]
    student = load_student(parent, built, computed.student.dtype)
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            optim="adamw_torch_fused",
        )
        labelled: dict[str, Any] = {"input_ids": train_BT, "labels": train_BT}
        plain = Trainer(dense, arguments, train_dataset=StackDataset(**labelled))
        setup = Setup(
            built,
            Routing(student, built),
            CollapseGuard(built),
            teacher.Teacher(lambda row_B, ids_BT: stored),
            Checkpoints(Path(place)),
        )
        ours = Finetuner(
            setup,
            model=student,
            args=arguments,
            train_dataset=rows(train_BT),
        )
        clocks = []
        for trainer in (plain, ours):
            trainer.remove_callback(PrinterCallback)
            clocks.append(Clock())
            trainer.add_callback(clocks[-1])
        rounds = [trainer_steps(trainer) for trainer in (plain, ours)]
        for _ in range(steps):
            for one in rounds:
                next(one, None)
    plain_s, ours_s = (statistics.median(clock.seconds[1:]) for clock in clocks)
    step = batch_size * 512
    print(f"plain Trainer, dense: {plain_s:.2f} s a step, {step / plain_s:.0f} tokens/CPU-second")
    print(f"moefy finetune:       {ours_s:.2f} s a step, {step / ours_s:.0f} tokens/CPU-second")
    print(f"ratio {plain_s / ours_s:.2f}; teacher at every step {plain_s / (ours_s + asked):.2f}")
    figures = {"run": run.name, "dtype": computed.student.name, "processor": processor()}
    figures |= {"threads": torch.get_num_threads(), "tokens_per_step": step}
    figures |= {"plain_seconds": clocks[0].seconds, "moefy_seconds": clocks[1].seconds}
    figures |= {"teacher_seconds": asked, "ratio": plain_s / ours_s}
    figures |= {"ratio_with_teacher": plain_s / (ours_s + asked)}
    if out:
        records.append(out, figures)
    print([[round(s, 2) for s in clock.seconds] for clock in clocks])


def trainer_steps(trainer: Trainer) -> Any:
    """Train in a thread of its own that stops after each step until it is asked for the next."""
    import threading

    ask, done = threading.Semaphore(0), threading.Semaphore(0)

    class Wait(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            ask.acquire()

    class Yield(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            done.release()

    # The clock between them, so that it runs in its own turn only.
    trainer.callback_handler.callbacks.insert(0, Wait())
    trainer.add_callback(Yield())
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()
    for _ in range(int(trainer.args.max_steps)):
        ask.release()
        done.acquire()
        yield
    thread.join()


if __name__ == "__main__":
    typer.run(main)
