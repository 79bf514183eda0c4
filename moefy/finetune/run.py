"""`moefy finetune`: from a run's folder to another run's folder."""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import PartialState

from moefy import __version__
from moefy.config.finetune import TABLE, Settings
from moefy.config.toml import render_table
from moefy.distributed import Group
from moefy.errors import MoefyError
from moefy.files import publish
from moefy.files.publish import check_free, file_digests, publishing, write_json
from moefy.finetune import losses, refit_after
from moefy.finetune.answers import Answerer, Answers
from moefy.finetune.checkpoints import Checkpoints, steps
from moefy.finetune.checks import check_machine
from moefy.finetune.heldout import measure
from moefy.finetune.home import (
    LOG,
    NOT_OF_A_RUN,
    SAVED,
    SEQUENCES,
    answers_of,
    append,
    check_shared,
    check_step,
    claim,
    home_of,
    open_home,
    read_log,
    rewind,
)
from moefy.finetune.inputs import (
    ComputeDtypes,
    Run,
    load_student,
    load_teacher,
    one_dtype,
    states_to_match,
    write_text,
)
from moefy.finetune.prepare import CHOICES, Opened, keep, open_inputs, processes, settle
from moefy.finetune.router_hooks import Routing
from moefy.finetune.teacher import Teacher, cache_name, cached, live, states
from moefy.finetune.text import read_text
from moefy.finetune.train import Callbacks, Student, Trained, sequences_per_step, train
from moefy.finetune.unrefitted import dense_folder, start_of
from moefy.finetune.write import check_checkpoint, save, write_checkpoint
from moefy.models.load import model_of, plain_config
from moefy.progress import Watch
from moefy.report import model_card
from moefy.text.tokens import Tokens

LAYOUT = ("batch_size", "gradient_accumulation_steps", "fsdp", "expert_parallel")
"""Settings that say where the sequences of a step are computed, but not which ones they are."""


@dataclass(frozen=True)
class Plan:
    """A fine-tune whose inputs have passed all checks."""

    run: Run
    settings: Settings
    dtypes: ComputeDtypes
    teacher: Path
    """The folder of the dense model."""
    digests: dict[str, str]
    """Of the teacher's files; empty where no loss needs the teacher."""
    tokens: Tokens
    process: PartialState
    watch: Watch

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the weights: checkpoints of another identity are not resumed.

        The number of processes and the settings of `LAYOUT` change roundings only, and what looks
        at one batch (`balance` and the settings that disturb choices).
        """
        settings, world = dataclasses.asdict(self.settings), self.process.num_processes
        return {
            "run": self.run.digests,
            "text": self.tokens.trained,
            "teacher": self.digests,
            SEQUENCES: sequences_per_step(self.settings, world),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{k: value for k, value in settings.items() if k not in NOT_OF_A_RUN + LAYOUT},
            "compute_dtype": {
                "student": self.dtypes.student.name,
                "teacher": self.dtypes.teacher.name,
            },
        }


def finetune(
    run: Path,
    out: Path,
    settings: Settings,
    *,
    force: bool = False,
    restart: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Fine-tune the run in `run` and publish the folder `out` whole; return its report.

    Until the end, checkpoints lie beside `out`. A fine-tune that was stopped resumes from the last
    one, unless `restart`. `force` removes checkpoints of another fine-tune, and replaces `out`.

    Raises:
        MoefyError: code 2 for an `out` that exists and for settings that do not fit the run, 3 for
            a bad run, text or teacher, 5 for missing resources, 6 when training goes wrong, 7 for
            checkpoints of another fine-tune.
    """
    check_machine(settings)
    process = processes(settings)
    out = check_free(out, force=force)
    if out == run.resolve():
        raise MoefyError(f"OUT {out} is the run itself; give another name", code=2)
    watch = watch if process.is_main_process else lambda *_: None
    choices = home_of(out) / CHOICES
    if restart and process.is_main_process:
        choices.unlink(missing_ok=True)
    opened = settle(open_inputs(run, settings), out, choices, process, watch)
    if not (force or restart):
        check_step(home_of(out), opened.settings, process.num_processes)
    group = Group(process.process_index, process.num_processes)
    plan = _plan(opened, out, process, group, watch)
    checkpoints = Checkpoints(home_of(out), plan.identity, group)
    with open_home(checkpoints.home, out, process):
        if process.is_main_process:
            claim(checkpoints, force=force, restart=restart)
            if settings != plan.settings:
                keep(choices, settings, plan.settings)
        process.wait_for_everyone()
        check_shared(checkpoints.home)
        if not steps(checkpoints.home):
            (checkpoints.home / LOG).unlink(missing_ok=True)
        teacher = _teacher(plan)
        trained = _train(plan, checkpoints, teacher)
        gc.collect()  # the trainer and its callbacks hold each other, and the optimizer's moments
        save(trained.model, checkpoints.home / SAVED)
        process.wait_for_everyone()
        if settings.refit_after:
            trained = _refit(plan, trained, teacher, checkpoints.home / SAVED)
        summary = _summary(plan, trained)
        if process.is_main_process:
            with publishing(out, force=force) as part:
                _write(plan, trained, checkpoints.home, summary, part)
            shutil.rmtree(checkpoints.home, ignore_errors=True)
            shutil.rmtree(answers_of(out), ignore_errors=True)
        process.wait_for_everyone()
    return summary


def _plan(opened: Opened, out: Path, process: PartialState, group: Group, watch: Watch) -> Plan:
    """Read the text of a fine-tune, but no weights to train."""
    run, settings, dtypes = opened.run, opened.settings, opened.dtypes
    teacher = opened.teacher or run.folder

    def write(*amount: Any, **more: Any) -> Tokens:
        """Text by the first process: how many documents fit at a time decides what they say."""
        own = partial(write_text, teacher, settings, dtypes.teacher.dtype)
        return group.broadcast_object(None if group.rank else own(*amount, **more))

    place = Path(settings.teacher_cache).expanduser() if settings.teacher_cache else answers_of(out)
    progress = partial(watch, "teacher's answers")
    answerer = Answerer(teacher, opened.digests, settings, dtypes.teacher.dtype, place, progress)

    def answer(prompts: Path, count: int | None) -> Answers:
        with process.main_process_first():
            return answerer.answers(prompts, count)

    tokens = read_text(run, settings, process.num_processes, write, watch, answer)
    digests = opened.digests if opened.distils else {}
    return Plan(run, settings, dtypes, teacher, digests, tokens, process, watch)


def _train(plan: Plan, checkpoints: Checkpoints, teacher: Teacher) -> Trained:
    run, settings = plan.run, plan.settings
    callbacks, log = Callbacks(), checkpoints.home / LOG
    if plan.process.is_main_process:  # one of several processes writes the log
        callbacks = Callbacks(partial(append, log), partial(rewind, log), plan.watch)
    restarts = [row["guard"] for row in read_log(log) if "guard" in row]
    student = Student(
        partial(load_student, run, settings, plan.dtypes.student.dtype),
        plan.dtypes.stored if one_dtype(run.folder) else None,
        start_of(run) if settings.anneal else None,
        run.copies,
    )
    return train(
        student,
        plan.tokens,
        settings,
        checkpoints,
        teacher=teacher,
        callbacks=callbacks,
        restarts=checkpoints.group.broadcast_object(restarts),
    )


def _refit(plan: Plan, trained: Trained, teacher: Teacher, saved: Path) -> Trained:
    """The trained model with `down_proj` refitted once more, if that lowers its validation loss.

    `saved` holds its weights, and those of the refit behind it.
    """
    run, settings, tokens = plan.run, plan.settings, plan.tokens
    plan.watch("refit", 0, 1)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(tokens.rows), generator=generator)
    rows_N = torch.tensor(tokens.rows)[order[: refit_after.TOKENS // settings.sequence_length]]
    dense = load_teacher(dense_folder(run), settings, plan.dtypes.teacher.dtype)
    state = refit_after.state(
        trained.model, run, saved, dense, tokens.ids_BT[rows_N], plan.dtypes.stored
    )
    del dense
    config = plain_config(run.folder)
    model = model_of(run.folder, config, state, task="ForCausalLM", dtype=trained.model.dtype)
    model = model.to(trained.model.device)
    figures, layers = measure(model, Routing(model, settings), tokens, teacher, settings)
    by, before = "kl" if "kl" in figures else "loss", trained.validation["after"]
    record = {"by": by, "before": before[by], "after": figures[by]}
    record |= {
        "kept": figures[by] < before[by],
        "tokens": rows_N.numel() * settings.sequence_length,
    }
    if not record["kept"]:
        return dataclasses.replace(trained, refit=record)
    save(model, saved)
    return dataclasses.replace(
        trained,
        model=model,
        validation={**trained.validation, "after": figures},
        routing={**trained.routing, "after": layers},
        refit=record,
    )


def _teacher(plan: Plan) -> Teacher:
    """The parts of the teacher that the losses need, from the model or from a cache."""
    settings, needs = plan.settings, losses.needs(plan.settings)
    if not needs & {losses.TEACHER, losses.STATES}:
        return Teacher()
    load = partial(load_teacher, plan.teacher, settings, plan.dtypes.teacher.dtype)
    size = min(settings.top_tokens, plan.run.vocab_size)
    settings = dataclasses.replace(settings, top_tokens=size)
    if settings.teacher_cache:
        name = cache_name(plan.digests, plan.tokens.sha256, settings, plan.dtypes.teacher.name)
        file = Path(settings.teacher_cache).expanduser() / name
        progress = partial(plan.watch, "teacher")
        with plan.process.main_process_first():
            return Teacher(cached(file, load, plan.tokens.ids_BT, settings, progress))
    model = load()
    return Teacher(
        live(model, settings) if losses.TEACHER in needs else None,
        states(model, states_to_match(plan.run, plan.teacher)) if losses.STATES in needs else None,
    )


def _summary(plan: Plan, trained: Trained) -> dict[str, Any]:
    """The content of `moefy/finetune.json`, without the digests of the output."""
    run, settings = plan.run, plan.settings
    return {
        "moefy": __version__,
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parent": {"folder": os.path.abspath(run.folder), "files": run.digests},
        "teacher": {"model": settings.teacher or run.recipe.model, "files": plan.digests},
        "train": plan.tokens.figures(),
        "settings": dataclasses.asdict(settings),
        **{key: value for key, value in vars(trained).items() if key != "model"},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        },
        "compute": plan.dtypes.summary(),
    }


def _write(plan: Plan, trained: Trained, home: Path, summary: dict[str, Any], part: Path) -> None:
    """Write the checkpoint, the log, the recipe with its table and the card.

    The report is written last: its existence means that the folder is whole.
    """
    run, settings, saved, log = plan.run, plan.settings, home / SAVED, home / LOG
    plan.watch("write", 0, 1)
    write_checkpoint(saved, run, part)
    model = trained.model
    # With FSDP no process has all of the model, but the saved one is whole; nor is it compiled.
    if settings.fsdp or settings.compile:
        model = load_teacher(saved, settings, plan.dtypes.student.dtype)
    summary["reopened"] = check_checkpoint(model, run, part, plan.tokens.ids_BT[-1])
    folder = part / "moefy"
    publish.write_text(folder / LOG, log.read_text("utf-8") if log.exists() else "")
    recipe = (run.folder / "moefy" / "recipe.toml").read_text("utf-8").split(f"\n[{TABLE}]")[0]
    table = render_table(TABLE, dataclasses.asdict(settings))
    publish.write_text(folder / "recipe.toml", recipe + table)
    publish.write_text(part / "README.md", model_card(run.summary, trained=summary))
    summary["outputs"] = file_digests(part, without=("README.md",))
    write_json(folder / "finetune.json", summary)
