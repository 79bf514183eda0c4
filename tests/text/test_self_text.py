"""Text that a model writes itself: it follows openings and the model, repeats, and ends nowhere."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from words import split_amount

from moefy.text import self_text
from moefy.text.documents import documents
from moefy.text.self_text import OPENINGS
from moefy.text.tokenizer import encode

BOS, EOS, FIRST = 0, 1, 2
VOCABULARY = FIRST + 256


def byte_tokenizer(*, adds_bos=False, eos=True):
    """Every byte is a token."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": BOS, "<eos>": EOS, **{p: n + FIRST for n, p in enumerate(pieces)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>" if eos else None
    )


def llama(vocab_size):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    return model


@pytest.fixture(scope="module")
def tiny():
    return llama(VOCABULARY)


@pytest.fixture(scope="module")
def few():
    """A model of twelve tokens, whose distribution few draws show."""
    return llama(12)


def sample(model, tokenizer=None, **changes):
    amount, options = split_amount({"num_tokens": 640, "length": 40, "batch_size": 6} | changes)
    return self_text.sample(model, tokenizer, amount, **options)


def beginnings(tokenizer, most):
    """The openings as ids, cut to `most`."""
    return {tuple(encode(tokenizer, text)[:most]) for text in documents(str(OPENINGS))}


def always(model, token):
    """The model with one certain next token."""

    def certain(module, args, output):
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[..., token] = 0.0
        return output

    return model.register_forward_hook(certain)


def test_a_sample_repeats_and_leaves_global_random_state_alone(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(tiny, byte_tokenizer())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert sample(tiny, byte_tokenizer()).sha256 == first.sha256
    assert sample(tiny, byte_tokenizer(), seed=1).sha256 != first.sha256
    assert first.ids_BT.shape == (16, 40) and first.num_heldout == 2 and first.source == "self"
    assert len(first.ids_BT.unique(dim=0)) == 16


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_every_document_starts_with_an_opening_and_no_two_alike(tiny, batch_size):
    tokenizer = byte_tokenizer()
    ids_BT = sample(tiny, tokenizer, batch_size=batch_size, document=20).ids_BT
    known = beginnings(tokenizer, 20 // self_text.MOST_OPENING)
    rows = ids_BT.view(-1, 20).tolist()
    starts = [tuple(row[: 20 // self_text.MOST_OPENING]) for row in rows]
    assert all(start in known for start in starts) and len(set(starts)) > 20
    assert all(row[-1] == EOS for row in rows)
    # What follows is no opening's: the model wrote it.
    longer = beginnings(tokenizer, 16)
    assert sum(tuple(row[:16]) in longer for row in rows) < 3


def test_openings_are_of_all_kinds(tiny):
    """Few documents hold prose, code, and other scripts, as the whole of the openings does."""
    tokenizer = byte_tokenizer()
    ids_BT = sample(tiny, tokenizer, num_tokens=24 * 80, length=80, document=80).ids_BT
    texts = tokenizer.batch_decode(ids_BT[:, : 80 // self_text.MOST_OPENING].tolist())
    code = [text for text in texts if set(text) & set("{}#<_=/")]
    other = [text for text in texts if not text.isascii()]
    assert 3 <= len(code) <= 12 and 1 <= len(other) <= 6


def test_where_the_model_ends_a_text_the_next_opening_follows(tiny):
    tokenizer = byte_tokenizer()
    hook = always(tiny, EOS)
    try:
        ids_BT = sample(tiny, tokenizer).ids_BT
    finally:
        hook.remove()
    known = {ids[:most] for most in range(21) for ids in beginnings(tokenizer, most)}
    for row in ids_BT.tolist():
        parts = [
            tuple(part) for end, part in itertools.groupby(row, lambda id: id == EOS) if not end
        ]
        assert len(parts) > 1 and all(part in known for part in parts)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_sequences_start_with_bos_if_the_tokenizer_adds_it(tiny, adds_bos):
    tokens = sample(tiny, byte_tokenizer(adds_bos=adds_bos))
    assert tokens.ids_BT.shape == (16, 40)
    assert bool((tokens.ids_BT[:, 0] == BOS).all()) == adds_bos
    assert tokens.notes == ()


def test_settings_of_the_checkpoint_do_not_change_a_sample(tiny):
    before = sample(tiny).sha256
    tiny.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=2.0)
    assert sample(tiny).sha256 == before


def test_without_a_tokenizer_documents_start_anywhere(tiny):
    tokens = sample(tiny)
    assert tokens.ids_BT.shape == (16, 40) and len(tokens.ids_BT[:, 0].unique()) > 12


def test_openings_that_a_tokenizer_does_not_know_are_left_out(tiny):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert len(sample(tiny, tokenizer).ids_BT[:, 0].unique()) > 12


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution_of_the_model(few, temperature):
    options = {"num_tokens": 2 * 8192, "length": 2, "batch_size": 8192}
    ids_BT = sample(few, temperature=temperature, **options).ids_BT
    share_V = torch.bincount(ids_BT[:, 1], minlength=12) / len(ids_BT)
    with torch.no_grad():
        logits_BV = few(ids_BT[:, :1]).logits[:, -1]

    def distance(chance_BV):
        return float((share_V - chance_BV.mean(0)).abs().sum() / 2)

    assert distance((logits_BV / temperature).softmax(-1)) < 0.02
    assert distance(torch.full((1, 12), 1 / 12)) > 0.05
    assert distance((logits_BV / (0.4 * temperature)).softmax(-1)) > 0.05


def test_the_cache_changes_nothing(few):
    """With one certain next token, a sample is the greedy continuation of whole prefixes."""
    weight = few.lm_head.weight
    with torch.no_grad():
        weight *= 1e5
        ids_BT = sample(few).ids_BT
        greedy_BT = few(ids_BT, use_cache=False).logits.argmax(-1)
        weight /= 1e5
    assert torch.equal(ids_BT[:, 1:], greedy_BT[:, :-1])
    assert not torch.equal(sample(few).ids_BT[:, 1:], greedy_BT[:, :-1])


def test_progress_counts_tokens_up_to_the_end(tiny):
    seen = []
    sample(tiny, byte_tokenizer(), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {640} and seen[-1] == (640, 640)
