"""A refit of `down_proj` after the training: kept where held-out text agrees."""

import pytest
import torch
from tuned_run import weights

from moefy.config.finetune import build
from moefy.errors import MoefyError
from moefy.finetune import refit_after
from moefy.finetune.checks import check_machine
from moefy.finetune.run import finetune

SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 1024, "batch_size": 8}
STILL = {"learning_rate": 0.0, "rest_learning_rate": 0.0, "router_learning_rate": 0.0}
AFTER = {**SMALL, **STILL, "measure_every": 0, "refit_after": True}


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **AFTER, **settings}, []))


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"), refit=False)


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral"])
def test_it_is_kept_where_it_helps(pico, converted, text, tmp_path, target):
    run = converted(pico("llama"), refit=False, target=target)
    summary = tuned(run, tmp_path / "out", text)
    refit = summary["refit"]
    assert refit["kept"] and refit["by"] == "kl" and refit["after"] < 0.9 * refit["before"]
    assert summary["validation"]["before"]["kl"] == pytest.approx(refit["before"], rel=1e-6)
    new, old = weights(tmp_path / "out"), weights(run)
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed and all("down_proj" in name or ".w2." in name for name in changed)
    # What is written has the loss that is told.
    again = tuned(tmp_path / "out", tmp_path / "again", text, refit_after=False)
    assert again["validation"]["before"]["kl"] == pytest.approx(refit["after"], rel=1e-6)


def test_it_is_not_kept_where_it_harms(run, text, tmp_path, monkeypatch):
    leaving = refit_after.leaving

    def elsewhere(*arguments):
        return [10 * states_TD.flip(0) for states_TD in leaving(*arguments)]

    monkeypatch.setattr(refit_after, "leaving", elsewhere)
    monkeypatch.setattr(refit_after, "SHARE", 1.0)
    summary = tuned(run, tmp_path / "out", text)
    assert summary["refit"]["kept"] is False
    assert summary["refit"]["after"] >= summary["refit"]["before"]
    assert summary["validation"]["after"]["kl"] == summary["refit"]["before"]
    new, old = weights(tmp_path / "out"), weights(run)
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_what_leaves_a_layer_comes_nearer_to_the_dense_model(run, pico):
    """On tokens that are not fitted, and behind the last layer most, for all are fitted in turn."""
    import stock

    from moefy.finetune.inputs import open_run
    from moefy.models.load import model_of, plain_config

    ids_BT = torch.randint(0, 100, (40, 64), generator=torch.Generator().manual_seed(0))
    model, dense, opened = stock.opened(run), stock.opened(pico("llama")), open_run(run)
    state = refit_after.state(model, opened, run, dense, ids_BT[:32], torch.float32)
    new = model_of(run, plain_config(run), state, task="ForCausalLM", dtype=torch.float32)
    name = "model.layers.1"
    aim, before, after = (
        refit_after.leaving(each, [name], ids_BT[32:])[0] for each in (dense, model, new)
    )
    assert (after - aim).square().sum() < 0.9 * (before - aim).square().sum()


def test_what_it_cannot_do_is_refused(pico, converted, text, tmp_path, monkeypatch):
    run = converted(pico("gemma2"), target="moefy")
    with pytest.raises(MoefyError, match="a norm behind its FFN") as caught:
        tuned(run, tmp_path / "out", text)
    assert caught.value.code == 4 and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MoefyError, match="refit_after with 2 processes") as caught:
        check_machine(build(None, AFTER, []))
    assert caught.value.code == 4
