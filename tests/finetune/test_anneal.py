"""A training that begins at the dense model, and ends at the run's experts per token."""

import json
import re

import pytest
import stock
import torch
from stopping import stopped_at
from tuned_run import step_rows, weights

from moefy.config.finetune import Settings, build
from moefy.errors import MoefyError
from moefy.finetune import unrefitted
from moefy.finetune.anneal import Annealing, Start, begin
from moefy.finetune.inputs import open_run
from moefy.finetune.layout import Layout
from moefy.finetune.router_hooks import Routing
from moefy.finetune.run import finetune
from moefy.models import families, targets
from moefy.models.shape import no_shared
from moefy.models.targets.target import Split
from moefy.types import FFN, Router, Shape

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}
RATES = {"ce": 0.0, "learning_rate": 3e-4, "rest_learning_rate": 3e-4, "router_learning_rate": 1e-3}
STILL = {"learning_rate": 0.0, "rest_learning_rate": 0.0, "router_learning_rate": 0.0}
DOWN = re.compile(r"(down_proj|w2|output_linear)(\.weight)?$")
PAIRS = [("llama", "qwen2_moe"), ("mistral", "mixtral"), ("gpt2", "moefy")]
PAIRS += [pair for pair in stock.ONE_EACH if pair[1] in ("glm4_moe", "granitemoeshared")]


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **SMALL, **settings}, []))


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


@pytest.mark.parametrize("target", [*stock.TARGETS, stock.OWN])
def test_an_ffn_is_read_back_from_any_class(target):
    family, own = families.load("gpt2" if target == stock.OWN else "llama"), targets.load(target)
    shape = Shape(24, 0, 6, 4, 2) if own.fits is no_shared else Shape(24, 4, 5, 4, 2)
    layout = Layout(targets.load(target, family), shape, family.gated)
    gate_FD, up_FD, down_FD = torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(0))
    ffn = FFN(gate_FD if family.gated else None, up_FD, down_FD.T)
    router = Router(torch.ones(shape.num_experts, 6))
    tensors = layout.target.tensors(Split(ffn, layout.partition, router, 2, torch.float32))
    gate, up = layout.read(tensors)
    assert torch.equal(up, up_FD) and torch.equal(gate, gate_FD[:, : gate.shape[1]])
    assert gate.shape[1] == 6 * family.gated
    assert torch.allclose(layout.read_down(tensors), down_FD.T, rtol=1e-6)
    downs = layout.write(ffn, torch.float32)
    assert set(downs) == {name for name in tensors if DOWN.search(name)}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in downs.items())


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_it_begins_at_the_dense_model(pico, converted, pair):
    family, target = pair
    folder = pico(family, **stock.UNLIKE.get(pair, {}))
    run = converted(folder, **{**stock.some_active(target), "refit": True})
    start = unrefitted.start_of(open_run(run))
    model = stock.opened(run)
    routing = Routing(model, Settings())
    for layer in routing.layers:
        layer.router.train()  # but not GPT-2's dropout
    dense = stock.dense_logits(folder)

    def all_on():
        routing.experts_per_token, routing.gate = start.num_experts, start.gate
        with torch.no_grad():
            return stock.distance(stock.logits(model), dense)

    assert all_on() > 100 * stock.EXACT  # the refit is for fewer
    annealing = begin(start, model, 4)
    assert all_on() < stock.EXACT
    routing.experts_per_token = start.experts_per_token  # the fault of too few
    assert stock.distance(stock.logits(model).detach(), dense) > 100 * stock.EXACT
    (weight, refit), *_ = annealing.refits  # a planted fault: columns of two neurons change places
    assert len(annealing.refits) >= 2 and refit.abs().max() > 0
    with torch.no_grad():
        weight.copy_(weight.flip(-1))
    assert all_on() > 100 * stock.EXACT
    with torch.no_grad():
        weight.copy_(weight.flip(-1))
    for step in range(6):
        annealing.add(annealing.added(step), {})
    written = stock.opened(run).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, written[name], atol=1e-6)


@pytest.mark.parametrize(
    ("most", "least", "steps"), [(8, 2, 10), (32, 5, 7), (128, 1, 40), (4, 4, 3)]
)
def test_the_course_is_a_function_of_the_step(most, least, steps):
    start = Start(lambda model: {}, most, least, 1.0)
    annealing = Annealing(start, steps)
    course = [annealing.experts(step) for step in range(steps + 5)]
    assert course[0] == most and course[steps:] == [least] * 5
    assert course == sorted(course, reverse=True)
    if most > least:
        shares = [annealing.added(step) for step in range(steps + 5)]
        assert shares[0] == 0 and min(shares) >= 0 and sum(shares) == pytest.approx(1)
        assert annealing.blend(steps) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_trained_ends_as_it_was_written(pico, converted, text, tmp_path, dtype):
    run = converted(pico("llama"), dtype=dtype)
    tuned(run, tmp_path / "out", text, anneal=0.5, compute_dtype=dtype, measure_every=0, **STILL)
    new, old = weights(tmp_path / "out"), weights(run)
    close = {"float32": 1e-6, "bfloat16": 0.0}[dtype]  # copies in float32 are exact there
    assert all(torch.allclose(new[name], old[name], atol=close, rtol=0) for name in old)


@pytest.fixture(scope="module")
def annealed(run, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("annealed") / "out"
    return tuned(run, out, text, anneal=0.5, save_every=1, **RATES), out


def test_the_experts_per_token_fall_while_it_learns(annealed, run):
    summary, out = annealed
    shape = json.loads((run / "moefy" / "conversion.json").read_text())["shape"]
    log = step_rows(out)
    falling = [row["experts_per_token"] for row in log[:4]]
    assert falling[0] == shape["num_experts"] and falling[-1] > shape["experts_per_token"]
    assert falling == sorted(falling, reverse=True)
    assert not any("experts_per_token" in row for row in log[4:])
    before, after = (summary["validation"][when]["kl"] for when in ("before", "after"))
    assert log[0]["kl"] < 1e-6 < log[3]["kl"] and after < before
    assert summary["guard"] == []


@pytest.mark.parametrize("step", [2, 6])
def test_stopped_while_they_fall_it_ends_in_the_same_bytes(annealed, run, text, tmp_path, step):
    again = {"anneal": 0.5, "save_every": 1, **RATES}
    with stopped_at(step):
        tuned(run, tmp_path / "out", text, **again)
    tuned(run, tmp_path / "out", text, **again)
    new, old = weights(tmp_path / "out"), weights(annealed[1])
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_what_cannot_begin_at_the_dense_model_is_refused(
    annealed, pico, converted, text, tmp_path, monkeypatch
):
    overlapping = converted(pico("llama"), overlap=2)
    static = converted(pico("llama"), partition="static")
    for folder, says, code in (
        (annealed[1], r"layer 0 of .* as `moefy convert` wrote it, or anneal=0", 4),
        (overlapping, "experts that overlap", 4),
        (static, "a static run has no experts", 2),
    ):
        with pytest.raises(MoefyError, match=says) as caught:
            tuned(folder, tmp_path / "out", text, anneal=0.3)
        assert caught.value.code == code and not (tmp_path / "out").exists()
    for settings in ({"train": "router"}, {"fsdp": 2}, {"balance": "bias"}):
        with pytest.raises(MoefyError, match="--anneal with") as caught:
            build(None, {"anneal": 0.3, **settings}, [])
        assert caught.value.code == 4
