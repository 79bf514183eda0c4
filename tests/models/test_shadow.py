"""Shadows: the strongest neurons of each expert, which answer where it is lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moefy.config.recipe import build
from moefy.convert import prepare
from moefy.convert.stages import stages
from moefy.errors import MoefyError
from moefy.evaluate.critical_experts import summary
from moefy.evaluate.expert_masks import losses
from moefy.files.safetensors_header import read_entries
from moefy.finetune.write import _trained
from moefy.models.load import open_model
from moefy.models.routing import moe_blocks

IDS_T = torch.randint(1, 128, (64,), generator=torch.Generator().manual_seed(3))
OWN = {"target": "moefy", "layers": ":"}


def opened(folder: Path):
    return open_model(folder, dtype=torch.float32)[0].eval()


def loss(model) -> float:
    with torch.inference_mode():
        return float(model(IDS_T[None], labels=IDS_T[None]).loss) * (len(IDS_T) - 1)


@pytest.fixture(scope="module")
def run(pico, converted) -> Path:
    return converted(pico("llama"), **OWN, shadow=0.25)


@pytest.fixture(scope="module")
def unfitted(pico, converted) -> Path:
    return converted(pico("llama"), **OWN, shadow=0.25, refit=False)


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def losing(folder: Path, *experts: list[int]) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"lost_experts": [*experts]}
    file.write_text(json.dumps(config))
    return folder


def test_a_shadow_is_the_strongest_neurons_and_changes_nothing_while_no_expert_is_lost(
    run, pico, converted
):
    plain = converted(pico("llama"), **OWN)
    assert loss(opened(run)) == pytest.approx(loss(opened(plain)), rel=1e-5)
    with_it, without = (load_file(one / "model.safetensors") for one in (run, plain))
    block = "dense.model.layers.1.mlp.experts."
    up, down = with_it[block + "up_proj"], with_it[block + "down_proj"]
    width = down.shape[-1]
    kept = with_it[block + "shadow_down_proj"].shape[-1]
    assert kept == round(0.25 * width) and with_it.keys() - without.keys() == {
        name for name in with_it if ".shadow_" in name
    }
    assert torch.equal(with_it[block + "shadow_down_proj"], down[..., :kept])
    gate_above_up = torch.cat([up[:, :kept], up[:, width : width + kept]], 1)
    assert torch.equal(with_it[block + "shadow_up_proj"], gate_above_up)


def test_the_neurons_of_a_shadow_are_those_of_most_energy(unfitted, pico):
    """On the text of the fit, each token weighed by the length of the state behind the layer."""
    model, seen = opened(unfitted), []
    block = moe_blocks(model)[0]
    block.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids_BT = load_file(unfitted / "moefy" / "calibration.safetensors")["ids"].long()
    summary = json.loads((unfitted / "moefy" / "conversion.json").read_text())
    ids_BT = ids_BT[: -summary["calibration"]["heldout_sequences"]]
    kept = block.experts.shadow_down_proj.shape[-1]
    with torch.inference_mode():
        states = opened(pico("llama"))(ids_BT, output_hidden_states=True).hidden_states
        weight_T1 = 1 / states[1].square().sum(-1).reshape(-1, 1)
        model(ids_BT)
        x_TD = seen[0].reshape(-1, seen[0].shape[-1])
        for expert, down_DN in enumerate(block.experts.down_proj):
            h_TN = block.experts.activations(expert, x_TD)
            energy_N = (h_TN.square() * weight_T1).mean(0) * down_DN.square().sum(0)
            assert energy_N[:kept].min() >= 0.999 * energy_N[kept:].max()


def test_a_lost_expert_is_answered_by_its_shadow(own_run, run):
    whole, without, by_shadow = losses(opened(run), IDS_T, [(1, 2)], shadows=True)
    assert loss(opened(losing(own_run, [1, 2]))) == pytest.approx(by_shadow, rel=1e-6)
    # By hand: its other neurons write nothing.
    model = opened(run)
    experts = moe_blocks(model)[1].experts
    experts.down_proj.data[2, :, experts.shadow_down_proj.shape[-1] :] = 0
    assert loss(model) == pytest.approx(by_shadow, rel=1e-6)
    assert len({round(value, 4) for value in (whole, without, by_shadow)}) == 3
    # The weights of the lost expert are not read.
    tensors = load_file(own_run / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        tensors[f"dense.model.layers.1.mlp.experts.{name}"][2] = torch.nan
    save_file(tensors, own_run / "model.safetensors", metadata={"format": "pt"})
    assert loss(opened(own_run)) == pytest.approx(by_shadow, rel=1e-6)


def test_without_a_shadow_the_next_best_expert_answers(pico, converted, tmp_path):
    plain = converted(pico("llama"), **OWN)
    whole, expected = losses(opened(plain), IDS_T, [(0, 1)])
    folder = losing(Path(shutil.copytree(plain, tmp_path / "run")), [0, 1])
    assert loss(opened(folder)) == pytest.approx(expected, rel=1e-6)
    everything = [[0, expert] for expert in range(moe_blocks(opened(plain))[0].num_experts)]
    assert torch.isfinite(torch.tensor(loss(opened(losing(folder, *everything)))))


@pytest.mark.parametrize("lost", [[0, 99], [7, 0], "worst"])
def test_a_lost_expert_that_is_not_there(own_run, lost):
    with pytest.raises(MoefyError, match="lost_experts in config.json names .* not there") as no:
        opened(losing(own_run, lost))
    assert no.value.code == 4


@pytest.mark.parametrize("given", [{"target": "qwen2_moe"}, {"partition": "static"}, {}])
def test_a_stock_class_has_no_shadows(given, pico, text):
    given = {"model": str(pico("llama")), "shadow": 0.15, "calibration": str(text)} | given
    with pytest.raises(MoefyError, match="--shadow 0.15 needs moefy's own class") as refused:
        prepare.prepare(build(None, given, []))
    assert refused.value.code == 2


def test_copies_have_no_shadows():
    with pytest.raises(MoefyError, match="--shadow 0.15: another copy answers") as refused:
        stages(build(None, {"model": "demo", "method": "upcycle", "shadow": 0.15}, []))
    assert refused.value.code == 2


def test_a_fine_tune_writes_the_shadow_of_what_it_trained(own_run, tmp_path):
    entries = read_entries(own_run)
    trained = load_file(own_run / "model.safetensors")
    for name, tensor in trained.items():
        if ".shadow_" not in name:
            tensor += torch.arange(tensor.numel()).view_as(tensor)
    (tmp_path / "trained").mkdir()
    save_file(trained, tmp_path / "trained" / "model.safetensors")
    saved = read_entries(tmp_path / "trained")
    block = "dense.model.layers.0.mlp.experts."
    kept = trained[block + "shadow_down_proj"].shape[-1]
    up, down = trained[block + "up_proj"], trained[block + "down_proj"]
    width = down.shape[-1]
    found = {name: _trained(block + name, entries, saved) for name in ("shadow_up_proj", "up_proj")}
    assert torch.equal(found["up_proj"], up)
    gate_above_up = torch.cat([up[:, :kept], up[:, width : width + kept]], 1)
    assert torch.equal(found["shadow_up_proj"], gate_above_up)
    assert torch.equal(_trained(block + "shadow_down_proj", entries, saved), down[..., :kept])


def test_figures_with_and_without():
    rows = [[10.0, 12.0, 14.0, 11.0, 10.0], [20.0, 22.0, 20.0, 21.0, 20.0]]
    found = summary([(0, 0), (0, 1)], [IDS_T[:11], IDS_T[:11]], rows)
    assert (found["mean"], found["worst"]) == pytest.approx((0.2, 0.2))
    assert (found["shadow_mean"], found["shadow_worst"]) == pytest.approx((0.05, 0.1))
    assert "shadow_mean" not in summary([(0, 0)], [IDS_T[:11]] * 2, [row[:2] for row in rows])
