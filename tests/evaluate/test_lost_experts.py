"""A lost expert: what its absence costs, as stock transformers computes it with a logit of -inf."""

import copy
import shutil
from pathlib import Path

import pytest
import sample_report
import stock
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate import lost_experts as part
from moefy.evaluate.advice import advice
from moefy.evaluate.expert_masks import losses
from moefy.evaluate.fail_if import overall_metrics
from moefy.evaluate.run import evaluate
from moefy.models.load import open_model
from moefy.models.routing import moe_blocks
from moefy.report.sections import sections

IDS_T = torch.randint(1, 128, (64,), generator=torch.Generator().manual_seed(3))


class ByDefinition(nn.Module):
    """The router of a class, written down from its definition, without one expert."""

    def __init__(self, router, target: str, lost: int, k: int) -> None:
        super().__init__()
        self.weight, self.target, self.lost, self.k = router.weight, target, lost, k
        self.bias = getattr(router, "e_score_correction_bias", None)

    def forward(self, x, *positions):
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.T
        logits[:, self.lost] = -torch.inf
        if self.target == "glm4_moe":
            score = logits.sigmoid()
            chosen = (score + self.bias).index_fill(1, torch.tensor([self.lost]), -torch.inf)
            index = chosen.topk(self.k).indices
            return logits, score.gather(1, index) * 2, index
        share, index = logits.softmax(-1).topk(self.k)
        if self.target == "mixtral":
            share = share / share.sum(-1, keepdim=True)
        return logits, torch.ones_like(share) if self.target == "moefy" else share, index


def loss(model) -> float:
    with torch.inference_mode():
        return float(model(IDS_T[None], labels=IDS_T[None]).loss) * (len(IDS_T) - 1)


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral", "glm4_moe", "moefy"])
def test_a_lost_expert_costs_what_the_class_says(target, pico, converted):
    model = opened(converted(pico("llama"), **stock.some_active(target, 6), layers=":"))
    torch.manual_seed(0)
    for block in moe_blocks(model):
        block.router.weight.data.normal_()  # so that gates differ, and each expert matters
        block.experts.down_proj.data *= 400 if target == "moefy" else 20
        if target == "glm4_moe":
            block.router.e_score_correction_bias.data[1] = 3.0  # chosen by its bias alone
    experts = [(layer, expert) for layer in (0, 1) for expert in range(5)]
    whole, *found = losses(model, IDS_T, experts)
    assert whole == pytest.approx(loss(model), rel=1e-5)
    for (layer, expert), value in zip(experts, found, strict=True):
        other = copy.deepcopy(model)
        block = moe_blocks(other)[layer]
        block.module.gate = ByDefinition(block.router, target, expert, 2)
        assert value == pytest.approx(loss(other), rel=1e-5), (layer, expert)
        assert abs(value - whole) > 1e-4 * whole  # the negative control: it is missed
    assert loss(model) == pytest.approx(whole, rel=1e-5)  # and it is back


def test_without_a_next_expert_nothing_is_nan(pico, converted):
    model = opened(converted(pico("llama"), **stock.recipe("mixtral", 4), layers=":"))
    whole, found = losses(model, IDS_T, [(0, 2)])
    assert whole == pytest.approx(loss(model), rel=1e-5)
    with torch.no_grad():  # the others share what it had
        moe_blocks(model)[0].experts.down_proj[2].zero_()
        moe_blocks(model)[0].experts.down_proj.mul_(4 / 3)
    assert found == pytest.approx(loss(model), rel=1e-5)
    assert found != pytest.approx(whole, rel=1e-4)


# In a report


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A run with shadows, to write into."""
    folder = converted(pico("llama"), target="moefy", layers=":", shadow=0.25)
    return Path(shutil.copytree(folder, tmp_path / "runs" / "run"))


def settings(text: Path, *experts: str) -> Settings:
    few = {"tokens": 300, "sequence_length": 64, "effort": "quick", "speed": False}
    return Settings(text=(text,), lost_experts=experts, controls=False, **few)


def test_a_report_goes_on_where_it_stopped(run, text, monkeypatch):
    monkeypatch.setattr("moefy.evaluate.run.redraw", lambda run: None)  # matplotlib takes long
    real, windows, stages = part.losses, [], []

    def dies(model, ids_T, experts, **more):
        windows.append(ids_T)
        if len(windows) == 3:  # the first one is for the time that it takes
            raise KeyboardInterrupt
        return real(model, ids_T, experts, **more)

    monkeypatch.setattr(part, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, settings(text, "all"), watch=lambda stage, *_: stages.append(stage))
    assert any("lost experts, about 1 min in all" in stage for stage in stages)
    report = evaluate(run, settings(text, "all"))
    assert len(windows) == 3 + 3 and report["not_run"] == []  # all but the first window
    monkeypatch.setattr(part, "losses", None)
    assert evaluate(run, settings(text, "all"))["lost_experts"] == report["lost_experts"]
    found = report["lost_experts"]
    model = open_model(run)[0]
    names = [(row["layer"], row["expert"]) for row in found["experts"]]
    assert names == [(block.layer, expert) for block in moe_blocks(model) for expert in range(4)]
    assert found["tokens"] == sum(len(ids_T) - 1 for ids_T in (windows[1], *windows[3:]))
    assert found["worst"] == max(row["dnll"] for row in found["experts"])
    assert 0 < abs(found["shadow_mean"]) and found["shadow_mean"] != found["mean"]
    (said,) = (one["sentence"] for one in report["advice"] if "Any one expert" in one["sentence"])
    assert "With its shadow" in said


@pytest.mark.parametrize("name", ["0.4", "7.0", "worst"])
def test_an_expert_that_is_not_there(name, run, text):
    with pytest.raises(MoefyError, match=rf"--lost-experts {name} is not there; .* 0 to 3") as no:
        evaluate(run, settings(text, name))
    assert no.value.code == 2


def test_a_run_without_experts(pico, converted, text):
    with pytest.raises(MoefyError, match="this one has none") as refused:
        evaluate(converted(pico("llama"), partition="static"), settings(text, "all"))
    assert refused.value.code == 2


def test_pages_and_advice_name_the_most_critical():
    report = sample_report.full()
    section = next(one for one in sections(report) if one.name == "lost")
    assert section.tables[0].rows[1] == ("layer 1, expert 3", "0.1500 ± 0.0100", "")
    assert "expert 3 of layer 1" in section.pictures[0].alt
    label = report["lost_experts"]["label"]
    report["texts"] = {}
    one = next(one for one in advice(report, label) if "LOST" in one["sentence"])
    assert one["verdict"] == "does not pay" and "layer.expert 1.3 (0.150)" in one["sentence"]
    assert overall_metrics(report, label)["lost_expert"] == 0.15
    # The negative controls: another model, and a run that misses none.
    assert not any("LOST" in one["sentence"] for one in advice(report, "moe"))
    report["lost_experts"]["experts"][11]["dnll"] = 0.05
    assert not any("LOST" in one["sentence"] for one in advice(report, label))
