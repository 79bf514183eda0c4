"""The transformers that the package asks for: a range that is tested, and what is used of it."""

import ast
import inspect
import re
import tomllib
import warnings
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from stock import auto_class
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).parents[2]
SOURCES = [file for name in ("moefy", "recipes", "tests") for file in (ROOT / name).rglob("*.py")]
GONE = re.compile(r"past_key_values|cache_params")
"""Names that 5.40 takes away."""


def asked_for() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = (
        requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "transformers"
    )
    return found


def test_the_tested_version_is_in_the_range_that_is_asked_for():
    specifier = asked_for()
    assert version("transformers") in specifier
    # From 5.24 on models take `cache`, and 5.40 takes the old name away.
    assert "5.24.0" in specifier and "5.23.0" not in specifier and "5.40.0" not in specifier


def test_the_packages_beside_it_allow_that_range():
    """Else pip would take a version outside it, or none."""
    for name in ("accelerate", "peft", "lm-eval"):
        for line in requires(name) or ():
            requirement = Requirement(line)
            if requirement.name == "transformers" and not requirement.marker:
                assert version("transformers") in requirement.specifier, line


def names(source: str) -> set[str]:
    """Names, attributes and keywords of a module, its texts aside."""
    tree = ast.parse(source)
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {str(node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword)}


def test_no_module_uses_a_name_that_goes():
    for file in SOURCES:
        assert not any(map(GONE.fullmatch, names(file.read_text(encoding="utf-8")))), file
    for planted in ("model(past_key_values=1)", "model().past_key_values", "cache_params = 1"):
        assert any(map(GONE.fullmatch, names(planted)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_5_text", "lfm2"])
def test_a_step_with_the_cache_is_one_without_and_warns_of_nothing(family, pico):
    model = auto_class(pico(family)).from_pretrained(pico(family), dtype=torch.float32).eval()
    ids_BT = torch.arange(24).view(2, 12)
    logging.warning_once.cache_clear()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(ids_BT, use_cache=False).logits[:, -1:]
        cache = model(ids_BT[:, :-1], use_cache=True, logits_to_keep=1).cache
        step = model(ids_BT[:, -1:], cache=cache, use_cache=True, logits_to_keep=1).logits
    assert step.shape == whole.shape and torch.allclose(step, whole, atol=1e-5)


def test_models_are_opened_with_arguments_that_are_there(pico):
    """`from_pretrained` takes any keyword, and what it does not know goes to the configuration."""
    given = {"dtype": torch.bfloat16, "local_files_only": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(pico("llama"), **given)
    assert model.dtype == torch.bfloat16 and not any(info.values())
    assert not set(given) - {"dtype"} & set(model.config.to_dict())
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


def test_experts_stay_on_disk_by_the_lines_of_the_guide(pico, converted, tmp_path):
    folder = converted(pico("llama"))
    page = Path(__file__).parents[2] / "recipes" / "guide" / "less-memory.md"
    (lines,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    lines = lines.replace("out/", str(folder)).replace("offload/", str(tmp_path))
    names: dict[str, Any] = {}
    exec(lines, names)
    model = names["model"].eval()
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert away == {name for name, _ in model.named_parameters() if ".experts." in name} != set()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_BT = torch.arange(1, 33)[None]
    with torch.inference_mode():
        expected = whole(ids_BT).logits
        assert torch.equal(model(ids_BT).logits, expected)
        # The negative control: they are read from there.
        for file in tmp_path.glob("*.safetensors"):
            save_file({name: 0 * t for name, t in load_file(file).items()}, file)
        assert not torch.allclose(model(ids_BT).logits, expected)
