"""What the routers are seen to choose is what each class's definition says they choose."""

import math

import pytest
import torch
from stock import ONE_EACH, OWN, some_active
from transformers import AutoModelForCausalLM

from moefy.models import routing


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(0))


def moe(pico, converted, family: str, target: str):
    folder = converted(pico(family), **some_active(target))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pairs():
    return [*ONE_EACH, ("gemma3_text", OWN)]


@pytest.mark.parametrize(("family", "target"), pairs(), ids="-".join)
def test_every_class_is_seen_to_route(family, target, pico, converted, ids_BT):
    model = moe(pico, converted, family, target)
    before = model(ids_BT).logits
    with torch.inference_mode(), routing.recorded(model) as seen:
        model(ids_BT)
    assert list(seen) == [0, 1]
    for block in routing.moe_blocks(model):
        (index_TK,) = seen[block.layer]
        assert index_TK.shape == (80, 2)
        assert 0 <= int(index_TK.min()) and int(index_TK.max()) < block.num_experts
        assert (index_TK[:, 0] != index_TK[:, 1]).all()
    # Nothing stays behind.
    torch.testing.assert_close(model(ids_BT).logits, before)
    assert not any(router._forward_hooks for router in routing.routers(model).values())


def test_what_is_seen_is_what_the_rows_choose(pico, converted, ids_BT):
    model = moe(pico, converted, "llama", "qwen2_moe")
    router = routing.routers(model)[1]
    hidden: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.inference_mode(), routing.recorded(model) as seen:
        model(ids_BT)
        wanted_TK = (hidden[0] @ router.weight.T).topk(2).indices
    assert torch.equal(seen[1][0].long().sort(1).values, wanted_TK.sort(1).values)


def test_logits_carry_gradients_to_the_router(pico, converted, ids_BT):
    model = moe(pico, converted, "llama", "qwen2_moe")
    seen = {}
    with routing.watched(model, lambda layer, logits_TE, _: seen.update({layer: logits_TE})):
        model(ids_BT)
    seen[0].square().sum().backward()
    assert routing.routers(model)[0].weight.grad.abs().sum() > 0


def test_a_dense_model_has_no_routers(pico):
    model = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32)
    assert routing.routers(model) == {}
    with routing.recorded(model) as seen:
        assert seen == {}


def test_loads_by_hand():
    index_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]], dtype=torch.int16)
    load_E = routing.load(index_TK, 4)
    assert load_E.tolist() == [4 / 8, 3 / 8, 1 / 8, 0]
    told = routing.balance(load_E)
    assert told["dead"] == 1
    assert told["load_cv"] == pytest.approx(load_E.std(correction=0).item() / 0.25)
    shares = (1 / 2, 3 / 8, 1 / 8)
    entropy = -sum(share * math.log(share) for share in shares) / math.log(4)
    assert told["entropy"] == pytest.approx(entropy)


@pytest.mark.parametrize(("share", "dead"), [(0.04, 1), (0.06, 0)])
def test_dead_is_below_a_twentieth_of_the_mean(share, dead):
    """The last expert has `share` of the mean load; 0.06 is alive, and would not be at 10 %."""
    load_E = torch.full((8,), 1.0)
    load_E[-1] = 7 * share / (8 - share)
    load_E /= load_E.sum()
    assert float(load_E[-1] / load_E.mean()) == pytest.approx(share)
    assert routing.balance(load_E)["dead"] == dead


def test_drift_is_the_share_that_goes_elsewhere():
    even, one = torch.ones(4) / 4, torch.tensor([1.0, 0, 0, 0])
    assert routing.drift(even, even) == 0
    assert routing.drift(one, even) == 0.75
    assert routing.drift(one, one.flip(0)) == 1
