"""A module imports from lower rows only: rooms of the package, and files within a room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moefy

PACKAGE = Path(moefy.__file__).parent
ROWS = {
    "": [  # the rooms; the last may import nothing of moefy, and all may import it: for the version
        "__main__",
        "cli",
        "pipeline",
        "finetune evaluate",
        "runs",
        "convert",
        "text inspect",
        "report checkpoint",
        "files",
        "environment compute_dtype memory",
        "models",
        "modeling",
        "modeling_router types",
        "config distributed",
        "progress timing",
        "errors",
        "__init__",
    ],
    "checkpoint": [
        "validate",
        "check_finite cut supported",
        "model_config",
        "reload resolve tensor_names tensors",
        "__init__",
    ],
    "config": [
        "finetune report",
        "sources presets",
        "recipe",
        "layer_names methods options toml",
        "course",
        "__init__",
    ],
    "convert": [
        "run",
        "calibration estimate layers",
        "depth disk",
        "memory sensitivity session summary write",
        "prepare",
        "choose",
        "source stages",
        "copies probe",
        "ffn partition router",
        "load_balance cluster polish refit",
        "routed_ffn assign_on_device",
        "assign kmeans forward gradients oracle profile ridge",
        "__init__",
    ],
    "evaluate": [
        "run",
        "engine_speeds measure prepare",
        "quantized",
        "rivals lost_experts",
        "session tables",
        "controls llama_cpp scoring",
        "advice benchmarks candidates dtypes",
        "speed critical_experts expert_masks",
        "behaviour cache cuda_graphs fail_if metrics prompts timed_rounds distribution_shift sizes",
        "frontier ggml shares",
        "__init__",
    ],
    "files": ["resume", "shards", "publish", "buffers lock safetensors_header", "__init__"],
    "finetune": [
        "run",
        "prepare",
        "checks estimate home text write",
        "memory",
        "refit_after",
        "unrefitted",
        "answers probe",
        "inputs",
        "train",
        "lora heldout",
        "trainer",
        "best",
        "checkpoints",
        "optim",
        "router_hooks",
        "router_noise",
        "anneal collapse_guard layout losses teacher",
        "last_stage log_probabilities",
        "__init__",
    ],
    "models": [
        "engines",
        "engine_checks",
        "targets choice",
        "families load routing shape cost",
        "__init__",
    ],
    "report": [
        "terminal __init__",
        "draw",
        "card",
        "pages html",
        "sections",
        "section_experts",
        "section_behaviour section_cost section_frontier section_lost section_quality "
        "section_quantized section_tuned",
        "heatmaps",
        "figures markdown",
        "chart citations document format templates",
    ],
    "runs": [
        "push",
        "gguf reproduce verify",
        "folder",
        "gguf_converter quantize",
        "__init__",
    ],
    "text": [
        "mix self_text",
        "packing windows",
        "documents",
        "chat",
        "rows stratify tokenizer tokens",
        "__init__",
    ],
}
ROW = {
    room: {name: number for number, names in enumerate(rows) for name in names.split()}
    for room, rows in ROWS.items()
}
TERMINAL = "cli __main__ progress report inspect.terminal"
ONLY_IN = {
    "typer": TERMINAL,
    "rich": TERMINAL,
    "jinja2": "report",
    "matplotlib": "report",
    "transformers": "modeling models.load checkpoint.model_config checkpoint.resolve "
    "text.tokenizer convert.forward finetune evaluate runs.gguf_converter cli",
    "accelerate": "finetune",
    "peft": "finetune",
    "torchao": "finetune",
}
SLOW_TO_IMPORT = {"torch", "transformers"}


def imports(node: ast.AST, module: str) -> list[list[str]]:
    """The dotted names that one statement of `module` ("models.families.llama") imports, split."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = ["moefy", *module.split(".")][: -node.level] if node.level else []
        base = [*package, *(node.module.split(".") if node.module else [])]
        return [[*base, alias.name] for alias in node.names]
    return []


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under `node` outside function bodies."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_on_import(child)


def upward(room: str, importer: str, imported: str) -> str | None:
    """What is wrong with `importer` importing `imported`, both names within `room` ("": rooms)."""
    row = ROW[room]
    if missing := next((name for name in (importer, imported) if name not in row), None):
        return f"{missing} has no row in {room or 'the package'}"
    if row[imported] <= row[importer]:
        return f"{importer} imports {imported}, which is not in a lower row"
    return None


def faults(module: str, source: str) -> list[str]:
    """What `module`, named from the package root, imports against the rules."""
    tree = ast.parse(source)
    room, _, inside = module.partition(".")
    part = inside.partition(".")[0]
    if room not in ROW[""]:
        return [f"{room} has no row in the package"]
    if room in ROW and part not in ROW[room]:
        return [f"{part} has no row in {room}"]
    result = []
    for name in [name for node in ast.walk(tree) for name in imports(node, module)]:
        homes = ONLY_IN.get(name[0], room).split()
        if not any(f"{module}.".startswith(f"{home}.") for home in homes):
            result.append(f"{module} may not import {name[0]}")
        if name[0] != "moefy" or len(name) == 1 or name[1] == "__version__":
            continue
        if name[1] != room:
            result.append(upward("", room, name[1]))
        elif room in ROW and len(name) > 2 and name[2] != part and is_module(name[1:3]):
            result.append(upward(room, part, name[2]))
    if room in ("cli", "__main__"):
        early = {name[0] for node in run_on_import(tree) for name in imports(node, module)}
        result += [f"{module} imports {slow} at once" for slow in sorted(early & SLOW_TO_IMPORT)]
    return [fault for fault in result if fault]


def is_module(parts: list[str]) -> bool:
    """Is the dotted name one of a file or a folder of the package, not of what a file holds?"""
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name from the package root."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("module", modules())
def test_rows(module):
    assert faults(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room", ROWS)
def test_a_row_names_what_is_there(room):
    folder = PACKAGE / room
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(ROW[room]) == there - {"__pycache__"}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("types", "from moefy.convert.run import convert", "types imports convert"),
        ("convert.ridge", "def f():\n    import moefy.convert.assign", "ridge imports assign"),
        ("models.families.llama", "from ..targets import mixtral", "families imports targets"),
        ("convert.partition.__init__", "from .. import router", "partition imports router"),
        ("evaluate.scoring", "from moefy.evaluate import controls", "scoring imports controls"),
        ("report.sections", "from moefy.report.card import model_card", "sections imports card"),
        ("__init__", "from moefy.errors import MoefyError", "__init__ imports errors"),
        ("helpers", "", "helpers has no row in the package"),
        ("text.helpers", "", "helpers has no row in text"),
        ("convert.run", "from moefy import helpers", "helpers has no row in the package"),
        ("convert.run", "from rich.progress import track", "convert.run may not import rich"),
        ("convert.router.linear", "import transformers", "convert.router.linear may not import"),
        ("cli", "try:\n    import torch.nn\nfinally:\n    pass", "cli imports torch at once"),
    ],
)
def test_a_planted_fault_is_found(module, source, fault):
    (found,) = faults(module, source)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("convert.partition.moefication", "from moefy.convert.partition.shuffle import split"),
        ("models.families.__init__", "from . import llama"),
        ("convert.run", "from moefy import __version__\nfrom moefy.errors import MoefyError"),
        ("cli", "import typer\ndef convert():\n    import torch\n    import moefy.convert.run"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert faults(module, source) == []
