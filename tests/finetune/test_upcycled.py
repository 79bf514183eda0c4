"""A fine-tune of copies: the class's own gates, cross-entropy, and every command behind it."""

import json

import pytest
import torch
from pico import RECIPE
from transformers import AutoModelForCausalLM

from moefy.config.finetune import build
from moefy.config.presets import COPIES
from moefy.errors import MoefyError
from moefy.finetune.checks import check_run
from moefy.finetune.inputs import open_run
from moefy.finetune.optim import groups, learning_rates
from moefy.finetune.router_hooks import Routing
from moefy.models.load import runnable


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"), method="upcycle", experts=4, top_k=2, layers="1:")


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(1, 128, (4, 32), generator=torch.Generator().manual_seed(3))


def gradients(run, ids_BT, routing: bool) -> dict[str, torch.Tensor]:
    """Of transformers' own cross-entropy, with our hooks on the model or without."""
    model = runnable(AutoModelForCausalLM.from_pretrained(run)).train()
    if routing:
        Routing(model, build(None, {}, [], own=COPIES), copies=True)
    model(ids_BT, labels=ids_BT).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_it_learns_by_the_gates_of_the_class_itself(run, ids_BT):
    plain, hooked = (gradients(run, ids_BT, routing) for routing in (False, True))
    assert float(plain["model.layers.1.mlp.gate.weight"].abs().max()) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(hooked[name], gradient)


def test_router_rows_have_the_rate_that_is_given(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    rates = {"router": 1e-3, "experts": 1e-4, "rest": 1e-5}
    routing = Routing(model, copies=True)
    own = learning_rates(model, "all", rates, routing.scale)
    found = {group["part"]: group["lr"] for group in groups(model, "all", own)}
    assert found == rates


def test_noise_on_choices_leaves_gates_that_sum_to_one(run, ids_BT):
    model = runnable(AutoModelForCausalLM.from_pretrained(run)).train()
    routing = Routing(model, build(None, {"noise": 5.0}, [], own=COPIES), copies=True)
    seen = []
    routing.layers[0].router.register_forward_hook(lambda *args: seen.append(args[-1]))
    model(ids_BT)
    logits_TE, gate_TK, index_TK = seen[0]
    torch.testing.assert_close(gate_TK.sum(-1), torch.ones(len(gate_TK)))
    assert not torch.equal(index_TK, logits_TE.topk(2).indices)


@pytest.mark.parametrize("setting", ["anneal", "refit_after", "router_ce"])
def test_what_needs_a_divided_ffn_is_refused(setting, run):
    value = True if setting == "refit_after" else 0.5
    with pytest.raises(MoefyError, match=rf"^{setting} is .* are copies") as caught:
        check_run(open_run(run), build(None, {setting: value}, [], own=COPIES))
    assert caught.value.code == 2


def test_every_command_takes_copies(pico, text, moefy, tmp_path):
    """By `moefy run`, which converts, fine-tunes by the defaults, and reports."""
    recipe, out, tuned = (tmp_path / name for name in ("up.toml", "out", "out-finetuned"))
    made = 'method = "upcycle"\nexperts = 4\nlayers = "1:"\n'
    stages = RECIPE.replace("tokens = 512", "tokens = 4096").format(model=pico("llama"), text=text)
    recipe.write_text(f"{made}{stages}controls = true\n")
    done = moefy("run", recipe, out)
    assert done.code == 0, done.err
    assert "1.67 times the dense FFN computed" in done.out
    assert "the dense model is that of copies" in done.out
    assert done.out.count("done already") == 0
    assert moefy("run", recipe, out).out.count("done already") == 3

    report = json.loads((tuned / "moefy" / "finetune.json").read_text())
    assert (report["settings"]["kl"], report["settings"]["ce"]) == (0.0, 1.0)
    before, after = (report["validation"][when]["loss"] for when in ("before", "after"))
    assert after < before
    for folder in (out, tuned):
        done = moefy("verify", folder)
        assert done.code == 0, done.out
    assert "4 copies of the dense FFN" in moefy("inspect", out).out
    done = moefy("push", tuned, "me/it", "--dry-run")
    assert done.code == 0, done.err
    assert "copies of the dense FFN, trained since" in (tuned / "README.md").read_text()
    done = moefy("export", "gguf", out, tmp_path / "out.gguf")
    assert done.code == 4
    assert "norm_topk_prob" in done.err
