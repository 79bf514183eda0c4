"""transformers opens a folder of moefy's own class wherever `moefy.modeling` has been imported."""

import re
import subprocess
import sys

import pytest

LATE = """
import importlib.util
import moefy
importlib.util.find_spec("transformers")
import accelerate
import transformers
import moefy.modeling
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def own(pico, converted):
    return converted(pico("gpt2"), target="moefy")


def snippet(folder):
    """The code of a run's card, with the folder in place of its name."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.S | re.M)
    return re.sub(r'from_pretrained\("[^"]*"', f"from_pretrained({str(folder)!r}", code)


def test_the_class_is_known_behind_whatever_looked_for_transformers(own):
    done = python(LATE.format(folder=str(own)) + "print(type(model).__name__)")
    assert done.stdout.strip() == "MoefyForCausalLM", done.stderr[-2000:]


@pytest.mark.parametrize("whole", [True, False])
def test_the_card_imports_what_is_needed(own, whole):
    """As it stands; and without that import transformers does not know the class."""
    code = snippet(own)
    if not whole:
        assert "import moefy.modeling\n" in code
        code = code.replace("import moefy.modeling\n", "import moefy\n")
    done = python(code + "print(type(model).__name__)")
    assert (done.stdout.strip() == "MoefyForCausalLM") is whole, done.stderr[-2000:]
    assert whole or "model type `moefy`" in done.stderr


def test_the_package_itself_imports_and_hooks_nothing():
    code = "import sys; before = [*sys.meta_path]; import moefy; "
    code += "print(before == sys.meta_path, {'torch', 'transformers'} & sys.modules.keys())"
    assert python(code).stdout.strip() == "True set()"
