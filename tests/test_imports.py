"""A module imports only from lower rows or its own package: never sideways, never up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moefy

PACKAGE = Path(moefy.__file__).parent
ROWS = [
    "__init__",  # may import nothing of moefy, and all may import it: for the version
    "errors",
    "parallel",
    "layout modeling coverage clock environment store compute stock",
    "profile shape headers lock",
    "publish",
    "assign solve kinds recipe shards source families pack rows tokenizer",
    "checkpoint state chat naming",
    "targets cluster balance supported model_config",
    "partition route refit documents",
    "data",
    "walk block oracle routing gradients self_text",
    "validate reopen scan method",
    "job runs",
    "memory",
    "output report describe budget calibration",
    "summary layers",
    "convert plan export",
    "finetune evaluate",
    "progress verify reproduce pipeline",
    "push",
    "cli",
    "__main__",
]
ROW = {name: number for number, names in enumerate(ROWS) for name in names.split()}
TERMINAL = "cli __main__ progress report"
ONLY_IN = {
    "typer": TERMINAL,
    "rich": TERMINAL,
    "jinja2": "report",
    "matplotlib": "report",
    "transformers": ("modeling source stock tokenizer walk finetune evaluate cli"),
    "accelerate": "finetune",
    "peft": "finetune",
}
SLOW_TO_IMPORT = {"torch", "transformers"}


def imports(node: ast.AST, module: str) -> list[list[str]]:
    """The dotted names that one statement of `module` ("families.llama") imports, split."""
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


def faults(module: str, source: str) -> list[str]:
    """What `module`, named from the package root, imports against the rules."""
    tree = ast.parse(source)
    top = module.split(".")[0]
    if top not in ROW:
        return [f"{module} has no row"]
    found = []
    for name in [name for node in ast.walk(tree) for name in imports(node, module)]:
        if top not in ONLY_IN.get(name[0], top).split():
            found.append(f"{module} may not import {name[0]}")
        if name[0] != "moefy" or len(name) == 1 or name[1] in ("__version__", top):
            continue
        if name[1] not in ROW:
            found.append(f"moefy.{name[1]}, imported by {module}, has no row")
        elif ROW[name[1]] >= ROW[top]:
            found.append(f"{module} imports {name[1]}, which is not in a lower row")
    if top in ("cli", "__main__"):
        early = {name[0] for node in run_on_import(tree) for name in imports(node, module)}
        found += [f"{module} imports {slow} at once" for slow in sorted(early & SLOW_TO_IMPORT)]
    return found


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name from the package root."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("module", modules())
def test_rows(module):
    assert faults(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("layout", "from moefy.convert import convert", "layout imports convert"),
        ("solve", "def f():\n    import moefy.assign", "solve imports assign"),
        ("families.llama", "from ..targets import mixtral", "families.llama imports targets"),
        ("partition.__init__", "from .. import route", "partition.__init__ imports route"),
        ("__init__", "from moefy.errors import MoefyError", "__init__ imports errors"),
        ("helpers", "", "helpers has no row"),
        ("walk", "from moefy import helpers", "moefy.helpers, imported by walk, has no row"),
        ("convert", "from rich.progress import track", "convert may not import rich"),
        ("route.linear", "import transformers", "route.linear may not import transformers"),
        ("cli", "try:\n    import torch.nn\nfinally:\n    pass", "cli imports torch at once"),
    ],
)
def test_a_planted_fault_is_found(module, source, fault):
    (found,) = faults(module, source)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("partition.weights", "from moefy.partition.shuffle import split"),
        ("families.__init__", "from . import llama"),
        ("walk", "from moefy import __version__\nfrom moefy.errors import MoefyError"),
        ("cli", "import typer\ndef convert():\n    import torch\n    import moefy.convert"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert faults(module, source) == []
