"""recipes/benchmarks/recovery.py on a tiny model."""

import importlib
import json
from pathlib import Path

import pytest
import typer

from moefy.errors import MoefyError

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
SMALL = ("sequence_length=64", "validation_tokens=512", "batch_size=4", "tokens=2048")


@pytest.fixture
def curve(pico, converted, text, tmp_path, monkeypatch):
    """The tokens of its scores, by settings."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    recovery = importlib.import_module("recovery")

    def curve(*settings, **more):
        out = tmp_path / "curve.jsonl"
        recovery.main(
            converted(pico("llama")),
            data_source=[str(text)],
            text=[text],
            out=out,
            settings=[*SMALL, *settings],
            eval_tokens=2048,
            **{"halvings": 2, "at": [], "control": False, "without_layers": "", **more},
        )
        return [json.loads(line)["tokens"] for line in out.read_text().splitlines()]

    return curve


def test_it_scores_the_start_the_halvings_and_the_end(curve):
    assert curve() == [0, 512, 1024, 2048]


@pytest.mark.parametrize("more", [{"control": True}, {"without_layers": "1"}])
def test_the_dense_model_is_trained_alike(curve, more):
    assert curve(**more, halvings=0) == [0, 2048]


@pytest.mark.parametrize(
    "setting",
    ["hidden=1", "preset=fast", "answers=p.jsonl", "last_stage=0.1", "anneal=0.5", "log_every=3"],
)
def test_what_it_would_ignore_is_refused(curve, setting):
    with pytest.raises(typer.BadParameter, match="is for `moefy finetune` alone"):
        curve(setting)


def test_its_settings_are_checked_as_those_of_finetune(curve):
    with pytest.raises(MoefyError, match="fsdp is 2, and there is 1 process"):
        curve("fsdp=2")
