"""Print a Markdown table of every family with every class that holds it.

    python tests/helpers/families_table.py > recipes/results/families.md

The identity error is the greatest difference of two logits relative to the largest of them, all
experts active and the router's rows zero.
"""

import argparse
import tempfile
from pathlib import Path

import pico
import torch
from stock import (
    GENERATIVE,
    HELD,
    OWNED,
    UNLIKE,
    dense_logits,
    distance,
    generated,
    logits,
    open_all_active,
    opened,
    recipe,
    silence,
    some_active,
)
from transformers.utils import logging

from moefy.config.recipe import build
from moefy.convert.prepare import prepare
from moefy.convert.run import convert
from moefy.models import families

HEADING = """# Every family in every class that holds it

Made by `python tests/helpers/families_table.py` of tiny random models in float32. **error**: the
greatest difference of two logits, relative to the largest, between the dense model and the
converted one with all experts active. **generates**: greedy tokens with a cache are those without.
**saved again**: what `save_pretrained` writes of the loaded model computes the same bits.
"""
ROW = "| {:16} | {:16} | {:29} | {:>8} | {:10} | {:9} |"


def line(family: str, target: str, text: Path) -> str:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pico.build_model(root / "dense", family, UNLIKE.get((family, target), {}))
        pico.build_tokenizer(root / "dense")
        few = {"tokens": 512, "sequence_length": 64, "calibration": str(text)}
        for name, shape in (("all", recipe(target)), ("some", some_active(target))):
            given = {"model": str(root / "dense"), **few, **shape}
            convert(prepare(build(None, given, [])), root / name)
        found = logits(silence(open_all_active(root / "all")))
        error = distance(found, dense_logits(root / "dense"))
        model = opened(root / "some")
        model.save_pretrained(root / "again")
        again = torch.equal(logits(opened(root / "again")), logits(model))
        writes = bool({*families.load(family).tasks} & {*GENERATIVE})
        alike = torch.equal(generated(model, True), generated(model, False)) if writes else None
    words = {True: "yes", False: "NO", None: ""}
    name = type(model).__name__
    return ROW.format(family, target, name, f"{error:.0e}", words[alike], words[again])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        turned = [pico.WORDS[n:] + pico.WORDS[:n] for n in range(40)]
        text.write_text("\n\n\n".join(map(" ".join, turned)))
        print(HEADING)
        heads = ("family", "class", "opened as", "error", "generates", "saved again")
        print(ROW.format(*heads))
        print(ROW.format(*["---"] * len(heads)))
        for pair in [*HELD, *OWNED]:
            print(line(*pair, text), flush=True)
