"""recipes/benchmarks/finetune_plan.py on a tiny model."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


@pytest.mark.slow
def test_it_records_what_was_planned_and_what_was_taken(
    pico, converted, text, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("finetune_plan")
    out = tmp_path / "plans.jsonl"
    options = ["--tokens", "1024", "--sequence-length", "64", "--set", "validation_tokens=512"]
    benchmark.main(
        converted(pico("llama")),
        options=options,
        data=[str(text)],
        out=out,
        case=["--train router"],
    )
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["tokens"]) == ("--train router", 1024)
    for kind in ("planned", "measured"):
        assert row[kind]["tokens_per_second"] > 0
    # A process of Python and torch takes some 500 MB, and a tiny model next to nothing.
    assert 0.5 < row["planned"]["memory_bytes"] / row["measured"]["memory_bytes"] < 2
    assert not list(tmp_path.glob("tmp*"))
