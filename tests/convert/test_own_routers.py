"""Routers that only moefy's own class holds find what a linear one cannot, and run as written."""

import dataclasses
import shutil

import pytest
import torch
from planted import random_ffn, seeded
from safetensors.torch import load_file, save_file

from moefy.config.recipe import OWN_CLASS_ROUTERS, build
from moefy.convert.partition import shuffle
from moefy.convert.prepare import prepare
from moefy.convert.profile import Inputs, observe
from moefy.convert.router import linear, mlp, position
from moefy.errors import MoefyError
from moefy.evaluate import controls
from moefy.finetune.optim import groups, learning_rates
from moefy.models.load import open_model
from moefy.models.routing import moe_blocks
from moefy.models.targets.target import ROUTER_SCALE
from moefy.runs.verify import verify
from moefy.types import Router, Shape

LENGTH, CALIBRATED = 100, 64
POSITION = {"target": "moefy", "router": "position"}


# What is found


def inputs(num_tokens: int) -> torch.Tensor:
    """Noise, and in the last place a one: no layer has a bias."""
    x_TD = torch.randn(num_tokens, 12, generator=seeded(7))
    x_TD[:, -1] = 1.0
    return x_TD


def found(router, worth_TE: torch.Tensor, monkeypatch, **options: object) -> float:
    """Share of the held-out worth that a router fitted to `worth_TE` keeps with one expert."""
    ffn, shape = random_ffn(0), Shape(48, 8, 5, 8, 1)
    profile = observe(ffn, Inputs(inputs(len(worth_TE)), len(worth_TE) // 4, length=16))
    partition = shuffle.split(ffn, profile, shape, generator=seeded(0))
    monkeypatch.setattr(linear, "energies", lambda *_: worth_TE)
    options = router.Options(load_cv=0.0, **options)
    fitted = router.fit(ffn, profile, partition, shape, generator=seeded(0), options=options)
    best_T = fitted.scores(profile.x_TD, torch.arange(len(worth_TE)) % 16).argmax(1)[
        profile.num_fit :
    ]
    held_TE = worth_TE[profile.num_fit :]
    return float(held_TE.gather(1, best_T[:, None]).sum() / held_TE.max(1).values.sum())


def test_tanh_units_find_a_choice_that_is_no_linear_one(monkeypatch):
    # The first two experts are for small and for large inputs; the others are worth nothing.
    small_T = inputs(1600)[:, 0].abs() < 0.67
    worth_TE = torch.zeros(1600, 5)
    worth_TE[small_T, 0], worth_TE[~small_T, 1] = 1.0, 1.0
    assert found(linear, worth_TE, monkeypatch) < 0.6
    assert found(mlp, worth_TE, monkeypatch) > 0.9
    assert found(mlp, worth_TE, monkeypatch, unit_steps=0) < 0.9  # units by lot


def test_terms_find_a_choice_by_position_and_inputs_do_not(monkeypatch):
    # Expert 0 for the first four places of each sequence, 1 for the others.
    place_T = torch.arange(640) % 16
    worth_TE = torch.zeros(640, 5)
    worth_TE[place_T < 4, 0], worth_TE[place_T >= 4, 1] = 1.0, 1.0
    assert found(linear, worth_TE, monkeypatch) < 0.8
    for beside in (True, False):
        assert found(position, worth_TE, monkeypatch, linear=beside) > 0.95


def test_terms_alone_do_not_look_at_the_input():
    ffn, shape = random_ffn(0), Shape(48, 8, 5, 8, 2)
    profile = observe(ffn, Inputs(torch.randn(240, 12, generator=seeded(1)), 80, length=16))
    partition = shuffle.split(ffn, profile, shape, generator=seeded(0))
    alone = position.Options(linear=False)
    router = position.fit(ffn, profile, partition, shape, generator=seeded(0), options=alone)
    assert not router.weight_ED.any() and router.position_PE.shape == (16, 5)


def test_scores_equal_plain_loops():
    parts = {"weight_ED": (3, 4), "hidden_HD": (6, 4), "output_EH": (3, 6), "position_PE": (2, 3)}
    draws = {name: torch.randn(size, generator=seeded(0)) for name, size in parts.items()}
    router, x_TD = Router(**draws), torch.randn(5, 4, generator=seeded(1))
    score_TE = router.scores(x_TD, torch.tensor([0, 1, 2, 9, 0]))
    for token, row in enumerate((0, 1, 1, 1, 0)):  # behind the last row, that one
        for expert in range(3):
            wanted = router.weight_ED[expert] @ x_TD[token] + router.position_PE[row, expert]
            for unit in range(6):
                answer = torch.tanh(router.hidden_HD[unit] @ x_TD[token])
                wanted = wanted + router.output_EH[expert, unit] * answer
            assert float(score_TE[token, expert]) == pytest.approx(float(wanted), abs=1e-5)


# What is written


@pytest.mark.parametrize("router", OWN_CLASS_ROUTERS)
def test_the_written_class_chooses_as_the_conversion_did(router, pico, converted, tmp_path):
    run = converted(pico("llama"), target="moefy", router=router)
    assert verify(run)["checks"][-1]["passed"]
    broken = shutil.copytree(run, tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("gate.output", "gate.position")):
            tensors[name] = -4 * tensors[name].flip(0)
    save_file(tensors, file, {"format": "pt"})
    model, other = (open_model(folder)[0].eval() for folder in (run, broken))
    ids = torch.randint(3, 128, (1, CALIBRATED), generator=seeded(0))
    with torch.inference_mode():
        assert not torch.allclose(model(ids).logits, other(ids).logits, atol=1e-3)


def test_places_count_on_in_a_cache_and_the_last_term_holds_beyond(pico, converted):
    model = open_model(converted(pico("llama"), **POSITION))[0].eval()
    blocks = moe_blocks(model)
    for number, block in enumerate(blocks):  # so large that only the place decides
        draw_PE = torch.randn(CALIBRATED, block.num_experts, generator=seeded(number))
        block.router.position.data = draw_PE * 1e3
    ids = torch.randint(3, 128, (2, LENGTH), generator=seeded(0))
    seen: list[torch.Tensor] = []
    blocks[1].router.register_forward_hook(lambda module, args, out: seen.append(out[2]))
    with torch.inference_mode():
        whole = model(ids).logits
        first = model(ids[:, :70], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"  # transformers renames it
        parts = [first.logits]
        for place in range(70, LENGTH):
            parts.append(model(ids[:, place, None], **{name: first[name]}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    k = blocks[1].router.top_k
    last_K = draw_PE[-1].topk(k).indices  # of the last block
    index_BTK = seen[0].view(2, LENGTH, k)
    assert (index_BTK[:, CALIBRATED - 1 :] == last_K).all()
    assert not (index_BTK[:, : CALIBRATED - 1] == last_K).all()
    assert torch.equal(seen[-1], last_K.expand(2, k))


def test_a_finetune_trains_all_of_a_router_at_the_rates_of_its_scales(pico, converted):
    model = open_model(converted(pico("llama"), target="moefy", router="mlp"))[0]
    rates = learning_rates(model, "router", {"router": 1e-3})
    found = groups(model, "router", rates)
    rates = {id(p): group["lr"] for group in found for p in group["params"]}
    for block in moe_blocks(model):
        for name, parameter in block.router.named_parameters():
            assert rates.pop(id(parameter)) == 1e-3 * (1 if name == "hidden" else ROUTER_SCALE)
    assert not rates
    ids = torch.randint(3, 128, (1, 16), generator=seeded(0))
    model.train()(ids, labels=ids).loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for group in found for p in group["params"])


# What is refused, and compared


@pytest.mark.parametrize("router", OWN_CLASS_ROUTERS)
def test_a_stock_class_is_refused(router, pico, text):
    recipe = build(None, {"model": str(pico("llama")), "calibration": str(text)}, [])
    recipe = dataclasses.replace(recipe, tokens=512, sequence_length=64, router=router)
    for target in ("auto", "mixtral"):
        with pytest.raises(MoefyError, match="no stock class holds it.*--target moefy") as refusal:
            prepare(dataclasses.replace(recipe, target=target))
        assert refusal.value.code == 4
    other = controls.changed(recipe, f"router={router}")  # a report compares with its own class
    assert prepare(other, control=True).target.model_type == "moefy"


def test_positions_are_refused_where_layers_are_not_told_them(pico, text):
    values = {"model": str(pico("granitemoehybrid")), "calibration": str(text), **POSITION}
    with pytest.raises(MoefyError, match="layers of granitemoehybrid are not told") as refusal:
        prepare(build(None, values | {"tokens": 512, "sequence_length": 64}, []))
    assert refusal.value.code == 4
