"""Reports of planted runs: what was planted shows, and what was measured is not measured again."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pico import write_tuning
from safetensors.torch import load_file, save_file
from stock import some_active

from moefy.config.report import Settings
from moefy.environment import code
from moefy.errors import MoefyError
from moefy.evaluate import cache, scoring, sizes, speed
from moefy.evaluate import measure as parts
from moefy.evaluate.cache import Cache
from moefy.evaluate.run import evaluate
from moefy.evaluate.timed_rounds import Grid

SMALL = Grid(((1, 16), (2, 16)), rounds=1, new_tokens=2)
FEW = {"tokens": 200, "sequence_length": 64}


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A run to write into."""
    return Path(shutil.copytree(converted(pico("llama")), tmp_path / "runs" / "run"))


def scores(text, **more) -> Settings:
    return Settings(text=(text,), effort="quick", speed=False, **FEW, **more)


def test_every_part_of_a_report(run, text, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "The", "answer": "river"}\n{"prompt": "A"}\n')
    settings = Settings(
        text=(text,),
        prompts=tmp_path / "p.jsonl",
        grid=SMALL,
        llama_cpp=False,
        controls=False,
        fail_if=("dnll>-99", "dead>1000"),
        **FEW,
    )
    with monkeypatch.context() as patch:
        patch.setattr(parts, "peak_bytes", lambda folder, *_: len(str(folder)))
        report = evaluate(run, settings)
    assert report["not_run"] == []
    assert report["format"] == 2 and report["main"] == "converted"
    assert json.loads((run / "moefy" / "report.json").read_text()) == report
    row = report["texts"]["text"]["converted"]
    assert row["nll"] == pytest.approx(math.log(row["perplexity"]))
    characters = len(text.read_text()[:2000].encode())  # as many bytes, for it is ASCII
    assert 0 < row["bits_per_byte"] < row["nll"] / math.log(2) * row["tokens"] / 50 < characters
    assert report["robustness"].keys() == {
        "in-domain",
        "random tokens",
        "truncated prompts",
        "long context",
        "text: text",
    }
    for rows in report["robustness"].values():
        assert 0 <= rows["converted"]["routing_drift"] < 1
        assert 0 < rows["converted"]["routing_entropy"] <= 1
        assert rows["dense"]["routing_drift"] is None
    assert report["robustness"]["long context"]["dense"]["tokens"] == 64
    sizes_of_run = report["models"]["converted"]
    assert sizes_of_run["peak_bytes"] == len(str(run))
    assert sizes_of_run["parameters_active"] < sizes_of_run["parameters_total"]
    assert (
        sizes_of_run["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    )  # layers, k and v, heads, width, float
    assert [one["answer"] == "river" for one in report["prompts"]] == [True, False]
    assert all(math.isfinite(one["drop"]) for one in report["prompts"])
    assert len(report["speed"]["transformers"]["rows"]) == 2 * 2 * 2
    layers = report["routing"]["converted"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer in layers:
        assert sum(layer["load_E"]) == pytest.approx(1, abs=1e-4)
        assert len(layer["coactivation_EE"]) == len(layer["top_tokens"]) == len(layer["load_E"])
    assert report["failed"] and "dnll" in report["failed"][0] and len(report["failed"]) == 1

    # Nothing is measured a second time, and the report is the same.
    def never(*_, **__):
        raise AssertionError("measured again")

    for module, name in ((scoring, "score_models"), (parts, "sizes"), (parts, "peak_bytes")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(speed, "measure", never)
    monkeypatch.setattr(parts.prompts, "continuation", never)
    monkeypatch.setattr(parts.prompts, "likelihood", never)
    again = evaluate(run, settings)
    timed = {"created": "", "seconds": {}}
    assert again | timed == report | timed
    # The negative control: another text is another measurement.
    other = evaluate(run, scores(text, controls=False, dense=None))
    assert other["texts"]["text"] == report["texts"]["text"]
    (tmp_path / "other.txt").write_text(text.read_text()[3000:])
    lost = "measured again"
    with pytest.raises(MoefyError, match=lost):
        evaluate(run, scores(tmp_path / "other.txt"))


def test_a_report_that_was_cut_short_goes_on(run, text, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "sizes", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, scores(text))
    assert not (run / "moefy" / "report.json").exists()
    names = {file.name for file in (run / "moefy" / "measured").iterdir()}
    assert len(names) == 2
    monkeypatch.setattr(scoring, "score_models", stopped)
    assert evaluate(run, scores(text))["not_run"] == []
    # A damaged measurement counts as none.
    for name in names:
        (run / "moefy" / "measured" / name).write_text('{"value"')
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, scores(text))


def test_other_code_measures_again(run, text, monkeypatch):
    def never(*_, **__):
        raise RuntimeError("measured again")

    evaluate(run, scores(text))
    monkeypatch.setattr(scoring, "score_models", never)
    assert evaluate(run, scores(text))["not_run"] == []
    monkeypatch.setitem(cache.VERSIONS, "moefy", "of other sources")
    with pytest.raises(MoefyError, match="measured again"):
        evaluate(run, scores(text))


def test_the_code_that_measures_is_told_from_that_which_draws(tmp_path):
    package = Path(shutil.copytree(Path(scoring.__file__).parent.parent, tmp_path / "moefy"))
    before = [code(folder=package), code(cache.NOT_MEASURING, package)]
    assert before == [code(), cache.VERSIONS["moefy"]]
    files = {"report/chart.py": True, "runs/push.py": True, "evaluate/metrics.py": False}
    for name, alike in (*files.items(), ("runs/folder.py", False)):
        file = package / name
        whole = file.read_text()
        file.write_text(whole + "# changed\n")
        assert code(folder=package) != before[0]
        assert (code(cache.NOT_MEASURING, package) == before[1]) is alike
        file.write_text(whole)


def test_a_part_that_fails_takes_no_other_with_it(run, text, monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(parts.prompts, "continuation", broken)
    report = evaluate(run, scores(text))
    assert report["not_run"] == [
        {"what": "generation", "reason": "RuntimeError: a fault of two lines"}
    ]
    assert report["texts"]["text"] and report["generation"] == []


def test_a_model_against_itself_is_no_distance_away(run, text):
    report = evaluate(run, scores(text, dense=str(run)))
    row = report["texts"]["text"]["converted"]
    assert row["kl"] == 0 and row["dnll"] == 0 and row["top1_agreement"] == 1


@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_dead_expert_shows(planted, pico, converted, text, tmp_path):
    """Its score is lowered so far that no token is sent to it; without that, it is alive."""
    source = converted(pico("llama"), **some_active("glm4_moe"))
    run = Path(shutil.copytree(source, tmp_path / "run"))
    file = run / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name][3] -= 100.0 * planted
    save_file(tensors, file, {"format": "pt"})
    report = evaluate(run, scores(text))
    layers = report["routing"]["converted"]["layers"]
    assert (layers[1]["load_E"][3] == 0) == planted
    assert (layers[1]["dead"] > 0) == planted
    sentences = [one for one in report["advice"] if "dead expert" in one["sentence"]]
    assert bool(sentences) == planted
    if planted:
        assert sentences[0]["because"]["layers"] == [1]
        # A token that is on no expert's list does not name the dead one's.
        assert layers[1]["top_tokens"][3] == []


def finetuned(parent: Path, out: Path, **more) -> Path:
    """A folder as `moefy finetune` would write it, of slightly other weights."""
    shutil.copytree(parent, out)
    file = out / "model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    (out / "moefy" / "finetune.json").unlink(missing_ok=True)
    write_tuning(out, parent, **more)
    (out / "moefy" / "finetune.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    return out


def test_every_stage_of_a_run_and_other_runs_stand_side_by_side(run, text, tmp_path):
    tuned = finetuned(run, tmp_path / "runs" / "tuned")
    twice = finetuned(tuned, tmp_path / "runs" / "twice")
    report = evaluate(twice, scores(text, against=(str(run),)))
    labels = ["dense", "converted", "finetuned", "finetuned 2", "run"]
    assert list(report["texts"]["text"]) == labels
    assert report["main"] == "finetuned 2" and list(report["runs"]) == [*labels[1:3], "run"]
    assert report["texts"]["text"]["run"] == report["texts"]["text"]["converted"]
    assert report["texts"]["text"]["finetuned"] != report["texts"]["text"]["converted"]
    assert report["finetune"]["finetuned"]["curve"] == [{"step": 1, "loss": 2.0}]
    # Moved together, they still find each other; alone, the report says what is missing.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "runs", moved)
    shutil.rmtree(tmp_path / "runs")
    assert list(evaluate(moved / "twice", scores(text))["texts"]["text"]) == labels[:4]
    shutil.rmtree(moved / "run")
    report = evaluate(moved / "tuned", scores(text))
    assert list(report["texts"]["text"]) == ["dense", "finetuned"]
    assert "fine-tuned from is not there" in report["not_run"][0]["reason"]
    # The negative control of being there: one of that name, of other weights.
    shutil.copytree(moved / "tuned", moved / "run")
    (moved / "run" / "moefy" / "finetune.json").unlink()
    report = evaluate(moved / "tuned", scores(text))
    assert list(report["texts"]["text"]) == ["dense", "finetuned"]
    assert "fine-tuned from has other weights now" in report["not_run"][0]["reason"]


def test_another_tokenizer_is_refused(run, text, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(MoefyError, match="another tokenizer") as refused:
        evaluate(other, scores(text))
    assert refused.value.code == 3
    with pytest.raises(MoefyError, match="another tokenizer"):
        evaluate(run, scores(text, against=(str(other),)))


def test_a_run_without_weights_is_not_whole(run, text):
    (run / "model.safetensors").unlink()
    with pytest.raises(MoefyError, match="not a whole run|holds no model.safetensors"):
        evaluate(run, scores(text))


def test_what_is_neither_a_run_nor_a_method(run, text):
    with pytest.raises(MoefyError, match="no folder of a run and no method") as refused:
        evaluate(run, scores(text, against=("nowhere",)))
    assert refused.value.code == 2


def test_a_measurement_is_kept_under_all_that_it_depends_on(tmp_path):
    stored, calls = Cache(tmp_path), []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    assert stored.once("kind", {"a": 1, "b": 2}, measure) == {"value": 1}
    assert stored.once("kind", {"b": 2, "a": 1}, measure) == {"value": 1}
    assert stored.once("kind", {"a": 1, "b": 3}, measure) == {"value": 2}
    assert stored.once("other", {"a": 1, "b": 2}, measure) == {"value": 3}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_dense_token_stream_scores_only_what_is_kept(pico):
    """With `keep`, the last tokens count, and what stands before them is their context."""
    from transformers import AutoModelForCausalLM

    from moefy.evaluate.metrics import compare

    model = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32).eval()
    ids_T = torch.randint(128, (40,), generator=torch.Generator().manual_seed(0))
    some = compare(model, {}, [ids_T], keep=10)["dense"]
    with torch.inference_mode():
        logits_TV = model(ids_T[None]).logits[0, -11:-1]
    expected = torch.nn.functional.cross_entropy(logits_TV, ids_T[-10:])
    assert some.num_tokens == 10 and some.nll == pytest.approx(float(expected), rel=1e-5)


def test_peak_memory_is_that_of_a_process_of_its_own(pico, tmp_path, monkeypatch):
    """Not what this one takes, which is far more; an error when the process fails."""
    cpu = torch.device("cpu")
    peak = sizes.peak_bytes(pico("llama"), "float32", cpu)
    assert 100_000 < peak < 300e6 < sizes._resident("VmHWM")
    monkeypatch.setattr(sizes.sys, "executable", "false")
    with pytest.raises(MoefyError, match="was not measured"):
        sizes.peak_bytes(tmp_path, "float32", cpu)
