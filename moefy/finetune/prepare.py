"""What a fine-tune opens and decides before it reads text or loads weights to train."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moefy.config.finetune import Settings
from moefy.config.presets import CHOSEN, OPEN
from moefy.config.sources import sources
from moefy.distributed import WAIT
from moefy.files.publish import write_json
from moefy.finetune import losses
from moefy.finetune.answers import read_prompts
from moefy.finetune.checks import check_machine, check_run, may_answer
from moefy.finetune.estimate import BATCH, Inputs, check, estimate, settled
from moefy.finetune.home import NOT_OF_A_RUN
from moefy.finetune.inputs import ComputeDtypes, Run, compute_dtypes, open_run, teacher_folder
from moefy.finetune.probe import probe
from moefy.finetune.text import amounts
from moefy.finetune.train import device, num_last_steps, sequences_per_step
from moefy.progress import Watch
from moefy.text.documents import locate

CHOICES = "preset.json"
"""Beside the checkpoints: what a preset has chosen, for this machine may be slower tomorrow."""


@dataclass(frozen=True)
class Opened:
    """A run and its teacher, checked."""

    run: Run
    settings: Settings
    dtypes: ComputeDtypes
    teacher: Path | None
    """The folder of the dense model, where a loss or a text needs it."""
    digests: dict[str, str]
    """Of the teacher's files."""

    @property
    def distils(self) -> bool:
        """Whether a loss needs the teacher."""
        return losses.distils(self.settings)


def processes(settings: Settings) -> PartialState:
    """The processes of this fine-tune, which wait for the first one: it may ask the teacher for
    hours."""
    return PartialState(cpu=device(settings).type == "cpu", timeout=WAIT)


def open_inputs(folder: Path, settings: Settings) -> Opened:
    """Open the run in `folder` and its teacher, but no weights.

    Raises:
        MoefyError: as `open_run`, `check_run`, `teacher_folder` and `compute_dtypes`.
    """
    run = open_run(folder)
    check_run(run, settings)
    texts = sources(settings.data, settings.answers)
    own = [source for source in texts if source.prompts or source.place == "self"]
    start = Opened(run, settings, compute_dtypes(run, None, settings), None, {})
    if not (start.distils or own or may_answer(run, settings)):
        return start
    teacher, digests = teacher_folder(run, settings)
    return Opened(run, settings, compute_dtypes(run, teacher, settings), teacher, digests)


def settle(start: Opened, out: Path, choices: Path, process: PartialState, watch: Watch) -> Opened:
    """The same with what the preset chooses, or what it has chosen before, as `choices` says.

    Raises:
        MoefyError: code 5 for a fine-tune that does not fit.
    """
    if OPEN not in [getattr(start.settings, name) for name in CHOSEN]:
        return start
    record = json.loads(choices.read_text("utf-8")) if choices.is_file() else {}
    if record.get("asked") == _asked(start.settings):
        settings = dataclasses.replace(start.settings, **record["chosen"])
    else:
        watch("try a step", 0, 1)
        inputs = _inputs(start, process.num_processes)
        check(estimate(inputs, out))
        settings = inputs.settings
    if process.num_processes > 1:  # each has measured another speed
        (settings,) = broadcast_object_list([settings])
    return dataclasses.replace(start, settings=settings)


def keep(choices: Path, asked: Settings, settings: Settings) -> None:
    """Write what a preset has chosen for the settings that were asked for."""
    chosen = {name: getattr(settings, name) for name in CHOSEN}
    write_json(choices, {"asked": _asked(asked), "chosen": chosen})


def plan(folder: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """What a fine-tune of the run in `folder` will take, from a few steps of its first layers.

    Raises:
        MoefyError: as `settle`, but for what does not fit: that is in the result; code 2 for a
            share of the text that is too small.
    """
    check_machine(settings)
    process = processes(settings)
    start = open_inputs(folder, settings)
    for source in sources(settings.data, settings.answers):
        if source.prompts:
            read_prompts(Path(source.place))
        elif source.place != "self":
            locate(source.place)
    inputs = _inputs(start, process.num_processes)
    last = num_last_steps(inputs.settings, inputs.world)
    amounts(inputs.settings, inputs.world, last * sequences_per_step(inputs.settings, inputs.world))
    return estimate(inputs, out)


def _inputs(start: Opened, world: int) -> Inputs:
    """What an estimate reads, its settings complete."""
    tried = start.settings
    if tried.batch_size == OPEN:
        tried = dataclasses.replace(tried, batch_size=BATCH[device(tried).type])
    measured = probe(start.run, start.teacher, tried, start.dtypes)
    inputs = Inputs(
        start.run,
        start.teacher,
        start.settings,
        start.dtypes,
        measured,
        world,
        may_answer(start.run, start.settings),
    )
    return dataclasses.replace(inputs, settings=settled(inputs))


def _asked(settings: Settings) -> Any:
    """What a choice holds for, as JSON gives it back: the settings that decide the weights."""
    asked = dataclasses.asdict(settings).items()
    return json.loads(json.dumps({k: v for k, v in asked if k not in NOT_OF_A_RUN}))
