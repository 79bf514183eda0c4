"""PEFT reaches the attention and the experts of a converted model: adapters train and merge."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moefy.models import targets
from moefy.models.shape import no_shared

peft = pytest.importorskip("peft")

RECIPE = {"partition": "shuffle", "refit": False, "router_options": {"steps": 0}}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {
    "qwen2_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "glm4_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "granitemoeshared": [
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
    ],
}


def trained(folder, **where):
    """A converted model with an adapter, and its losses before and after some steps."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **where))
    ids_BT = torch.randint(1, 128, (2, 32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), ids_BT, losses


@pytest.mark.parametrize("target", EXPERTS)
@pytest.mark.parametrize("part", ["attention", "experts"])
def test_an_adapter_trains_and_merges(target, part, pico, converted):
    where = ATTENTION
    if part == "experts":
        where = {"target_modules": [], "target_parameters": EXPERTS[target]}
    chosen = 2 if targets.load(target).fits is not no_shared else 4
    shape = {"experts": 8, "top_k": chosen, "active": 0.5}
    folder = converted(pico("llama"), target=target, **RECIPE, **shape)
    model, ids_BT, losses = trained(folder, **where)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.split(".layers.")[1].split(".")[0] for name in names}
    assert layers == {"0", "1"}  # every layer is reached
    assert losses[-1] < losses[0] - 0.01
    with torch.inference_mode():
        adapted = model(ids_BT).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(ids_BT).logits, adapted, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert not torch.allclose(plain(ids_BT).logits, adapted, atol=1e-2)
