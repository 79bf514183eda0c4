"""The text of a fine-tune: mixes of sources with shares."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stopping import stopped_at
from transformers import AutoModelForCausalLM

from moefy.config.finetune import Settings, build
from moefy.config.sources import sources
from moefy.errors import MoefyError
from moefy.finetune import losses
from moefy.finetune.inputs import open_run
from moefy.finetune.run import finetune
from moefy.finetune.text import read_text
from moefy.finetune.trainer import text_batch
from moefy.text.tokenizer import load_tokenizer

SMALL = {"tokens": 4096, "sequence_length": 64, "validation_tokens": 1024, "batch_size": 4}


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts of one letter each, so that a sequence tells where it is from; `few` is short."""
    folder = tmp_path_factory.mktemp("mix")
    for name, letter, count in (("a", "a", 60), ("b", "b", 60), ("few", "f", 10)):
        texts = (f"{letter * (100 + number)}" for number in range(count))
        (folder / f"{name}.txt").write_text("\n\n\n".join(texts))
    return folder


def settings(*data, **more):
    return build(None, {**SMALL, "data": [str(one) for one in data], **more}, [])


def tokens_of(run, *data, **more):
    return read_text(open_run(run), settings(*data, **more), 1, lambda *_: None, lambda *_: None)


def letters(run, tokens, rows):
    """Of each sequence the letter that it holds most."""
    tokenizer = load_tokenizer(run)
    texts = [tokenizer.decode(tokens.ids_BT[row]).replace("<|endoftext|>", "") for row in rows]
    return [max(set(text), key=text.count) for text in texts]


def test_each_source_has_its_share_of_what_trains_and_of_what_measures(run, files):
    tokens = tokens_of(run, f"{files}/a.txt:3", f"{files}/b.txt:1")
    trained = letters(run, tokens, tokens.rows)
    assert (trained.count("a"), trained.count("b")) == (48, 16)
    held = {name: letters(run, tokens, rows) for name, rows in tokens.heldout.items()}
    assert held == {"a.txt": ["a"] * 12, "b.txt": ["b"] * 4}
    assert not set(tokens.rows) & {row for rows in tokens.heldout.values() for row in rows}
    assert len(set(tokens.rows)) == 64 and tokens.notes == ()
    equal = tokens_of(run, files / "a.txt", files / "b.txt")
    assert letters(run, equal, equal.rows).count("a") == 32


def test_a_short_source_keeps_its_share_and_says_so(run, files):
    tokens = tokens_of(run, f"{files}/a.txt:0.5", f"{files}/few.txt:0.5")
    trained = letters(run, tokens, tokens.rows)
    assert trained.count("f") == 32
    seen = [tokens.rows.count(row) for row in {*tokens.rows[32:]}]
    assert max(seen) - min(seen) <= 1 and max(seen) > 1  # all of it, as evenly as can be
    part = tokens.parts[1]
    assert part.sequences == len(seen) and part.epochs == 32 / len(seen)
    assert any("few.txt: its" in note and "are repeated" in note for note in tokens.notes)


def test_all_files_and_shares_decide_what_is_trained_on(run, files):
    a, b, few = (str(files / name) for name in ("a.txt", "b.txt", "few.txt"))
    mixes = [(a,), (b,), (a, b), (b, a), (f"{a}:3", f"{b}:1"), (a, few), (f"{a}:2", f"{few}:3")]
    digests = [tokens_of(run, *mix).trained for mix in mixes]
    assert len(set(digests)) == len(mixes)
    assert tokens_of(run, f"{a}:0.5", f"{b}:0.5").trained == digests[2]
    # One source, whatever its share, is what it is alone.
    assert tokens_of(run, f"{a}:0.3").trained == digests[0]


def test_a_mix_that_was_killed_ends_where_an_unbroken_one_does(run, files, tmp_path, monkeypatch):
    from moefy.finetune.trainer import Finetuner

    mix = settings(f"{files}/a.txt:2", f"{files}/few.txt:1", save_every=4)
    whole = finetune(run, tmp_path / "whole", mix)
    batches = []

    def seen(self, model, inputs, *rest, **more):
        batches.append(inputs["row"].tolist())
        return compute_loss(self, model, inputs, *rest, **more)

    compute_loss = Finetuner.compute_loss
    monkeypatch.setattr(Finetuner, "compute_loss", seen)
    with stopped_at(6):
        finetune(run, tmp_path / "out", mix)
    with pytest.raises(MoefyError, match="text") as caught:  # other shares are another fine-tune
        other = settings(f"{files}/a.txt:1", f"{files}/few.txt:1", save_every=4)
        finetune(run, tmp_path / "out", other)
    assert caught.value.code == 7
    resumed = finetune(run, tmp_path / "out", mix)
    assert resumed["validation"] == whole["validation"]
    named = {"loss, a.txt", "loss, few.txt", "kl, a.txt", "kl, few.txt"}
    after = whole["validation"]["after"]
    assert named <= after.keys()
    count = {part["name"]: part["heldout_sequences"] for part in whole["train"]["parts"]}
    mean = sum(count[name] * after[f"kl, {name}"] for name in count) / sum(count.values())
    assert after["kl"] == pytest.approx(mean)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other
    # The seed draws the order: sources alternate, and no step comes twice.
    drawn = [row for batch in batches[:6] + batches[8:] for row in batch]
    assert drawn != sorted(drawn)
    recipe = build(tmp_path / "out" / "moefy" / "recipe.toml", {}, [])
    assert recipe.data == mix.data


def test_a_mix_in_a_recipe_and_one_text_of_an_older_one(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[finetune]\ndata = ["a.txt:0.5", "b.txt:0.5"]\n')
    assert build(file, {}, []).data == ("a.txt:0.5", "b.txt:0.5")
    file.write_text('[finetune]\ndata = "a.txt"\n')
    assert build(file, {}, []).data == ("a.txt",)
    assert build(file, {}, ['data=["b.txt", "c.txt"]']).data == ("b.txt", "c.txt")
    assert Settings().data == ("self",)


def test_a_path_that_looks_like_a_share_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:0.5").write_text("x")
    Path("b:c.txt").write_text("x")
    (one, other) = sources(["a:0.5:3", "b:c.txt:1"])
    assert (one.place, one.share, other.place) == ("a:0.5", 0.75, "b:c.txt")
    assert [source.share for source in sources(["a:0.5", "b:c.txt"])] == [0.5, 0.5]
    assert build(None, {"data": ["b:c.txt:2", "x:1"]}, []).data == (
        f"{tmp_path}/b:c.txt:2",
        "x:1",
    )
    assert sources(["owner/set:config:train"])[0].place == "owner/set:config:train"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["a:1", "a:2"], "--data names a twice"),
        (["a:1", "b"], "--data b has no share, and others have; .* like b:0.5, or for none"),
        (["a:0", "b:1"], "a: its share is 0; expected a number above 0"),
        (["a:-1", "b:1"], "a: its share is -1"),
        (["a:nan", "b:1"], "a: its share is nan"),
        ([], "--data is empty"),
        ([":1"], "--data is empty"),
        ([""], "--data is empty"),
    ],
)
def test_mixes_that_cannot_be(data, says):
    with pytest.raises(MoefyError, match=says) as caught:
        build(None, {"data": data}, [])
    assert caught.value.code == 2


def test_a_share_too_small_to_train_on_is_refused(run, files):
    with pytest.raises(MoefyError, match="--data .*b.txt: its share of 0.01 is .* sequences") as e:
        tokens_of(run, f"{files}/a.txt:0.99", f"{files}/b.txt:0.01")
    assert e.value.code == 2


def test_a_plan_refuses_the_share_that_its_fine_tune_refuses(moefy, run, files, tmp_path):
    few = ["--tokens", 2048, "--sequence-length", 64, "--set", "validation_tokens=1024"]
    for share, code in (("0.01", 2), ("1", 0)):
        mix = ["--data", f"{files}/a.txt:1", "--data", f"{files}/b.txt:{share}"]
        line = ("finetune", run, "--out", tmp_path / share, *mix, *few)
        planned, trained = moefy(*line, "--plan"), moefy(*line)
        assert planned.code == trained.code == code
        if code:
            assert "its share of 0.0099 is" in planned.err and planned.err == trained.err


def test_the_command_takes_several(moefy, run, files, tmp_path):
    mix = [flag for name in ("a", "b") for flag in ("--data", f"{files}/{name}.txt:0.5")]
    few = ["--tokens", 2048, "--sequence-length", 64, "--set", "validation_tokens=1024"]
    done = moefy("finetune", run, "--out", tmp_path / "out", *mix, *few)
    assert done.code == 0 and "kl, a.txt" in done.out
    report = json.loads((tmp_path / "out" / "moefy" / "finetune.json").read_text())
    assert report["train"]["source"] == "a.txt (50%), b.txt (50%)"
    assert torch.tensor([part["share"] for part in report["train"]["parts"]]).sum() == 1


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chats(run, tmp_path):
    """A run whose tokenizer has a chat template, and conversations."""
    own = Path(shutil.copytree(run, tmp_path / "run"))
    (own / "chat_template.jinja").write_text(CHAT)
    file = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": r, "content": f"{r[0]}{n} " * 9} for r in ("user", "assistant")]}
        for n in range(80)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return own, file


def test_the_loss_is_that_of_the_answers_alone(chats, tmp_path):
    run, file = chats
    asked = settings(file, answers_only=True, tokens=1024, ce=1.0)
    tokens = read_text(open_run(run), asked, 1, lambda *_: None, lambda *_: None)
    assert 0.2 < tokens.learned.float().mean() < 0.8
    result = finetune(run, tmp_path / "out", asked)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    total = count = 0
    for row in tokens.heldout[tokens.source]:
        ids_T, learned_T = tokens.ids_BT[row], tokens.learned[row]
        labels_T = ids_T.where(learned_T, -100)
        num = int((labels_T[1:] >= 0).sum())
        total += num * float(model(ids_T[None], labels=labels_T[None]).loss.detach())
        count += num
    assert result["validation"]["before"]["loss"] == pytest.approx(total / count, rel=1e-4)
    other = finetune(run, tmp_path / "other", settings(file, tokens=1024, ce=1.0))
    assert other["validation"]["before"]["loss"] != pytest.approx(total / count, rel=1e-2)


def test_what_is_not_learned_has_no_gradient():
    logits_BTV = torch.randn(2, 5, 7, requires_grad=True)
    ids_BT, learned_BT = torch.randint(7, (2, 5)), torch.rand(2, 5) > 0.5
    targets = torch.randint(7, (2, 5, 3)), torch.rand(2, 5, 3).log_softmax(-1)
    batch = text_batch(logits_BTV, ids_BT, targets, 1.0, learned_BT)
    (losses.next_token(batch) + losses.distillation(batch)).backward()
    moved_BT = logits_BTV.grad.abs().sum(-1) > 0
    assert torch.equal(moved_BT[:, :-1], learned_BT[:, 1:]) and not moved_BT[:, -1].any()
    none = text_batch(logits_BTV, ids_BT, targets, 1.0, torch.zeros(2, 5, dtype=torch.bool))
    assert losses.next_token(none) == 0 and losses.distillation(none) == 0


def test_answers_of_a_text_without_conversations_are_refused(run, files):
    with pytest.raises(MoefyError, match="--answers-only, and .*a.txt has no conversation") as e:
        tokens_of(run, files / "a.txt", answers_only=True)
    assert e.value.code == 3
