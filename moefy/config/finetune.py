"""One fine-tune, declared: the `[finetune]` table of a recipe, overridden by flags, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moefy.config.options import (
    COMPUTE_DTYPES,
    Note,
    Option,
    check,
    located,
    parse_setting,
    renamed,
)
from moefy.config.toml import read_toml
from moefy.errors import MoefyError

TABLE = "finetune"
"""The table of a recipe that these are."""


@dataclass(frozen=True)
class Settings:
    """What decides the weights of a fine-tune, but for versions and the number of processes."""

    data: Annotated[
        str,
        Option(
            "File or folder of text, rows or chats; data set id; or `self` for text that the dense "
            "model writes."
        ),
    ] = "self"
    text_field: Annotated[str, Option("Field of rows that holds the text.")] = "text"
    tokens: Annotated[int, Option("Tokens to train on, repeated ones included.")] = 1_000_000
    sequence_length: Annotated[int, Option("Tokens per sequence.", least=8)] = 512
    batch_size: Annotated[int, Option("Sequences per process and forward pass.", least=1)] = 4
    gradient_accumulation_steps: Annotated[
        int, Option("Forward passes per step.", least=1, old="accumulate")
    ] = 1
    validation_tokens: Annotated[
        int, Option("Tokens at the end of the text that only measure.", flag=False)
    ] = 8192
    teacher: Annotated[
        str | None, Option("Folder or hub id of the teacher.", unset="the dense model of the run")
    ] = None
    teacher_cache: Annotated[
        str | None,
        Option("Folder that keeps the teacher's predictions, so that it runs only once."),
    ] = None
    train: Annotated[
        str,
        Option("What is trained.", choices=("all", "router+experts", "experts", "router", "lora")),
    ] = "all"
    learning_rate: Annotated[
        float, Option("Learning rate of the experts, the shared one included.")
    ] = 2e-4
    router_learning_rate: Annotated[
        float, Option("Learning rate of the routers, in units of their unscaled rows.")
    ] = 1e-3
    rest_learning_rate: Annotated[float, Option("Learning rate of everything else.")] = 1e-4
    warmup_ratio: Annotated[
        float,
        Option(
            "Share of the steps over which the learning rates rise.",
            most=1,
            flag=False,
            old="warmup",
        ),
    ] = 0.05
    schedule: Annotated[
        str,
        Option(
            "Course of the learning rates.", choices=("cosine", "linear", "constant"), flag=False
        ),
    ] = "cosine"
    weight_decay: Annotated[float, Option("Weight decay.", flag=False)] = 0.0
    max_grad_norm: Annotated[float, Option("Gradient norm at most.", flag=False, old="clip")] = 1.0
    kl: Annotated[float, Option("Weight of the KL divergence from the teacher.")] = 1.0
    temperature: Annotated[
        float, Option("Temperature of that divergence.", least=1e-3, most=1e3, flag=False)
    ] = 1.0
    top_p: Annotated[
        float,
        Option(
            "Share of the teacher's probability whose tokens are kept; the rest counts as one "
            "token.",
            least=1e-3,
            most=1,
            flag=False,
        ),
    ] = 0.98
    top_tokens: Annotated[
        int, Option("Tokens of the teacher's that are kept at most.", least=1, flag=False)
    ] = 128
    ce: Annotated[float, Option("Weight of the cross-entropy of the text itself.")] = 0.0
    hidden: Annotated[
        float,
        Option(
            "Weight of the match of the states behind every layer; the teacher runs beside the "
            "student.",
            flag=False,
        ),
    ] = 0.0
    router_ce: Annotated[
        float,
        Option(
            "Weight of the router's cross-entropy to the experts of most output energy.", flag=False
        ),
    ] = 0.0
    balance: Annotated[
        str,
        Option(
            "Load balancing: a loss, or `bias`, which moves the class's selection bias.",
            choices=("switch", "variation", "bias", "none"),
        ),
    ] = "switch"
    balance_weight: Annotated[float, Option("Weight of the load balancing loss.")] = 0.01
    bias_rate: Annotated[
        float, Option("Step of the selection bias, in units of the unscaled logits.", flag=False)
    ] = 1e-3
    router_z: Annotated[float, Option("Weight of the router's z-loss.", flag=False)] = 0.001
    router_gradient: Annotated[
        str,
        Option(
            "Experts whose outputs the routers learn from.",
            choices=("all", "chosen", "none"),
            flag=False,
            old="soft",
        ),
    ] = "all"
    noise: Annotated[
        float, Option("Standard deviation of noise on the router's logits.", flag=False)
    ] = 0.0
    expert_dropout: Annotated[
        float, Option("Chance of an expert to be out of reach for a batch.", most=1, flag=False)
    ] = 0.0
    capacity_factor: Annotated[
        float,
        Option(
            "Tokens an expert takes at most, as a multiple of its fair share; 0 for no limit.",
            most=1e6,
            flag=False,
            old="capacity",
        ),
    ] = 0.0
    cold_expert_share: Annotated[
        float,
        Option(
            "Share of the tokens whose last choice is the expert of least load.",
            most=1,
            flag=False,
            old="warm_start",
        ),
    ] = 0.0
    explore_until: Annotated[
        float,
        Option(
            "Share of the training after which the noise and the tokens for the expert of least "
            "load have ended.",
            most=1,
            flag=False,
        ),
    ] = 0.5
    lora_rank: Annotated[
        int, Option("Rank of the LoRA matrices.", least=1, most=2**16, flag=False)
    ] = 16
    gradient_checkpointing: Annotated[bool, Option("Less memory for more time.")] = False
    seed: Annotated[int, Option("Random seed.", most=2**32 - 1)] = 0
    compute_dtype: Annotated[
        str,
        Option(
            "Dtype of student and teacher; `auto` is the stored one, or float32 where the machine "
            "lacks it. The optimizer keeps float32 copies; files keep the stored dtypes.",
            choices=COMPUTE_DTYPES,
            old="dtype",
            old_values={"as-stored": "auto"},
        ),
    ] = "auto"
    device: Annotated[str, Option("Device: auto, cpu or cuda.")] = "auto"
    log_every: Annotated[int, Option("Steps between lines of the log.", least=1, flag=False)] = 1
    log_to: Annotated[
        str, Option("Logger.", choices=("", "tensorboard", "wandb"), unset="none")
    ] = ""
    save_every: Annotated[int, Option("Steps between checkpoints.", least=1)] = 100
    measure_every: Annotated[
        int,
        Option(
            "Steps between measurements on the validation text; 0 for before and after only.",
            flag=False,
        ),
    ] = 0
    dead_below: Annotated[
        float, Option("Share of the mean load under which an expert is dead.", most=1, flag=False)
    ] = 0.05
    guard_steps: Annotated[
        int,
        Option(
            "Steps over which an expert must be dead, or the loss too high, to go back.",
            least=1,
            flag=False,
        ),
    ] = 25
    guard_loss: Annotated[
        float,
        Option(
            "Mean loss over these steps that is too high, as a multiple of the least so far.",
            least=1,
            flag=False,
        ),
    ] = 1.5
    guard_restarts: Annotated[
        int, Option("Returns to the last good checkpoint at most; 0 for no guard.", flag=False)
    ] = 3
    fsdp: Annotated[
        int,
        Option("Processes that share the weights (FSDP2); 0 for a whole copy in each.", flag=False),
    ] = 0
    expert_parallel: Annotated[
        int,
        Option("Processes of these that share the experts instead of their weights.", flag=False),
    ] = 0


def build(
    file: Path | None,
    flags: Mapping[str, Any],
    settings: list[str],
    note: Note = lambda line: None,
) -> Settings:
    """Checked settings from a file's `[finetune]` table, flags that are not None, `key=value`.

    A name of an earlier version is taken as well, and `note` gets a line about it.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    table = _read(file) if file else {}
    given = {key: value for key, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    for layer in (table, given, *(dict([parse_setting(setting)]) for setting in settings)):
        values |= check(Settings, renamed(Settings, layer, note), f"[{TABLE}]")
    result = Settings(**located(values, "data", "teacher"))
    _check(result)
    return result


def _read(file: Path) -> dict[str, Any]:
    table = read_toml(file).get(TABLE)
    if not isinstance(table, dict):
        raise MoefyError(f"recipe {file} has no table [{TABLE}]", code=2)
    return {key: value for key, value in table.items() if key not in ("parent", "made")}


def _check(settings: Settings) -> None:
    """Refuse settings that do not go together."""
    length = settings.sequence_length
    for flag, value in (
        ("--tokens", settings.tokens),
        ("validation_tokens", settings.validation_tokens),
    ):
        if value < length:
            raise MoefyError(
                f"{flag} is {value}; expected at least {length}, which is one sequence", code=2
            )
    if not (settings.kl or settings.ce or settings.hidden or settings.router_ce):
        raise MoefyError("all of kl, ce, hidden and router_ce are 0: nothing to learn from", code=2)
    if settings.hidden and settings.teacher_cache:
        raise MoefyError(
            "hidden needs the teacher's states, which a --teacher-cache does not hold; drop one",
            code=2,
        )
    _check_processes(settings)


def _check_processes(settings: Settings) -> None:
    """Refuse ways of sharing a model among processes that do not go with the rest."""
    if settings.fsdp and settings.train == "lora":
        raise MoefyError("fsdp with --train lora is not supported; drop one", code=4)
    if not settings.expert_parallel:
        return
    if not settings.fsdp:
        raise MoefyError("expert_parallel without fsdp; expected --set fsdp=PROCESSES", code=2)
    if settings.fsdp % settings.expert_parallel:
        raise MoefyError(
            f"expert_parallel is {settings.expert_parallel}, and fsdp {settings.fsdp}; expected a "
            "number that divides it",
            code=2,
        )
    if settings.router_gradient == "all" or settings.router_ce:
        raise MoefyError(
            "expert_parallel: no process has all experts, which router_gradient=all and router_ce "
            "need; expected --set router_gradient=chosen and router_ce=0",
            code=2,
        )
