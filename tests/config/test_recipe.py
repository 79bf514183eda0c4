"""A recipe comes back from its file as it was, and what is wrong in one is named in one line."""

import dataclasses
import importlib
import math
import re
import string
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import moefy
from moefy.config import finetune
from moefy.config.layer_names import chosen_layers
from moefy.config.methods import FORMER_PARTITIONS, FORMER_ROUTERS, METHODS
from moefy.config.options import fields, nearest
from moefy.config.recipe import Recipe, build, method_of, num_bytes, read, render
from moefy.convert.stages import options_of, stages
from moefy.errors import MoefyError

EVERYTHING = Recipe(
    shadow=0.15,
    model="owner/name",
    revision="main",
    active=0.3125,
    experts=16,
    top_k=3,
    shared_fraction=1e-3,
    drop_layers="1",
    layers="4:,0",
    partition="shuffle",
    router="random",
    refit=False,
    drift=0.25,
    polish=4,
    overlap=2.0,
    granularity=2,
    noise=0.25,
    reinit=0.75,
    target="qwen2_moe",
    engines="vllm,llama.cpp",
    calibration="text.txt",
    text_field="content",
    tokens=4096,
    sequence_length=256,
    stratify=False,
    seed=2**32 - 1,
    dtype="bfloat16",
    compute_dtype="float32",
    device="cpu",
    partition_options={"rounds": 6, "sample": 4096},
    router_options={"strength": 2.5e-05, "steps": 0, "on": True, "names": ["a", 'b"', 1, 0.5]},
    max_shard_size="200MB",
    ignore_index=True,
)
AWKWARD = [
    'say "no"',
    "C:\\models\\new",
    "two\nlines",
    "tab\there",
    "\x00\x1b[31m\x7f",
    "no\u00a0break",
    "\u8def\u5f84 \u00e9\u00e8 \U0001f600",
    "\U000e0001 tag",  # not printable, and beyond four hexadecimal digits
    "line\u2028separator",
    "'''",
    '"""',
    "# no comment",
    "[made]",
    "",
    " ",
    string.printable,
]


def refusal(*fragments: str, flags: dict | None = None, settings: list | None = None, file=None):
    """The line that `build` refuses its input with."""
    with pytest.raises(MoefyError) as caught:
        build(file, {"model": "demo"} if flags is None else flags, settings or [])
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


def round_trip(recipe: Recipe, folder, **extra) -> Recipe:
    file = folder / "recipe.toml"
    file.write_text(render(recipe, **extra), encoding="utf-8")
    return Recipe(**read(file))


# There and back


def test_everything_comes_back(tmp_path):
    plain = {spec.name for spec in dataclasses.fields(Recipe)} - {"method", "minutes"}
    changed = dataclasses.asdict(EVERYTHING)
    assert {name for name in plain if changed[name] != getattr(Recipe("demo"), name)} == plain
    assert round_trip(EVERYTHING, tmp_path) == EVERYTHING
    assert build(tmp_path / "recipe.toml", {}, []) == EVERYTHING


def test_defaults_come_back(tmp_path):
    assert round_trip(Recipe("demo"), tmp_path) == Recipe("demo")


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_any_text_comes_back(text, tmp_path):
    recipe = Recipe(text, calibration=f"{text}{text}", partition_options={text: text, "b": [text]})
    assert round_trip(recipe, tmp_path) == recipe
    # No line of the file ends inside a string, whatever counts as the end of a line.
    lines = render(recipe).splitlines()
    assert all(tomllib.loads(line) for line in lines if line and not line.startswith("["))


@pytest.mark.parametrize("number", [0.1 + 0.2, 1e-20, 1e20, 5e-324, 123456789.123, math.inf])
def test_any_number_comes_back(number, tmp_path):
    recipe = Recipe("demo", active=number, router_options={"strength": -number})
    assert round_trip(recipe, tmp_path) == recipe


def test_what_a_run_adds_is_written_and_not_read_back(tmp_path):
    made, inputs = {"torch": "2.13.0", "moefy": "0.1"}, {"model.safetensors": "ab\\c"}
    assert round_trip(EVERYTHING, tmp_path, made=made, inputs=inputs) == EVERYTHING
    tables = tomllib.loads((tmp_path / "recipe.toml").read_text(encoding="utf-8"))
    assert (tables["made"], tables["inputs"]) == (made, inputs)


# What is wrong


@pytest.mark.parametrize(
    ("key", "meant"),
    [("expert", "experts"), ("sequence_lenght", "sequence_length"), ("Tokens", "tokens")],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, meant, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(f'model = "demo"\n{key} = 1\n')
    message = refusal(f"unknown recipe key '{key}'", f"did you mean {meant}?", file=file)
    assert message == refusal(settings=[f"{key}=1"])
    assert all(name in message for name in fields(Recipe))


def test_a_key_like_no_other_gets_no_suggestion():
    assert "did you mean" not in refusal("unknown recipe key 'zzzz'", settings=["zzzz=1"])
    assert nearest("zzzz", ["linear", "random"]) == "expected one of linear, random"


def test_of_many_names_the_nearest_are_named():
    """lm-eval has some 13,000 tasks."""
    known = [f"task_{number}" for number in range(12_999)] + ["piqa"]
    assert nearest("piqaa", known) == "expected one of 13,000 names; did you mean piqa?"
    assert nearest("zzzz", known) == "expected one of 13,000 names"
    assert "piqa" in nearest("zzzz", known[-20:])  # the negative control: few are all named


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("tokens=many", "str"),
        ("tokens=1e5", "int"),
        ("tokens=true", "int"),
        ("seed=0.5", "int"),
        ("experts=8.0", "int"),
        ("active=half", "float"),
        ("active=true", "float"),
        ("shared_fraction=[0.5]", "float"),
        ("refit=1", "bool"),
        ("refit=yes", "bool"),
        ("layers=3", "str"),
        ("model=7", "str"),
        ("partition_options=5", "table"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(setting, expected):
    key, _, value = setting.partition("=")
    expected = {"tokens=many": "int"}.get(setting, expected)
    refusal(f"{fields(Recipe)[key].flag} is ", f"expected {expected}", settings=[setting])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sequence_length=7", "at least 8"),
        ("tokens=4095", "at least 4,096"),
        ("seed=-1", "at least 0"),
        ("seed=4294967296", "at most 4,294,967,295"),
        ("dtype=float8", "float16"),
        ("active=1.5", "at most 1"),
        ("experts=1", "at least 2"),
        ("top_k=0", "at least 1"),
        ("shared_fraction=nan", "at least 0"),
        ("overlap=0.5", "at least 1"),
        ("overlap=65", "at most 64"),
        ("overlap=nan", "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(setting, expected):
    flag = "--" + setting.partition("=")[0].replace("_", "-")
    refusal(flag, expected, settings=[setting])


def test_no_model_is_refused():
    refusal("no MODEL given", flags={"model": None})


def test_files_that_cannot_be_read_are_refused(tmp_path):
    refusal("cannot read recipe", "No such file", file=tmp_path / "none.toml")
    refusal("cannot read recipe", file=tmp_path)
    for content in (b"model = ", b"\xff\xfe", b"model = 'a'\nmodel = 'b'", b"a\nb"):
        file = tmp_path / "broken.toml"
        file.write_bytes(content)
        refusal("is not TOML", file=file)


# What overrides what


def test_flags_override_the_file_and_settings_override_flags(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'model = "file"\ntokens = 8192\nactive = 0.25\nseed = 1\n'
        "[partition_options]\nrounds = 2\nsample = 99\n"
    )
    flags = {"model": "flag", "active": None, "seed": 2, "refit": False}
    made = build(file, flags, ["seed=3", "partition.rounds=6"])
    assert (made.model, made.active, made.tokens, made.seed) == ("flag", 0.25, 8192, 3)
    assert made.refit is False
    assert made.partition_options == {"rounds": 6, "sample": 99}


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("active=0.25", "active", 0.25),
        ("active=1", "active", 1),
        (" experts = 4 ", "experts", 4),
        ("sequence-length=64", "sequence_length", 64),
        ("refit=false", "refit", False),
        ("model=owner/name", "model", "owner/name"),
        ('model="a=b"', "model", "a=b"),
        ("model=a=b", "model", "a=b"),
        ("model=", "model", ""),
        ("calibration=C:\\text", "calibration", "C:\\text"),
        ("layers=0,3,7", "layers", "0,3,7"),
        ("partition.rounds=6", "partition_options", {"rounds": 6}),
        ("router.strength=1e-3", "router_options", {"strength": 1e-3}),
        ("partition.mode=fast", "partition_options", {"mode": "fast"}),
    ],
)
def test_forms_of_settings(setting, key, value):
    assert getattr(build(None, {"model": "demo"}, [setting]), key) == value


def test_settings_of_one_method_add_up():
    made = build(None, {"model": "demo"}, ["router.steps=1", "router.batch=2", "router.steps=3"])
    assert made.router_options == {"steps": 3, "batch": 2}


def test_settings_that_are_none_are_refused():
    refusal("'tokens' has no `=`", settings=["tokens"])
    refusal("unknown recipe key 'refit.a'", settings=["refit.a=1"])
    refusal("unknown recipe key ''", settings=["=1"])
    refusal("partition_options is 5", settings=["partition_options=5", "partition.rounds=6"])


# Names of earlier versions

FORMER = [
    (table, option)
    for table in (Recipe, finetune.Settings)
    for option in fields(table).values()
    if option.option.old
]
BUILDS = {Recipe: build, finetune.Settings: finetune.build}


def test_former_names_are_none_of_today():
    assert len(FORMER) >= 10
    for table, option in FORMER:
        assert option.option.old not in fields(table)


@pytest.mark.parametrize(("table", "option"), FORMER, ids=lambda word: getattr(word, "name", ""))
def test_a_former_name_is_taken_with_a_note(table, option, tmp_path):
    model = {"model": "demo"} if table is Recipe else {}
    value = option.option.choices[-1] if option.option.choices else 1
    setting = f"{option.option.old}={value}"
    head = "" if table is Recipe else "[finetune]\n"
    file = tmp_path / "recipe.toml"
    file.write_text(head + setting.replace(str(value), repr(value)))
    for source in ((file, model, []), (None, model, [setting])):
        notes = []
        result = BUILDS[table](*source, notes.append)
        assert getattr(result, option.name) == value
        assert notes == [f"{option.option.old} is called {option.name} now"]
    both = [setting, f"{option.name}={value}"]
    assert getattr(BUILDS[table](None, model, both), option.name) == value
    notes = []
    BUILDS[table](None, model, [f"{option.name}={value}"], notes.append)
    assert notes == []  # the negative control


def test_a_value_that_cannot_be_read_is_refused():
    refusal("--set tokens: a value of 5,000 characters", settings=["tokens=" + "9" * 5000])
    refusal("--set tokens: a value of 9,000 characters", settings=["tokens=" + "[" * 9000])
    message = refusal(
        "--tokens is 999,999,", "at most 1,000,000,000,000", settings=["tokens=" + "9" * 999]
    )
    assert len(message) < 200


# Published methods

GUIDE = Path(__file__).parents[2] / "recipes" / "guide" / "methods.md"


def test_the_guide_tells_what_each_method_sets():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `(partition=[^`]+)` \|", GUIDE.read_text(), re.M))
    assert list(rows) == list(METHODS)
    for name, settings in rows.items():
        by_name = build(None, {"model": "demo", "method": name}, [])
        assert by_name == build(None, {"model": "demo"}, settings.split())
        assert by_name.method is None
        assert method_of(dataclasses.asdict(by_name)) == name


def test_what_is_given_beside_a_method_counts(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'model = "demo"\npartition = "shuffle"\ndrift = 0.25\n[router_options]\nsteps = 1\n'
    )
    made = build(file, {"method": "cmoe", "router": "linear"}, [])
    assert (made.partition, made.router, made.refit, made.drift) == ("cmoe", "linear", False, 0.5)
    assert made.router_options == {}  # those of the file were for another router
    assert method_of(vars(made)) == "cmoe with router=linear"
    made = build(None, {"model": "demo", "method": "flap", "partition": "moefication"}, [])
    assert made.partition_options == {}
    made = build(None, {"model": "demo"}, ["partition.metric=energy", "method=flap", "refit=true"])
    assert (made.partition_options, made.refit) == ({"metric": "energy"}, True)
    file.write_text('model = "demo"\nmethod = "expertweaver"\nrefit = true\n')
    assert method_of(vars(build(file, {}, []))) == "expertweaver with refit=true"
    assert method_of(vars(build(None, {"model": "demo"}, []))) == "ours"


def test_an_unknown_method_is_answered_with_the_nearest():
    refusal("--method is 'cmo'", "did you mean cmoe?", flags={"model": "demo", "method": "cmo"})


@pytest.mark.parametrize(
    ("key", "former", "now"),
    [("partition", *names) for names in FORMER_PARTITIONS.items()]
    + [("router", *names) for names in FORMER_ROUTERS.items()],
)
def test_a_methods_former_name_is_taken(key, former, now):
    notes = []
    assert getattr(build(None, {"model": "demo", key: former}, [], notes.append), key) == now
    assert notes == [f"{key} {former} is called {now} now"]


# Layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (":", [0, 1, 2, 3, 4, 5]),
        ("0:6", [0, 1, 2, 3, 4, 5]),
        ("4:", [4, 5]),
        (":2", [0, 1]),
        ("2:4", [2, 3]),
        ("3", [3]),
        ("0,3,5", [0, 3, 5]),
        ("5,0,0", [0, 5]),
        ("1:3,2:4", [1, 2, 3]),
        (" 1 , 4: ", [1, 4, 5]),
    ],
)
def test_forms_of_layers(text, layers):
    assert chosen_layers(text, 6) == layers


@pytest.mark.parametrize(
    "text", ["", " ", "3,", ",3", "1,,2", "6", "7:", "4:7", "-1", "-2:", "3:3", "4:2", "a", "0-3",
             "1.5", "0:2:4", "all"],
)  # fmt: skip
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(MoefyError) as caught:
        chosen_layers(text, 6)
    assert caught.value.code == 2
    assert f"--layers {text}" in str(caught.value)
    assert re.search(r"no layers of 0 to 5; expected forms like `:`", str(caught.value))


def test_sizes_of_files_are_those_that_transformers_takes():
    """Judged by huggingface_hub, whose sizes have no binary prefixes."""
    from huggingface_hub.serialization._base import parse_size_to_int

    for size in ("5GB", "200MB", "1KB", "1.5GB"):
        assert num_bytes(size) == parse_size_to_int(size)
    assert num_bytes("2MiB") == 2 * 1024**2 and num_bytes("100") == 100
    for size in ("", "0", "-1GB", "GB", "1 XB", "iB", "1e9", "nan"):
        with pytest.raises(MoefyError, match="--max-shard-size") as caught:
            num_bytes(size)
        assert caught.value.code == 2


# --- ranges of the methods' options --------------------------------------------------------------

STAGES = [
    (package, path.stem.replace("_", "-"))
    for package in ("partition", "router")
    for path in sorted(Path(moefy.__file__).parent.joinpath("convert", package).glob("[!_]*.py"))
]


def ranges(package: str, name: str) -> dict[str, tuple]:
    """Option -> its type and its range, of a method's numbers."""
    module = importlib.import_module(f"moefy.convert.{package}.{name.replace('-', '_')}")
    stage = module.split if package == "partition" else module.fit
    hints = {key: hint for key, (_, hint) in options_of(stage).items()}
    kinds = {key: (get_args(hint) or (hint, None)) for key, hint in hints.items()}
    return {key: kind for key, kind in kinds.items() if kind[0] in (int, float)}


@pytest.mark.parametrize(("package", "name"), STAGES)
def test_an_option_out_of_its_range_is_refused(package, name):
    for key, (kind, span) in ranges(package, name).items():
        assert span is not None, f"{key} has no range"
        outside = [-1, span.most * 2, 2**80, span.least / 2 if kind is float else span.least - 1]
        values = [kind(value) for value in outside if value < span.least or value > span.most]
        values += [float("nan"), float("inf"), -float("inf"), "7", True, None]
        for value in values:
            options = {"partition" if package == "partition" else "router": name}
            table = "partition_options" if package == "partition" else "router_options"
            recipe = Recipe("m", **options, **{table: {key: value}})
            with pytest.raises(MoefyError, match=key) as caught:
                stages(recipe, control=True)
            assert caught.value.code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["least", "most"])
@pytest.mark.parametrize(("package", "name"), [("partition", "alternating"), ("router", "linear")])
def test_an_option_at_the_end_of_its_range_is_taken(package, name, end):
    for key, (kind, span) in ranges(package, name).items():
        table = "partition_options" if package == "partition" else "router_options"
        stages(Recipe("m", **{table: {key: kind(getattr(span, end))}}))
