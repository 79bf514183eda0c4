"""recipes/benchmarks/quality.py on a tiny model."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def rows(pico, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The records of two runs, the second of which has nothing left to do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        quality = importlib.import_module("quality")
    finally:
        sys.path.remove(str(BENCHMARKS))
    out = tmp_path_factory.mktemp("quality")
    for _ in range(2):
        quality.main(
            str(pico("llama", max_position_embeddings=1024)),
            calibration=str(text),
            text=[text],
            out=out,
            active="0.5",
            seeds="0",
            methods="ours,static",
            tokens=4096,
            eval_tokens=1024,
            quick=False,
            keep=False,
            table=False,
        )
    return [json.loads(line) for line in (out / "quality.jsonl").read_text().splitlines()]


def test_every_method_has_one_row_with_scores(rows: list[dict], text: Path) -> None:
    assert [row["method"] for row in rows] == ["ours", "static"]
    for row in rows:
        score = row["scores"][text.stem]
        assert sum(score["window_tokens"]) == score["tokens"] > 0
        assert score["kl"] > 0, "a converted model differs from the dense one"


def test_both_methods_are_compared_with_the_same_dense_model(rows: list[dict], text: Path) -> None:
    assert len({row["scores"][text.stem]["dense_perplexity"] for row in rows}) == 1
