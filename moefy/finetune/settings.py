"""One fine-tune, declared: the `[finetune]` table of a recipe, overridden by flags, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.config.recipe import check_type, located, nearest, parse_setting, read_toml
from moefy.errors import MoefyError

TABLE = "finetune"
"""The table of a recipe that these are."""

TRAIN = ("all", "router+experts", "experts", "router", "lora")
BALANCE = ("switch", "variation", "bias", "none")
SOFT = ("all", "chosen", "none")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant")
LOGS = ("", "tensorboard", "wandb")


@dataclass(frozen=True)
class Settings:
    """What decides the weights of a fine-tune, but for versions and the number of processes."""

    data: str = "self"
    """File of text, rows or chats, folder, `datasets` id, or `self`: text of the dense model."""
    text_field: str = "text"
    tokens: int = 1_000_000
    """Tokens trained on, repeated ones included."""
    sequence_length: int = 512
    batch_size: int = 4
    """Sequences per process and forward."""
    accumulate: int = 1
    """Forwards per step."""
    validation_tokens: int = 8192
    """Tokens at the end of the text that are only measured on."""
    teacher: str | None = None
    """Folder or hub id; the dense model of the run, if not given."""
    teacher_cache: str | None = None
    """Folder that keeps what the teacher expects: it need not run beside the student, nor twice."""
    train: str = "all"
    """`all`, `router+experts`, `experts`, `router` or `lora`."""
    learning_rate: float = 2e-4
    """Of the experts, the shared one included."""
    router_learning_rate: float = 1e-3
    """Of the router's rows as they were before they were scaled down."""
    rest_learning_rate: float = 1e-4
    """Of everything else."""
    warmup: float = 0.05
    """Share of the steps over which the rates rise."""
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    """Greatest norm of the gradient."""
    kl: float = 1.0
    """Weight of the KL divergence from the teacher."""
    temperature: float = 1.0
    top_p: float = 0.98
    """Share of the teacher's probability whose tokens are kept; the rest counts as one token."""
    top_tokens: int = 128
    """The most tokens that are kept."""
    ce: float = 0.0
    """Weight of the cross-entropy of the text itself."""
    hidden: float = 0.0
    """Weight of the match of the states behind every layer; the teacher runs beside the student."""
    router_ce: float = 0.0
    """Weight of the router's cross-entropy to the experts of most output energy."""
    balance: str = "switch"
    """`switch`, `variation`, `bias` (no loss: the class's selection bias is moved) or `none`."""
    balance_weight: float = 0.01
    bias_rate: float = 1e-3
    """Step of the selection bias, in units of the unscaled logits."""
    router_z: float = 0.001
    """Weight of the router's z-loss."""
    soft: str = "all"
    """Whose outputs the routers learn from: of `all` experts, the `chosen` ones, or `none`."""
    noise: float = 0.0
    expert_dropout: float = 0.0
    capacity: float = 0.0
    warm_start: float = 0.0
    explore_until: float = 0.5
    """Share of the training over which noise and warm start end."""
    lora_rank: int = 16
    gradient_checkpointing: bool = False
    seed: int = 0
    compute_dtype: str = "auto"
    """Of student and teacher: `auto` (the stored one where the machine has it, else float32),
    `float32`, `bfloat16`, `float16`. Where it is less than float32, the optimizer keeps copies in
    float32. What is written has the stored dtypes."""
    device: str = "auto"
    log_every: int = 1
    log_to: str = ""
    save_every: int = 100
    """Steps between checkpoints."""
    measure_every: int = 0
    """Steps between measurements on the validation text; 0 for before and after only."""
    dead_below: float = 0.05
    """An expert with less than this share of the mean load is dead."""
    guard_steps: int = 25
    """Steps over which an expert must be dead, or the loss too high, to go back."""
    guard_loss: float = 1.5
    """Mean loss over these steps, as a multiple of the least so far, that is too high."""
    guard_restarts: int = 3
    """How often to go back to the last good checkpoint; 0 for no guard."""
    fsdp: int = 0
    """Processes that share the weights (FSDP2); 0 for a whole copy in each."""
    expert_parallel: int = 0
    """Processes of these that share the experts instead of their weights."""


MOST = {"int": 10**12, "float": 1e30}
"""The most of what is counted or weighed: far beyond use, and no overflow."""

FIELDS = {spec.name: spec for spec in dataclasses.fields(Settings)}


def build(
    file: Path | None,
    flags: Mapping[str, Any],
    settings: list[str],
    note: Callable[[str], None] = lambda line: None,
) -> Settings:
    """Checked settings from a file's `[finetune]` table, flags that are not None, `key=value`.

    A key's former name is taken as well, and `note` gets a line about it.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if file:
        table = read_toml(file).get(TABLE)
        if not isinstance(table, dict):
            raise MoefyError(f"recipe {file} has no table [{TABLE}]", code=2)
        table = {key: value for key, value in table.items() if key not in ("parent", "made")}
        values |= renamed(table, note)
    values |= renamed({key: value for key, value in flags.items() if value is not None}, note)
    for setting in settings:
        key, value = parse_setting(setting)
        values |= renamed({key.replace("-", "_"): value}, note)
    for key, value in values.items():
        check_type(key, value, FIELDS)
    found = Settings(**located(values, "data", "teacher"))
    _check(found)
    return found


def renamed(
    values: Mapping[str, Any], note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The values under today's names: `compute_dtype` was `dtype`, and its `auto` "as-stored"."""
    result = dict(values)
    if "dtype" in result:
        value = result.pop("dtype")
        result.setdefault("compute_dtype", "auto" if value == "as-stored" else value)
        note(f"dtype={value} is called compute_dtype={result['compute_dtype']} now")
    return result


def _check(settings: Settings) -> None:
    for name, known in (
        ("train", TRAIN),
        ("balance", BALANCE),
        ("soft", SOFT),
        ("compute_dtype", COMPUTE_DTYPES),
        ("schedule", SCHEDULES),
        ("log_to", LOGS),
    ):
        if (value := getattr(settings, name)) not in known:
            expected = nearest(value, [word for word in known if word])
            raise MoefyError(f"{_flag(name)} is {value!r}; {expected}", code=2)
    for name, least, most in (
        ("tokens", settings.sequence_length, None),
        ("sequence_length", 8, None),
        ("batch_size", 1, None),
        ("accumulate", 1, None),
        ("validation_tokens", settings.sequence_length, None),
        ("temperature", 1e-3, 1e3),
        ("top_p", 1e-3, 1),
        ("top_tokens", 1, None),
        ("warmup", 0, 1),
        ("expert_dropout", 0, 1),
        ("warm_start", 0, 1),
        ("explore_until", 0, 1),
        ("log_every", 1, None),
        ("save_every", 1, None),
        ("guard_steps", 1, None),
        ("guard_loss", 1, None),
        ("dead_below", 0, 1),
        ("capacity", 0, 1e6),
        ("lora_rank", 1, 2**16),
        ("seed", 0, 2**32 - 1),
        *((name, 0, None) for name in FIELDS if FIELDS[name].type in ("float", "int")),
    ):
        value = getattr(settings, name)
        most = most or MOST[str(FIELDS[name].type)]
        if not least <= value <= most:  # nor is NaN
            raise MoefyError(
                f"{_flag(name)} is {_number(value)}; expected at least {_number(least)} and at "
                f"most {_number(most)}",
                code=2,
            )
    if not (settings.kl or settings.ce or settings.hidden or settings.router_ce):
        raise MoefyError("all of kl, ce, hidden and router_ce are 0: nothing to learn from", code=2)
    if settings.expert_parallel and not settings.fsdp:
        raise MoefyError("expert_parallel without fsdp; expected --set fsdp=PROCESSES", code=2)
    if settings.expert_parallel and settings.fsdp % settings.expert_parallel:
        raise MoefyError(
            f"expert_parallel is {settings.expert_parallel}, and fsdp {settings.fsdp}; expected a "
            "number that divides it",
            code=2,
        )
    if settings.expert_parallel and (settings.soft == "all" or settings.router_ce):
        raise MoefyError(
            "expert_parallel: no process has all experts, which soft=all and router_ce ask; "
            "expected --set soft=chosen and router_ce=0",
            code=2,
        )
    if settings.fsdp and settings.train == "lora":
        raise MoefyError("fsdp with --train lora is not supported; drop one", code=4)
    if settings.hidden and settings.teacher_cache:
        raise MoefyError(
            "hidden needs the teacher's states, which a --teacher-cache does not hold; drop one",
            code=2,
        )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
