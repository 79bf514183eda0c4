"""One fine-tune, declared: the `[finetune]` table of a recipe, overridden by flags, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.config import course
from moefy.config.course import Weight
from moefy.config.options import (
    COMPUTE_DTYPES,
    Note,
    check,
    key,
    located,
    option,
    parse_setting,
)
from moefy.config.presets import CHOSEN, DEFAULT, OPEN, PRESETS
from moefy.config.sources import absolute, sources
from moefy.config.toml import read_toml
from moefy.errors import MoefyError

BY_SIZE = "by the size of the weights"

TABLE = "finetune"
"""The table of a recipe that these are."""


@dataclass(frozen=True)
class Settings:
    """What decides the weights of a fine-tune, but for versions and the number of processes."""

    preset: str = option(
        "",
        "How long it may take: `fast` ten minutes, `good` an hour, `best` ten hours. It chooses "
        "tokens, batches and the last stage by the speed of the machine and the size of the text, "
        "where they are not given.",
        choices=("", *PRESETS),
        unset=f"{DEFAULT}, or none with --tokens",
    )
    data: tuple[str, ...] = option(
        ("self",),
        "File or folder of text, rows or chats; data set id; or `self` for text that the dense "
        "model writes. May be repeated, with shares: `prose.txt:0.7`.",
        unset="self",
    )
    answers: str | None = option(
        None,
        "File of prompts that the teacher answers once, to train on its answers, beside --data or "
        "alone. May have a share, too.",
    )
    answer_tokens: int = key(
        256, "Tokens of such an answer at most; longer ones are left out.", least=1
    )
    answer_temperature: float = key(0.0, "Temperature of such answers; 0 for the likeliest tokens.")
    last_stage: float = option(
        0.0,
        "Share of the steps, at the end, that learn the teacher's answers to prompts of moefy's "
        "own, and nothing else.",
        most=0.5,
        unset="0, or as the preset chooses",
    )
    text_field: str = option("text", "Field of rows that holds the text.")
    answers_only: bool = option(
        False, "Learn what the assistant writes in conversations, and not the rest of them."
    )
    tokens: int = option(1_000_000, "Tokens to train on, repeats included.", unset="by preset")
    sequence_length: int = option(512, "Tokens per sequence.", least=8)
    batch_size: int = option(4, "Sequences per process and forward pass.", least=1)
    gradient_accumulation_steps: int = option(
        1, "Forward passes per step.", least=1, old="accumulate"
    )
    validation_tokens: int = key(8192, "Tokens at the end of the text that only measure.")
    teacher: str | None = option(
        None, "Folder or hub id of the teacher.", unset="the dense model of the run"
    )
    teacher_cache: str | None = option(
        None, "Folder that keeps the teacher's predictions, so that it runs only once."
    )
    train: str = option(
        "all", "What is trained.", choices=("all", "router+experts", "experts", "router", "lora")
    )
    learning_rate: float | None = option(None, "Learning rate of all experts.", unset=BY_SIZE)
    router_learning_rate: float | None = option(
        None, "Learning rate of the routers, in units of their unscaled rows.", unset=BY_SIZE
    )
    rest_learning_rate: float | None = option(None, "That of everything else.", unset=BY_SIZE)
    rate_factor: float = key(1.0, "Factor on those by size.")
    warmup_ratio: float = key(
        0.1, "Share of the steps over which the learning rates rise.", most=1, old="warmup"
    )
    schedule: str = key(
        "cosine", "Course of the learning rates.", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = key(0.0, "Weight decay.")
    max_grad_norm: float = key(1.0, "Gradient norm at most.", old="clip")
    optimizer: str = option(
        "adamw",
        "Optimizer: `adamw`, or `adamw-8bit`, whose moments take a quarter of the memory.",
        choices=("adamw", "adamw-8bit"),
    )
    kl: Weight = option(
        1.0,
        "Weight of the KL divergence from the teacher, 0 by default for copies; this and the other "
        "weights of what is learned may change: `1,0@0.7` is 1, and 0 from 70 % of the steps on.",
        course=True,
    )
    temperature: float = key(1.0, "Temperature of that divergence.", least=1e-3, most=1e3)
    top_p: float = key(
        0.98,
        "Share of the teacher's probability whose tokens are kept; the rest counts as one token.",
        least=1e-3,
        most=1,
    )
    top_tokens: int = key(128, "Tokens of the teacher's that are kept at most.", least=1)
    ce: Weight = option(
        0.3, "Weight of the cross-entropy; 1 for copies, 0 where experts overlap.", course=True
    )
    hidden: Weight = key(
        0.0,
        "Weight of the match of the states behind every layer; the teacher runs beside the "
        "student.",
        course=True,
    )
    router_ce: Weight = key(
        0.0,
        "Weight of the router's cross-entropy to the experts of most output energy.",
        course=True,
    )
    anneal: float = option(
        0.0,
        "Share of the steps over which the experts per token fall from all to the run's: training "
        "then starts at the dense model.",
        most=0.9,
    )
    balance: str = option(
        "switch",
        "Load balancing: a loss, or `bias`, which moves the class's selection bias.",
        choices=("switch", "variation", "bias", "none"),
    )
    balance_weight: float = option(0.01, "Weight of the load balancing loss.")
    bias_rate: float = key(1e-3, "Step of the selection bias, in units of the unscaled logits.")
    router_z: float = key(0.001, "Weight of the router's z-loss.")
    router_gradient: str = key(
        "all",
        "Experts whose outputs the routers learn from; `chosen` by default where they overlap.",
        choices=("all", "chosen", "none"),
        old="soft",
    )
    noise: float = key(0.0, "Standard deviation of noise on the router's logits.")
    expert_dropout: float = key(0.0, "Chance of an expert to be out of reach for a batch.", most=1)
    capacity_factor: float = key(
        0.0,
        "Tokens an expert takes at most, as a multiple of its fair share; 0 for no limit.",
        most=1e6,
        old="capacity",
    )
    cold_expert_share: float = key(
        0.0,
        "Share of the tokens whose last choice is the expert of least load.",
        most=1,
        old="warm_start",
    )
    explore_until: float = key(
        0.5,
        "Share of the training after which the noise and the tokens for the expert of least "
        "load have ended.",
        most=1,
    )
    refit_after: bool = key(
        False,
        "Refit `down_proj` once more after the training, in closed form; kept if the validation "
        "loss falls.",
    )
    lora_rank: int = key(16, "Rank of the LoRA matrices.", least=1, most=2**16)
    gradient_checkpointing: bool = option(False, "Less memory for more time.")
    compile: bool = option(False, "Compile the layers (`torch.compile`), once at the beginning.")
    seed: int = option(0, "Random seed.", most=2**32 - 1)
    compute_dtype: str = option(
        "auto",
        "Dtype of student and teacher; `auto` is the stored one, or float32 where the machine "
        "lacks it. The optimizer keeps float32 copies; files keep the stored dtypes.",
        choices=COMPUTE_DTYPES,
        old="dtype",
        old_values={"as-stored": "auto"},
    )
    device: str = option("auto", "Device: auto, cpu or cuda.")
    log_every: int = key(1, "Steps between lines of the log.", least=1)
    log_to: str = option("", "Logger.", choices=("", "tensorboard", "wandb"), unset="none")
    save_every: int = option(100, "Steps between checkpoints.", least=1)
    measure_every: int | None = key(
        None,
        "Steps between measurements on the validation text, the best of which is written; 0 for "
        "before and after only, and the last step.",
        unset="a quarter of all",
    )
    dead_below: float = key(0.05, "Share of the mean load under which an expert is dead.", most=1)
    guard_steps: int = key(
        25, "Steps over which an expert must be dead, or the loss too high, to go back.", least=1
    )
    guard_loss: float = key(
        1.5,
        "Mean loss over these steps that is too high, as a multiple of the least so far.",
        least=1,
    )
    guard_restarts: int = key(3, "Returns to the last good checkpoint at most; 0 for no guard.")
    fsdp: int = key(0, "Processes that share the weights (FSDP2); 0 for a whole copy in each.")
    expert_parallel: int = key(
        0, "Processes of these that share the experts instead of their weights."
    )


def build(
    file: Path | None,
    flags: Mapping[str, Any],
    settings: list[str],
    note: Note = lambda line: None,
    *,
    own: Mapping[str, Any] | None = None,
) -> Settings:
    """Checked settings from a file's `[finetune]` table, flags that are not None, `key=value`.

    `own` are the run's `own_defaults`. `note` gets a line about a name of an earlier version.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    table = _read(file) if file else {}
    given = {key: value for key, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    for layer in (table, given, *(dict([parse_setting(setting)]) for setting in settings)):
        values |= check(Settings, layer, note, f"[{TABLE}]")
    if "tokens" not in values:
        values.setdefault("preset", DEFAULT)
    chosen = dict.fromkeys(CHOSEN, OPEN) if values.get("preset") else {}
    result = Settings(**complete({**(own or {}), **chosen, **values}))
    _check(result)
    return result


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose files are absolute paths, and whose `data` is a tuple, as it was not once."""
    result = located(values, "teacher")
    if "data" in result:
        data = result["data"]
        result["data"] = absolute([data] if isinstance(data, str) else data)
    if result.get("answers"):
        (result["answers"],) = absolute([result["answers"]])
        result.setdefault("data", ())
    return result


def _read(file: Path) -> dict[str, Any]:
    table = read_toml(file).get(TABLE)
    if not isinstance(table, dict):
        raise MoefyError(f"recipe {file} has no table [{TABLE}]", code=2)
    return {key: value for key, value in table.items() if key not in ("parent", "made")}


def _check(settings: Settings) -> None:
    """Refuse settings that do not go together."""
    sources(settings.data, settings.answers)
    length = settings.sequence_length
    amounts = {"--tokens": settings.tokens, "validation_tokens": settings.validation_tokens}
    for flag, value in amounts.items():
        if OPEN != value < length:
            raise MoefyError(
                f"{flag} is {value}; expected at least {length}, which is one sequence", code=2
            )
    learned = [settings.kl, settings.ce, settings.hidden, settings.router_ce]
    for start in sorted({start for weight in learned for start, _ in course.parts(weight)}):
        if not any(course.at(weight, start) for weight in learned):
            when = f" from {start:.0%} of the steps on" if start else ""
            raise MoefyError(
                f"all of kl, ce, hidden and router_ce are 0{when}: nothing to learn from", code=2
            )
    if settings.hidden and settings.teacher_cache:
        raise MoefyError(
            "hidden needs the teacher's states, which a --teacher-cache does not hold; drop one",
            code=2,
        )
    train, optimizer, bias = settings.train, settings.optimizer, settings.balance == "bias"
    # The refit is blended into weights that are trained; a bias moves where all experts are on.
    untrained = {f"--train {train}": train in ("router", "lora"), "--balance bias": bias}
    _alone("--anneal", settings.anneal, {**untrained, "fsdp": settings.fsdp})
    unlike = {
        "fsdp": settings.fsdp,
        "--anneal": settings.anneal,
        "--gradient-checkpointing": settings.gradient_checkpointing,
        "refit_after": settings.refit_after,
    }
    _alone("--compile", settings.compile, unlike)
    whole = {f"--optimizer {optimizer}": optimizer != "adamw", "--train lora": train == "lora"}
    _alone("fsdp", settings.fsdp, whole)
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


def _alone(name: str, given: Any, others: Mapping[str, Any]) -> None:
    """Refuse what is given beside another that does not go with it."""
    if given and (found := [other for other, is_given in others.items() if is_given]):
        raise MoefyError(f"{name} with {found[0]} is not supported; drop one", code=4)
