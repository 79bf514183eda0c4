"""Names of tensors: a base class's are completed as transformers does, a wrapper's are told."""

import json

import damage as d
import pytest
import torch
from safetensors.torch import load_file
from stock import logits

from moefy.checkpoint.tensor_names import WRAPPERS, check_names, class_names, other_task
from moefy.checkpoint.validate import open_checkpoint
from moefy.errors import MoefyError
from moefy.models import families
from moefy.models.load import open_model

MASKED = ("ForMaskedLM", "ForSequenceClassification", "Model")


@pytest.mark.parametrize("model_type", families.names())
def test_names_of_the_base_class_are_completed(model_type, own_pico):
    """Those that transformers itself gives them: it loads the renamed files whole."""
    folder = own_pico(model_type)
    family = families.load(model_type)
    whole = open_checkpoint(folder).entries
    model, _ = open_model(folder, task=family.tasks[0])
    prefix = model.base_model_prefix + "."
    names = [*load_file(folder / d.SINGLE)]
    if not any(name.startswith(prefix) for name in names):
        pytest.skip("no name of its own before its tensors'")
    d.renamed("base class", lambda name: name.removeprefix(prefix))(folder)
    _, info = open_model(folder, task=family.tasks[0])
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert open_checkpoint(folder).entries.keys() == whole.keys()


def test_names_that_are_whole_stay():
    family = families.load("llama")
    names = ["model.layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "lm_head.weight"]
    assert class_names(family, names) == {name: name for name in names}
    assert class_names(family, ["lm_head.weight"]) == {"lm_head.weight": "lm_head.weight"}


def test_a_base_class_converts_to_the_same_model(own_pico, converted):
    """As embedding models are published: no name before its tensors', the embedding as the head."""
    folder = own_pico("qwen3", tie_word_embeddings=True)
    d.bare(folder)
    d.config(architectures=["Qwen3Model"])(folder)
    out = converted(folder, active=1.0, refit=False)
    model, info = open_model(out, dtype=torch.float32)
    assert not any(info.values())
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    dense, info = open_model(folder, dtype=torch.float32)
    assert not any(info.values())
    torch.testing.assert_close(logits(model.eval()), logits(dense.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", WRAPPERS)
@pytest.mark.parametrize("name", ["{}.model.norm.weight", "model.layers.0.{}.mlp.up_proj.weight"])
def test_a_wrapper_is_told(part, name, tmp_path):
    with pytest.raises(MoefyError, match=part) as caught:
        check_names(tmp_path, [name.format(part)])
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("model_type", families.names())
def test_no_model_of_its_family_is_taken_for_wrapped(model_type, pico):
    check_names(pico(model_type), load_file(pico(model_type) / d.SINGLE))


@pytest.mark.parametrize(
    ("name", "tasks", "fits"),
    [
        ("LlamaForCausalLM", ("ForCausalLM",), True),
        ("LLaMAForCausalLM", ("ForCausalLM",), True),
        ("LlamaModel", ("ForCausalLM",), True),
        ("GPT2LMHeadModel", ("ForCausalLM",), True),
        ("Gemma3ForConditionalGeneration", ("ForCausalLM",), True),
        ("LlamaForSequenceClassification", ("ForCausalLM",), False),
        ("LlamaForTokenClassification", ("ForCausalLM",), False),
        ("Qwen2ForProcessRewardModel", ("ForCausalLM",), False),
        ("MistralRewardModel", ("ForCausalLM",), False),
        ("BertForMaskedLM", MASKED, True),
        ("BertForPreTraining", MASKED, True),
        ("BertForSequenceClassification", MASKED, True),
        ("BertModel", MASKED, True),
        ("BertForTokenClassification", MASKED, False),
        ("BertForQuestionAnswering", MASKED, False),
        ("T5ForConditionalGeneration", ("ForSeq2SeqLM",), True),
        ("T5WithLMHeadModel", ("ForSeq2SeqLM",), True),
        ("T5ForSequenceClassification", ("ForSeq2SeqLM",), False),
    ],
)
def test_a_head_of_another_task_is_told(name, tasks, fits):
    reason = other_task({"architectures": [name]}, tasks)
    assert (reason is None) == fits
    assert fits or (name in str(reason) and "AutoModel" in str(reason))


@pytest.mark.parametrize("odd", [None, [], "LlamaForTokenClassification", [3], [None], {}])
def test_no_class_is_no_reason(odd):
    assert other_task({"architectures": odd}, ("ForCausalLM",)) is None
