"""Advice on planted numbers, and the conditions that hold for them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from moefy.errors import MoefyError
from moefy.evaluate import fail_if, prompts
from moefy.evaluate.advice import advice
from moefy.evaluate.benchmarks import compared
from moefy.evaluate.metrics import needed_errors
from moefy.evaluate.sizes import ideals
from moefy.evaluate.speed import measure
from moefy.evaluate.timed_rounds import Grid, label_rows, stretches


def speed_row(ratio, low, high, phase="decode", batch=1):
    return {
        "label": "converted",
        "phase": phase,
        "batch": batch,
        "context": 128,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
    }


def report(rows=(), **more):
    speed = {"transformers": {"threads": 2, "ideal_ratio": {}, "rows": list(rows)}}
    return {"speed": speed if rows else {}, "texts": {}, "models": {}, "routing": {}} | more


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict", "says"),
    [
        (1.30, 1.20, 1.40, "pays", "Faster"),
        (0.70, 0.60, 0.80, "does not pay", "SLOWER"),
        # One round against it, or too little: that is no recommendation.
        (1.30, 0.95, 1.60, "does not pay", "No faster"),
        (1.03, 1.02, 1.04, "does not pay", "No faster"),
        (0.97, 0.96, 0.98, "does not pay", "No faster"),
        (0.70, 0.60, 1.10, "does not pay", "No faster"),
    ],
)
def test_speed_is_told_as_it_was_measured(ratio, low, high, verdict, says):
    (one,) = advice(report([speed_row(ratio, low, high)]), "converted")
    assert one["verdict"] == verdict
    assert one["sentence"].startswith(says)
    assert f"{ratio:.2f} times" in one["sentence"] and "batch 1" in one["sentence"]
    assert one["because"]["rows"][0]["ratio"] == ratio


def test_what_falls_out_alike_is_told_at_once_and_nothing_else_is():
    rows = [
        speed_row(0.7, 0.6, 0.8),
        speed_row(1.5, 1.4, 1.6, batch=8),
        speed_row(0.8, 0.7, 0.9, batch=32),
        speed_row(1.2, 1.1, 1.3, "prefill"),
    ]
    sentences = advice(report(rows), "converted")
    assert [one["verdict"] for one in sentences] == ["pays", "does not pay", "pays"]
    assert [one["because"]["phase"] for one in sentences] == ["prefill", "decode", "decode"]
    assert (
        "writing at batch 1 (128 tokens) and 32 (128 tokens): 0.70 to 0.80"
        in (sentences[1]["sentence"])
    )
    assert "0.60 to 0.90 over the rounds" in sentences[1]["sentence"]
    assert [row["batch"] for row in sentences[1]["because"]["rows"]] == [1, 32]


def test_what_was_not_measured_is_not_recommended():
    (one,) = advice(report(), "converted")
    assert one["verdict"] == "not measured"


@pytest.mark.parametrize(("cores", "busy"), [(0.2, True), (0.95, False), (1.9, False)])
def test_a_busy_machine_is_told_before_its_speeds(cores, busy):
    measured = report([speed_row(1.3, 1.2, 1.4)])
    measured["speed"]["transformers"]["cores"] = cores
    sentences = advice(measured, "converted")
    assert ("are unreliable" in sentences[0]["sentence"]) == busy
    assert len(sentences) == 1 + busy


def scores(own, static, gain_error, windows=20):
    def row(dnll):
        return {
            "dnll": dnll,
            "dnll_standard_error": 0.1,
            "perplexity": 10 * math.exp(dnll),
            "windows": windows,
            "gain_over_static": static - dnll,
            "gain_standard_error": gain_error,
        }

    return {"wiki": {"dense": row(0.0), "converted": row(own), "static": row(static)}}


@pytest.mark.parametrize(
    ("own", "static", "error", "windows", "verdict", "says"),
    [
        (0.5, 0.8, 0.05, 20, "pays", "routing saves 0.300"),
        (0.5, 0.8, 0.05, 2, "does not pay", "may be chance"),  # six errors of two windows
        (0.5, 0.8, 0.20, 20, "does not pay", "may be chance"),
        (0.9, 0.8, 0.01, 20, "does not pay", "NO MORE"),
        (0.5, 0.8, None, 1, "does not pay", "may be chance"),
    ],
)
def test_quality_is_held_against_static_pruning(own, static, error, windows, verdict, says):
    (_, one) = advice(report(texts=scores(own, static, error, windows)), "converted")
    assert one["verdict"] == verdict and says in one["sentence"]


def test_student_t():
    assert needed_errors(2) == pytest.approx(12.706, rel=1e-4)
    assert needed_errors(4) == pytest.approx(3.182, rel=1e-3)
    assert needed_errors(1) is None


@pytest.mark.parametrize(
    ("own", "verdict", "says"),
    [(120, "does not pay", "NO MEMORY IS SAVED"), (80, "pays", "memory is saved")],
)
def test_memory(own, verdict, says):
    sizes = {"parameters_total": 10, "parameters_active": 5}
    models = {"dense": {"weight_bytes": 100}, "converted": {"weight_bytes": own, **sizes}}
    (_, one) = advice(report(models=models), "converted")
    assert one["verdict"] == verdict and says in one["sentence"]


def test_dead_experts_are_told_with_their_layers():
    layers = [{"layer": 0, "dead": 0}, {"layer": 3, "dead": 2}]
    (_, one) = advice(report(routing={"converted": {"layers": layers}}), "converted")
    assert "2 dead experts" in one["sentence"] and "layers 3" in one["sentence"]


# Conditions

MEASURED = {
    "texts": {
        "wiki": {"converted": {"dnll": 0.3, "kl": 0.2}},
        "code": {"converted": {"dnll": 0.05, "kl": 0.1}},
    },
    "routing": {"converted": {"layers": [{"load_cv": 0.4, "entropy": 0.9, "dead": 1}]}},
    "speed": {"transformers": {"rows": [speed_row(0.7, 0.6, 0.8)]}},
    "not_run": [],
}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("dnll>0.1", ["dnll is 0.3 on wiki"]),
        ("dnll > 0.01", ["on wiki", "on code"]),
        ("dnll>0.5", []),
        ("dnll > 0.01 and dnll < 0.1", ["on code"]),
        ("dnll > 3e-1 or dnll < .1", ["on code"]),
        ("dead > 0 and load_cv > 0.3", ["dead is 1, load_cv is 0.4"]),
        ("dnll > 0.2 and kl < 0.2 or dead > 1", []),
        ("dead > 1 or dnll > 0.2 and kl >= 0.2", ["dead is 1, dnll is 0.3, kl is 0.2 on wiki"]),
        ("decode_ratio < 1", ["decode_ratio is 0.7"]),
        ("dnll < -1", []),
        # What was not measured does not let a gate open.
        ("prefill_ratio < 1", ["prefill_ratio was not measured"]),
        ("perplexity > 1", ["perplexity was not measured"] * 2),
    ],
)
def test_conditions(text, fails):
    lines = fail_if.failures(fail_if.parse(text), MEASURED, "converted")
    assert len(lines) == len(fails)
    assert all(say in line for say, line in zip(fails, lines, strict=True)), lines


@pytest.mark.parametrize(
    "text",
    [
        "dnll",
        "",
        "dnll>",
        "dnll == 0.1",
        "__import__('os').system('true') > 0",
        "dnll.real > 0",
        "dnll + 1 > 0",
        "(lambda: 1)() > 0",
        "dnll > 'a'",
        "dnll > True",
        "dnll > 1j",
        "dnll > 0; dnll",
        "[dnll][0] > 0",
        "(" * 400 + "dnll",
        "dnll > 0 or",
        "dnll > 0 and or dead > 0",
        "not dead > 0",
        "0.1 < dnll",
        "dnll > nan",
    ],
)
def test_what_is_no_condition(text):
    with pytest.raises(MoefyError) as refused:
        fail_if.parse(text)
    assert refused.value.code == 2


def test_a_metric_that_is_not_known_is_named():
    with pytest.raises(MoefyError, match="did you mean dnll"):
        fail_if.parse("dnl>0.1")


# Significance


def scored(values, metric="acc", higher=True):
    named = {f"task/{number}": value for number, value in enumerate(values)}
    return {"metric": metric, "values": named, "higher_is_better": higher}


def test_right_or_wrong_is_mcnemars():
    dice = np.random.default_rng(0)
    dense = dice.integers(0, 2, 200)
    own = np.where(dice.random(200) < 0.15, 1 - dense, dense)
    row = compared(scored(own.tolist()), scored(dense.tolist()))
    won, lost = int(((own == 1) & (dense == 0)).sum()), int(((own == 0) & (dense == 1)).sum())
    assert row["difference"] == pytest.approx(own.mean() - dense.mean())
    # The textbook's sum over the tail, both ways.
    few = min(won, lost)
    tail = sum(math.comb(won + lost, n) for n in range(few + 1)) / 2 ** (won + lost)
    assert row["p_value"] == pytest.approx(min(1, 2 * tail))


def test_a_model_is_not_significantly_other_than_itself():
    dense = scored([0, 1, 1, 0])
    assert compared(scored([0, 1, 1, 0]), dense)["p_value"] == 1
    loose = [(-5.0, 3), (-9.0, 5), (-2.0, 2)]
    row = compared(scored(loose, "bits_per_byte", False), scored(loose, "bits_per_byte", False))
    assert row["p_value"] == 1 and row["difference"] == 0


def test_likelihoods_are_compared_by_a_paired_bootstrap():
    dice = np.random.default_rng(0)
    weights = dice.integers(50, 150, 60)
    hard = weights * dice.normal(1.0, 0.4, 60)  # far more than what tells the models apart
    better = [(-float(h), int(w)) for h, w in zip(hard, weights, strict=True)]
    worse = [(-float(h + 0.02 * w), int(w)) for h, w in zip(hard, weights, strict=True)]
    row = compared(scored(worse, "bits_per_byte", False), scored(better, "bits_per_byte", False))
    assert row["value"] == pytest.approx(
        (hard.sum() / weights.sum() + 0.02) / math.log(2), rel=1e-9
    )
    assert row["difference"] == pytest.approx(0.02 / math.log(2), rel=1e-6)
    assert row["p_value"] < 0.01
    unpaired = stats.ttest_ind([a / b for a, b in worse], [a / b for a, b in better]).pvalue
    assert unpaired > 0.3  # the negative control: without pairs nothing would be seen


# Prompts


def test_the_worst_tenth_is_flagged_if_it_is_worse():
    rows = [{"scores": {"dense": -1.0, "moe": -1.0 - drop / 10}} for drop in range(20)]
    rows = prompts.regressions(rows, "moe")
    assert [number for number, row in enumerate(rows) if row["flagged"]] == [18, 19]
    assert rows[19]["drop"] == pytest.approx(1.9)
    same = prompts.regressions([{"scores": {"dense": -1.0, "moe": -1.05}}] * 3, "moe")
    assert not any(row["flagged"] for row in same)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompts in it"),
        ("hello", "line 1: not valid JSON"),
        ('{"prompt": "a"}\n["b"]', "line 2: the row is list; expected an object"),
        ('{"prompt": "a", "answer": ""}', "an empty answer"),
        ('{"prompt": 3}', "no prompt"),
    ],
)
def test_prompts_that_cannot_be_read(content, says, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(MoefyError, match=says):
        prompts.read_prompts(tmp_path / "p.jsonl", None)
    with pytest.raises(MoefyError, match="no readable"):
        prompts.read_prompts(tmp_path / "none.jsonl", None)


# Speed


class Clocked:
    """A model that takes the time that it is told to, on a clock of its own."""

    dtype = torch.float32

    def __init__(self, clock: list[float], per_token: float) -> None:
        self.clock, self.per_token, self.calls = clock, per_token, []
        self.cache = self

    def __call__(self, ids_BT, **options):
        self.calls.append(tuple(ids_BT.shape))
        self.clock[0] += self.per_token * ids_BT.numel()
        return self


def test_a_planted_slow_model_is_slow_and_is_said_to_be():
    clock = [0.0]
    models = {"dense": Clocked(clock, 0.001), "converted": Clocked(clock, 0.002)}
    grid = Grid(((1, 32), (8, 16)), rounds=3, new_tokens=4)
    result = measure(
        {label: lambda dtype, model=model: model for label, model in models.items()},
        torch.arange(500),
        grid,
        dtypes=[torch.float32],
        clock=lambda: clock[0],
    )
    rows = [row for row in result["rows"] if row["label"] == "converted"]
    places = [(row["phase"], row["batch"], row["context"]) for row in rows]
    assert places == [("prefill", 1, 32), ("prefill", 8, 16), ("decode", 1, 32), ("decode", 8, 16)]
    assert all(row["ratio"] == pytest.approx(0.5) for row in rows)
    assert all(row["tokens_per_second"] == pytest.approx(500) for row in rows)
    speed = {"transformers": {**result, "ideal_ratio": {}, "cores": 1.0}}
    sentences = advice(report() | {"speed": speed}, "converted")
    assert [one["sentence"][:6] for one in sentences] == ["SLOWER"] * 2
    # Both read the same: so many stretches, then a token of each at a time, in every round.
    assert models["dense"].calls == models["converted"].calls
    assert models["dense"].calls[:5] == [(1, 32), *[(1, 1)] * 4]


def test_only_what_takes_long_is_spared_the_third_round():
    clock = [0.0]
    models = {"dense": Clocked(clock, 0.05), "converted": Clocked(clock, 0.05)}
    grid = Grid(((1, 32), (8, 16)), rounds=4, new_tokens=4)
    result = measure(
        {label: lambda dtype, model=model: model for label, model in models.items()},
        torch.arange(500),
        grid,
        dtypes=[torch.float32],
        clock=lambda: clock[0],
    )
    assert {(row["batch"], row["rounds"]) for row in result["rows"]} == {(1, 4), (8, 2)}


def test_ratios_are_taken_within_rounds():
    """A machine that halves its speed in the second round changes no ratio."""
    rows = label_rows({"dense": [1.0, 2.0, 1.0], "moe": [0.5, 1.0, 0.5]}, tokens=10)
    assert rows[1]["ratio"] == rows[1]["ratio_low"] == rows[1]["ratio_high"] == 2
    assert (rows[1]["low"], rows[1]["tokens_per_second"], rows[1]["high"]) == (10, 20, 20)


def test_stretches_are_of_the_text_and_differ():
    text_T = torch.arange(50)
    ids_BT = stretches(text_T, 4, 60, 1)
    assert ids_BT.shape == (4, 60)
    assert ((ids_BT[:, 1:] - ids_BT[:, :-1]) % 50 == 1).all()
    assert len({int(row[0]) for row in ids_BT}) == 4


def test_ideals_by_hand():
    dense = {"flops_per_token": 200, "weight_bytes": 100, "embedding_bytes": 0, "experts": None}
    # 20 always on, 80 in 8 experts of which 2 run: 40 in all for one token.
    moe = {"flops_per_token": 80, "weight_bytes": 110, "weight_bytes_active": 50}
    moe |= {"embedding_bytes": 10, "experts": [8, 2]}
    ratios = ideals({"dense": dense, "moe": moe}, [1, 2, 1000])["moe"]
    assert ratios["prefill"] == 2.5
    assert ratios["decode"]["1"] == pytest.approx(100 / 40)
    assert ratios["decode"]["2"] == pytest.approx(100 / (20 + 80 * (1 - 0.75**2)))
    assert ratios["decode"]["1000"] == pytest.approx(1)
