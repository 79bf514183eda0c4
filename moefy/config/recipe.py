"""One conversion, declared: read from TOML, overridden by flags, checked before any model opens."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from moefy.config.methods import FORMER_PARTITIONS, FORMER_ROUTERS, METHODS, PARTS
from moefy.config.options import (
    COMPUTE_DTYPES,
    Note,
    check,
    fields,
    key,
    located,
    option,
    parse_setting,
    renamed,
)
from moefy.config.toml import read_toml, render_keys, render_table
from moefy.errors import MoefyError

CONVERT = Path(__file__).parents[1] / "convert"


def _methods(folder: str) -> tuple[str, ...]:
    """The names of the files in a folder of `moefy/convert`: each is a way to do one stage."""
    files = (CONVERT / folder).glob("[!_]*.py")
    return tuple(sorted(file.stem.replace("_", "-") for file in files))


UNWRITABLE = ("cmoe", "oracle")
"""Routers that look at activations before they choose, which no stock class does."""

TOKENS = {"cpu": 16_384, "cuda": 262_144}
"""Calibration tokens by kind of device, where a recipe leaves them open, which is 0."""

OWN_CLASS_ROUTERS = ("mlp", "position")
"""Routers that moefy's own class holds and no stock class."""

PARTITIONS = _methods("partition")
ROUTERS = tuple(name for name in _methods("router") if name not in UNWRITABLE)
DTYPES = ("as-stored", *COMPUTE_DTYPES[1:])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a conversion, but for the versions of the libraries."""

    model: str = option(MISSING, "Folder, hub id, or `demo`.", argument=True)
    revision: str | None = option(None, "Hub revision (branch, tag or commit).")
    active: float = option(
        0.5, "FFN neurons active per token, shared ones included, as a fraction.", most=1
    )
    experts: int | None = option(None, "Routed experts per layer.", least=2, unset="chosen")
    top_k: int | None = option(
        None,
        "Routed experts that each token goes to.",
        least=1,
        unset="chosen",
        old="experts_per_token",
    )
    shared_fraction: float | None = option(
        None,
        "FFN neurons that are always active, as a fraction.",
        most=1,
        unset="chosen",
        old="shared",
    )
    overlap: float = option(
        1.0,
        "FFN neurons stored, as a multiple of the dense ones; above 1, experts overlap.",
        least=1,
        most=64,
        old="total",
    )
    layers: str = option(
        "auto",
        "Layers to convert: `:` (all), `4:`, `0,3,7`; the rest stay dense. `auto` keeps those "
        "dense that would lose most, where class and engines can, and counts --active over all "
        "layers.",
    )
    drop_layers: str = option(
        "0",
        "Layers to leave out whole: how many, chosen by what their absence costs, or which, e.g. "
        "`24:26` or `3,7`. --active counts all layers of MODEL, these as 0.",
        unset="none",
    )
    method: str | None = option(
        None,
        "Published method, which sets the partition, the router, the refit and their options; "
        "what is given beside it counts.",
        choices=tuple(METHODS),
        unset="ours",
    )
    """None once a recipe is built: then the settings stand in its place."""
    partition: str = option(
        "alternating",
        "Split of the neurons into experts.",
        choices=PARTITIONS,
        old_values=FORMER_PARTITIONS,
    )
    router: str = option(
        "linear",
        "Way to build the routers.",
        choices=ROUTERS,
        unlisted=UNWRITABLE,
        old_values=FORMER_ROUTERS,
    )
    refit: bool = option(True, "Closed-form correction of down_proj.")
    drift: float = key(
        0.5,
        "Share of the residual stream's loss in the layers below that a refit makes good.",
        most=1,
    )
    polish: int = option(
        0,
        "Passes over the calibration tokens that train each layer's neurons against its output, "
        "behind the refit.",
        most=10_000,
    )
    granularity: int = option(
        1, "Slices of each copy of the FFN, for --method upcycle; a power of two.", least=1, most=64
    )
    noise: float = option(
        0.0, "Noise on the weights of copies, as a multiple of their standard deviation.", most=1
    )
    reinit: float = option(0.0, "Share of the neurons of each copy that are drawn anew.", most=1)
    target: str = option("auto", "Stock class to write, or `auto`.")
    shadow: float = option(0.0, "Memory for backups of experts, as a fraction of theirs.", most=1)
    engines: str = option(
        "",
        "Engines that must run the result, e.g. `llama.cpp,vllm`; the shape of the experts is "
        "chosen to be fast in them.",
        unset="any; shape for transformers",
    )
    calibration: str = option(
        "self",
        "File or folder of text, rows or chats; data set id; or `self` for text that the model "
        "writes.",
    )
    text_field: str = option("text", "Field of rows that holds the text.")
    tokens: int = option(0, "Calibration tokens.", unset="16,384, or 262,144 on a GPU")
    minutes: float | None = option(
        None,
        "Time of the conversion, in minutes: it takes as many calibration tokens as fit, instead "
        "of --tokens.",
        least=0.1,
        unset="any",
    )
    """None once a conversion is prepared: then `tokens` stands in its place."""
    sequence_length: int = option(512, "Tokens per sequence.", least=8)
    stratify: bool = key(True, "Calibration documents of each kind of text in about its share.")
    # Layers draw from seed * 1,000,003 + layer, which 64 bits must hold.
    seed: int = option(0, "Random seed.", most=2**32 - 1)
    dtype: str = option(
        "as-stored", "Dtype of the FFNs and routers that are written.", choices=DTYPES
    )
    compute_dtype: str = option(
        "auto",
        "Dtype in which the dense model writes calibration text; `auto` is the stored one, or "
        "float32 where the machine lacks it.",
        choices=COMPUTE_DTYPES,
    )
    max_shard_size: str = option("5GB", "Largest file of the result, e.g. 5GB or 200MiB.")
    ignore_index: bool = key(False, "Tensors as the shards hold them, whatever their index says.")
    device: str = option("auto", "Device: auto, cpu, cuda or cuda:N.")
    partition_options: Mapping[str, Any] = key(
        dict, "Options of the partition: `--set partition.KEY=VALUE`."
    )
    router_options: Mapping[str, Any] = key(dict, "Options of the router, e.g. router.load_cv=0.5.")


AMOUNT = ("tokens", "minutes")
"""Two ways to say how much calibration text there is to be."""

TABLES = ("partition_options", "router_options")
ADDED = ("made", "inputs", "finetune", "report")
"""Tables of a recipe that a run or a later stage adds; they are not the conversion's."""


def build(
    file: Path | None,
    flags: Mapping[str, Any],
    settings: list[str],
    note: Note = lambda line: None,
) -> Recipe:
    """A checked recipe from a TOML file, then flags that are not None, then `key=value` settings.

    A name of an earlier version is taken as well, and `note` gets a line about it.

    Raises:
        MoefyError: code 2 for an unknown key, a value of the wrong type or out of range.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    for layer in (read(file) if file else {}, given):
        if layer.keys() & {*AMOUNT}:  # a flag for one overrules the other in a file
            values = {key: value for key, value in values.items() if key not in AMOUNT}
        values |= _expanded(check(Recipe, layer, note))
    for setting in sorted(settings, key=lambda setting: not setting.startswith("method=")):
        key, value = _stage_option(values, *parse_setting(setting))
        values |= _expanded(check(Recipe, {key: value}, note))
    if "model" not in values:
        raise MoefyError("no MODEL given; expected a folder, a hub id or `demo`", code=2)
    recipe = Recipe(**located(values, "model", "calibration"))
    if values.keys() >= {*AMOUNT}:
        raise MoefyError(
            f"--tokens is {recipe.tokens:,} and --minutes is {recipe.minutes:g}; expected one of "
            "them",
            code=2,
        )
    if "tokens" in values and recipe.tokens < 8 * recipe.sequence_length:
        raise MoefyError(
            f"--tokens is {recipe.tokens:,}; expected at least {8 * recipe.sequence_length:,}, "
            "which is 8 sequences",
            code=2,
        )
    num_bytes(recipe.max_shard_size)
    return recipe


def read(file: Path) -> dict[str, Any]:
    """The keys of a recipe file that are the conversion's."""
    return {key: value for key, value in read_toml(file).items() if key not in ADDED}


def render(recipe: Recipe, **extra: Mapping[str, Any]) -> str:
    """The recipe as TOML that `read` gives back, with `extra` tables behind it."""
    values = dataclasses.asdict(recipe)
    tables = {**{key: values.pop(key) for key in TABLES}, **extra}
    return render_keys(values) + "".join(
        render_table(name, table) for name, table in tables.items() if table or name in extra
    )


def method_of(recipe: Mapping[str, Any]) -> str:
    """The published method whose settings a recipe has, and what differs from the nearest one.

    >>> method_of(vars(Recipe("demo", partition="expertweaver", router="expertweaver")))
    'expertweaver with refit=true'
    """
    recipe = _settings("ours") | renamed(Recipe, recipe)
    differences = {
        name: {
            key: recipe[key]
            for key, value in _settings(name).items()
            if recipe.get(key, value) != value
        }
        for name in METHODS
    }
    name, rest = min(differences.items(), key=lambda item: ("partition" in item[1], len(item[1])))
    words = [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in rest.items()]
    return f"{name} with {' '.join(words)}" if words else name


def _settings(method: str) -> dict[str, Any]:
    """All that a method sets."""
    return {part: fields(Recipe)[part].default for part in PARTS} | dict(METHODS[method])


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the settings of their `method` in its place, but for those given beside it.

    A stage that is given beside the method has no options of the method's own stage.
    """
    if "method" not in values:
        return values
    settings = _settings(values["method"])
    for stage in ("partition", "router"):
        if values.get(stage, settings[stage]) != settings[stage]:
            settings[f"{stage}_options"] = {}
    return {**settings, **{key: value for key, value in values.items() if key != "method"}}


def num_bytes(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes that a size like `5GB` stands for.

    transformers reads such sizes too, but takes seconds to import.

    >>> num_bytes("5GB"), num_bytes("1.5 kb"), num_bytes("2MiB")
    (5000000000, 1500, 2097152)

    Raises:
        MoefyError: code 2, for what is no size, or less than a byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    number, prefix, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
    if size < 1 or (binary and not prefix):
        raise MoefyError(f"{flag} is {text!r}; expected a size like 5GB", code=2)
    return size


def _stage_option(values: Mapping[str, Any], key: str, value: Any) -> tuple[str, Any]:
    """A setting, where `partition.rounds=6` adds to the options of the partition."""
    stage, dot, option = key.partition(".")
    table = f"{stage}_options"
    if dot and table in TABLES:
        return table, {**values.get(table, {}), option: value}
    return key, value
