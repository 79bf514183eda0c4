"""A fine-tune as a whole, on tiny models: what it writes, that it learns, and that it resumes."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from stopping import stopped_at
from transformers import AutoModelForCausalLM
from tuned_run import step_rows, weights

from moefy import compute_dtype, memory
from moefy.config.finetune import Settings, build
from moefy.errors import MoefyError
from moefy.files.lock import locked
from moefy.files.safetensors_header import read_entries
from moefy.finetune import inputs, losses, teacher
from moefy.finetune.checks import check_machine
from moefy.finetune.home import home_of
from moefy.finetune.optim import MasterAdamW, parts
from moefy.finetune.router_hooks import Routing, activations, moe_layers
from moefy.finetune.run import finetune
from moefy.modeling import Experts, MoefyConfig
from moefy.text.packing import Amount
from moefy.text.self_text import WriterSizes

SMALL = {
    "ce": 0.0,
    "tokens": 2048,
    "sequence_length": 64,
    "validation_tokens": 512,
    "batch_size": 4,
}
FAST = {"learning_rate": 3e-3, "rest_learning_rate": 3e-3, "router_learning_rate": 1e-2}


def tuned(run, out, text, *, restart=False, force=False, **settings):
    built = build(None, {"data": str(text), **SMALL, **settings}, [])
    return finetune(run, out, built, restart=restart, force=force)


@pytest.fixture(scope="module")
def run(pico, converted):
    return converted(pico("llama"))


@pytest.fixture(scope="module")
def once(run, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned") / "out"
    return tuned(run, out, text, **FAST, tokens=8192), out


def test_it_learns_and_writes_a_run(once, run, text):
    summary, out = once
    before, after = summary["validation"]["before"], summary["validation"]["after"]
    assert after["kl"] < before["kl"]
    assert json.loads((out / "moefy" / "finetune.json").read_text())["steps"] == 32
    assert summary["tokens"] == 8192
    rows = step_rows(out)
    assert [row["step"] for row in rows] == list(range(1, 33))
    assert {"kl", "ce", "aux", "z", "load_cv", "entropy", "dead"} <= set(rows[0])
    assert len(summary["routing"]["after"]) == 2
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    names = {n: (e.dtype, e.shape) for n, e in read_entries(out).items()}
    assert names == {n: (e.dtype, e.shape) for n, e in read_entries(run).items()}
    recipe = build(out / "moefy" / "recipe.toml", {}, [])
    assert recipe.learning_rate == FAST["learning_rate"]
    assert not list(out.parent.glob(".*"))  # no checkpoints are left


def test_what_is_written_is_what_was_trained(once, run):
    _, out = once
    new, old = weights(out), weights(run)
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert {n for n in new if ".experts." in n} <= changed
    assert {n for n in new if n.endswith("mlp.gate.weight")} <= changed
    assert not any("shared_expert_gate" in name for name in changed)


def test_gates_stay_at_one(once):
    _, out = once
    model = AutoModelForCausalLM.from_pretrained(out)
    seen = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    with torch.no_grad():
        model(torch.arange(100)[None])
    for gate_TK in seen:
        assert torch.allclose(gate_TK * layer.num_experts, torch.ones(()), atol=2e-2)


def test_only_what_is_asked_for_is_trained(run, text, tmp_path):
    tuned(run, tmp_path / "out", text, train="router", **FAST)
    new, old = weights(tmp_path / "out"), weights(run)
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {n for n in new if n.endswith("mlp.gate.weight")}


def test_resumed_after_a_kill_ends_in_the_same_bytes(once, run, text, tmp_path):
    full, out = once
    again = {**FAST, "tokens": 8192, "save_every": 5, "measure_every": 0}
    with stopped_at(13):
        tuned(run, tmp_path / "out", text, **again)
    home = tmp_path / ".out.moefy-finetune"
    assert not (tmp_path / "out").exists()
    assert sorted(f.name for f in home.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]
    with pytest.raises(MoefyError, match=r"learning_rate was 0.003, is 0.001; .*--force") as caught:
        tuned(run, tmp_path / "out", text, **{**again, "learning_rate": 1e-3})
    assert caught.value.code == 7
    # A file that is not whole any more: the one before is taken.
    next((home / "checkpoint-10" / "tensors").glob("*.distcp")).write_bytes(b"cut")
    # Nor is the last line of the log.
    with (home / "finetune.jsonl").open("a") as log:
        log.write('{"step": 14, "lo')
    summary = tuned(run, tmp_path / "out", text, **again)
    new, old = weights(tmp_path / "out"), weights(out)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert [row["step"] for row in step_rows(tmp_path / "out")] == list(range(1, 33))
    assert summary["validation"] == full["validation"]
    assert not home.exists()


def test_stopped_behind_its_last_step_it_goes_on(run, text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    more = {**FAST, "save_every": 4}
    whole = tuned(run, tmp_path / "whole", text, **more)
    with monkeypatch.context() as planted:
        planted.setattr("moefy.finetune.run.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(run, tmp_path / "out", text, **more)
    resumed = tuned(run, tmp_path / "out", text, **more)
    assert all(resumed[key] == whole[key] for key in ("steps", "tokens", "validation", "routing"))
    new, old = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_a_resume_that_loses_the_experts_is_seen(once, run, text, tmp_path, monkeypatch):
    """The planted fault of Trainer's own checkpoints: experts are not taken up again."""
    from moefy.finetune import checkpoints

    trained = checkpoints.trained

    def without_experts(model):
        return {name: t for name, t in trained(model).items() if ".experts." not in name}

    monkeypatch.setattr(checkpoints, "trained", without_experts)
    again = {**FAST, "tokens": 8192, "save_every": 5, "measure_every": 0}
    with stopped_at(13):
        tuned(run, tmp_path / "out", text, **again)
    tuned(run, tmp_path / "out", text, **again)
    new, old = weights(tmp_path / "out"), weights(once[1])
    assert not all(torch.equal(new[name], old[name]) for name in old)


def test_a_teacher_is_asked_where_it_lies():
    """Rows are read on the CPU, and a teacher may be on a GPU."""

    def elsewhere(input_ids, use_cache):
        assert input_ids.device == elsewhere.device
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    elsewhere.device = torch.device("meta")
    ids_BTP, log_p_BTP = teacher.live(elsewhere, Settings())(
        torch.arange(2), torch.zeros(2, 3, dtype=torch.long)
    )
    assert ids_BTP.shape == log_p_BTP.shape == (2, 3, 7)


def test_cached_teacher_is_the_live_one(once, run, text, tmp_path):
    cache = tmp_path / "cache"
    for out in ("first", "second"):
        tuned(run, tmp_path / out, text, **FAST, tokens=8192, teacher_cache=str(cache))
    assert len(list(cache.iterdir())) == 1
    for out in ("first", "second"):
        new, old = weights(tmp_path / out), weights(once[1])
        assert all(torch.equal(new[name], old[name]) for name in old)


def test_a_cache_holds_more_tokens_a_place_than_16_bits_count(tmp_path):
    """Of a large vocabulary nearly all tokens, as many at every place."""
    logits_BTV = torch.rand(2, 4, 40_000, generator=torch.Generator().manual_seed(0))

    def model(input_ids, use_cache):
        return SimpleNamespace(logits=logits_BTV[: len(input_ids)])

    model.device = torch.device("cpu")
    ids_BT = torch.zeros(2, 4, dtype=torch.long)
    settings = Settings(top_p=1.0, top_tokens=40_000, batch_size=2)
    file = tmp_path / "cache.safetensors"
    live = teacher.live(model, settings)(torch.arange(2), ids_BT)
    stored = teacher.cached(file, lambda: model, ids_BT, settings)(torch.arange(2), ids_BT)
    assert live[1].isfinite().sum(-1).min() > 2**15
    assert torch.equal(stored[1], live[1])


def test_a_cache_is_of_one_dtype_of_the_teacher():
    names = {
        teacher.cache_name({"a": "1"}, "text", Settings(), dtype)
        for dtype in ("float32", "bfloat16")
    }
    assert len(names) == 2


def test_a_damaged_cache_is_refused(pico, tmp_path):
    ids = torch.arange(64).view(2, 32)
    load = partial(AutoModelForCausalLM.from_pretrained, pico("llama"))
    file = tmp_path / "cache.safetensors"
    arguments = (file, load, ids, Settings(batch_size=2))
    live = teacher.live(load(), Settings())(torch.arange(2), ids)
    stored = teacher.cached(*arguments)(torch.arange(2), ids)
    used = live[1].isfinite()
    width = live[1].shape[-1]
    assert torch.equal(stored[1][..., :width], live[1])
    assert torch.equal(stored[0][..., :width][used], live[0][used])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MoefyError, match="damaged"):
        teacher.cached(*arguments)


@pytest.mark.parametrize("soft", ["all", "chosen"])
def test_the_routers_gradient_is_that_of_a_soft_choice(run, soft):
    """Forward as written; backward as if each chosen gate were K times its soft share."""
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).train()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        plain = model.eval()(ids).logits
    routing = Routing(model.train(), build(None, {"router_gradient": soft}, []))
    with routing.recording():
        logits = model(ids).logits
    assert torch.allclose(logits, plain, atol=1e-5)
    block, layer = routing.layers[-1].block, routing.layers[-1]
    seen = {}
    hook = layer.router.register_forward_hook(lambda m, a, o: seen.update(x=a[0].detach(), o=o))
    slope = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(1))
    y = block(x)
    hook.remove()
    (gradient,) = torch.autograd.grad((y * slope).sum(), layer.learned[0][0])
    # Naive: every expert alone, one at a time, weighted by a softmax that is differentiated.
    x_TD, rows = x[0], layer.learned[0][0].detach().clone().requires_grad_()
    k, num = seen["o"][2].shape[1], layer.num_experts
    share_TE = (x_TD @ rows.T * 1024).softmax(-1) * k
    chosen_TE = torch.zeros(60, num).scatter(1, seen["o"][2], 1.0)
    h_TEN = activations(layer.experts, x_TD).detach()
    y_TED = torch.stack(
        [h_TEN[:, e] @ layer.experts.down_proj[e].detach().T / num for e in range(num)], 1
    )
    counted_TE = share_TE if soft == "all" else share_TE * chosen_TE
    naive = (counted_TE[..., None] * y_TED * slope[0][:, None]).sum()
    (expected,) = torch.autograd.grad(naive, rows)
    assert torch.allclose(gradient, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


def test_bfloat16_weights_follow_copies_in_float32():
    torch.manual_seed(0)
    exact = torch.nn.Parameter(torch.randn(50))
    low = torch.nn.Parameter(exact.detach().bfloat16())
    start = low.detach().clone()
    exact.data = low.detach().float()
    ours = MasterAdamW([{"params": [low], "lr": 1e-4}])
    theirs = torch.optim.AdamW([exact], lr=1e-4)
    for _ in range(30):
        slope = torch.sign(exact.detach()) * 2.0**-3
        low.grad, exact.grad = slope.bfloat16(), slope.clone()
        ours.step()
        theirs.step()
    assert torch.equal(low, exact.bfloat16())
    assert not torch.equal(low, start)
    naive = torch.nn.Parameter(start.clone())  # steps of 1e-4 in bfloat16 itself are lost
    plain = torch.optim.AdamW([naive], lr=1e-4, weight_decay=0.0)
    for _ in range(30):
        naive.grad = torch.sign(naive.detach()) * 2.0**-3
        plain.step()
    large = start.abs() > 0.5
    assert torch.equal(naive[large], start[large]) and not torch.equal(low[large], start[large])


def test_gradients_are_in_float32_for_one_group_at_a_time(monkeypatch):
    torch.manual_seed(0)
    low = [torch.nn.Parameter(torch.randn(8, 4).bfloat16()) for _ in range(5)]
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in low]
    split = [{"params": low[:2], "lr": 1e-2}, {"params": low[2:], "lr": 3e-2}]
    ours = MasterAdamW(split, fused=True)
    ours_all = [{"params": exact[:2], "lr": 1e-2}, {"params": exact[2:], "lr": 3e-2}]
    theirs, step, held = torch.optim.AdamW(ours_all, fused=True), torch.optim.AdamW.step, []

    def counted(self, closure=None):
        held.append(sum(copy.grad is not None for _, copy in ours.pairs))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    for _ in range(3):
        for weight, one in zip(low, exact, strict=True):
            weight.grad = torch.randn_like(weight)
            one.grad = weight.grad.float()
        held.clear()
        ours.step()
        assert held == [2, 3]
        step(theirs)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low, exact, strict=True))


def test_the_gradient_of_an_expert_is_no_larger_than_the_expert():
    """In moefy's own class. An indexed expert has `SelectBackward`, which fills a whole stack."""
    act = torch.nn.functional.silu
    shape = MoefyConfig(num_experts=3, expert_width=8, gated=True, num_shadow=0)
    experts = Experts(shape, 4, act)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    index_TK = torch.randint(3, (16, 2))
    y_TD = experts(torch.randn(16, 4), index_TK, torch.rand(16, 2))
    names, left = set(), [y_TD.grad_fn]
    while left:
        node = left.pop()
        names.add(type(node).__name__)
        left += [one for one, _ in node.next_functions if one]
    assert "UnbindBackward0" in names and "SelectBackward0" not in names
    assert "SelectBackward0" in str(experts.up_proj[0].grad_fn)


def test_collapse_is_caught_and_mended(run, text, tmp_path):
    # Routers that learn far too fast, and only from the experts that they choose already.
    wild = {**FAST, "router_learning_rate": 0.1, "router_gradient": "chosen", "guard_steps": 8}
    wild |= {"balance": "none", "router_z": 0.0, "tokens": 16384, "save_every": 4}
    wild |= {"measure_every": 0}  # what is looked for is at the end
    loose = tuned(run, tmp_path / "loose", text, **wild, guard_restarts=0)
    before, after = loose["validation"]["before"], loose["validation"]["after"]
    assert after["load_cv"] > 3 * before["load_cv"] and after["dead"] > before["dead"]
    mended = tuned(run, tmp_path / "out", text, **wild, balance_weight=0.0, guard_restarts=8)
    assert "experts of MoE layer" in mended["guard"][0]["reason"]
    assert "switch balancing at weight 0.01" in mended["guard"][0]["action"]
    after = mended["validation"]["after"]
    assert after["dead"] == 0 and after["load_cv"] < 0.7 * loose["validation"]["after"]["load_cv"]


def test_a_loss_that_is_not_finite_writes_nothing(run, text, tmp_path):
    with pytest.raises(MoefyError, match="loss") as caught:
        tuned(run, tmp_path / "out", text, learning_rate=1e20, rest_learning_rate=1e20)
    assert caught.value.code == 6
    assert not (tmp_path / "out").exists()


def test_balancing_that_has_no_say_is_refused(run, text, tmp_path, monkeypatch):
    def refused(says):
        with pytest.raises(MoefyError, match=says) as caught:
            tuned(run, tmp_path / "out", text, force=True)
        assert caught.value.code == 6 and not (tmp_path / "out").exists()

    with monkeypatch.context() as planted:
        others = tuple(loss for loss in losses.LOSSES if loss.name != "aux")
        planted.setattr(losses, "LOSSES", others)
        refused("first step is missing")
    with monkeypatch.context() as planted:
        zero = losses.Loss(*losses.AUX, lambda b: 0 * b.log_p[0].exp().sum(), (losses.ROUTERS,))
        planted.setattr(losses, "LOSSES", (*others, zero))
        refused("first step is 0")
    with monkeypatch.context() as planted:
        planted.setattr(inputs, "moe_layers", lambda model: moe_layers(model)[1:])
        refused("1 of 2 routers")
    assert tuned(run, tmp_path / "out", text, force=True)["steps"] == 8


def test_a_new_loss_is_one_entry(run, text, tmp_path, monkeypatch):
    """Its curve is in the log, its value in the sum, and what it needs is computed."""
    entry = losses.Loss("size", "ce", lambda b: b.teacher_LTD[0].square().mean(), (losses.STATES,))
    monkeypatch.setattr(losses, "LOSSES", (*losses.LOSSES, entry))
    tuned(run, tmp_path / "out", text, ce=0.5, tokens=1024)
    row = json.loads((tmp_path / "out" / "moefy" / "finetune.jsonl").read_text().splitlines()[0])
    total = row["kl"] + 0.5 * (row["ce"] + row["size"]) + 0.01 * row["aux"] + 0.001 * row["z"]
    assert row["size"] > 0 and row["loss"] == pytest.approx(total, rel=1e-5)


def test_nothing_is_computed_that_no_loss_needs():
    text_only = build(None, {"kl": 0.0, "ce": 1.0, "balance": "none", "router_z": 0.0}, [])
    assert losses.needs(text_only) == set()
    assert losses.TEACHER in losses.needs(build(None, {}, []))
    assert losses.ENERGY in losses.needs(build(None, {"router_ce": 0.1}, []))


def test_a_static_run_is_tuned_as_well(pico, converted, text, tmp_path):
    run = converted(pico("llama"), partition="static")
    summary = tuned(run, tmp_path / "out", text, learning_rate=1e-3, tokens=8192)
    assert summary["validation"]["after"]["kl"] < summary["validation"]["before"]["kl"]
    assert summary["routing"] == {"before": [], "after": []}


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        ({"data": "/nowhere.txt"}, "nowhere", 3),
        ({"sequence_length": 8192, "tokens": 65536, "validation_tokens": 8192}, "give more", 3),
        ({"batch_size": 10**6}, "lower --batch-size", 3),
        ({"teacher": "OTHER"}, "same vocabulary", 3),
    ],
)
def test_bad_input(run, text, tmp_path, pico, change, message, code):
    change = dict(change)
    if "teacher" in change:
        change["teacher"] = str(pico("llama", vocab_size=256))
    with pytest.raises(MoefyError, match=message) as caught:
        tuned(run, tmp_path / "out", text, **change)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def low(pico, converted):
    """A run in bfloat16."""
    return converted(pico("llama"), dtype="bfloat16")


@pytest.fixture
def slow_in_bfloat16(monkeypatch):
    monkeypatch.setattr(compute_dtype, "native", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype, device: 30.0)


def test_a_machine_without_the_stored_dtype_computes_in_float32(
    low, text, tmp_path, slow_in_bfloat16, monkeypatch
):
    seen = []
    load = inputs.open_model

    def opening(*args, **options):
        seen.append(options["dtype"])
        return load(*args, **options)

    monkeypatch.setattr(inputs, "open_model", opening)
    out = tmp_path / "out"
    summary = tuned(low, out, text, train="router", **FAST)
    assert seen[:2] == [torch.float32, torch.float32]  # the teacher, the student
    assert summary["compute"]["stored"] == "bfloat16"
    assert summary["compute"]["student"] == summary["compute"]["teacher"] == "float32"
    (note,) = summary["compute"]["notes"]
    assert "computes in float32, not in bfloat16 as stored: this machine is 30.0 times" in note
    assert json.loads((out / "moefy" / "finetune.json").read_text())["compute"]["notes"] == [note]
    # What is written has the stored dtypes, and what was not trained its bytes.
    new, old = weights(out), weights(low)
    assert {name: t.dtype for name, t in new.items()} == {n: t.dtype for n, t in old.items()}
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {n for n in new if n.endswith("mlp.gate.weight")}
    # What was measured is what is written.
    monkeypatch.undo()
    again = tuned(out, tmp_path / "again", text, train="router", compute_dtype="float32")
    assert again["validation"]["before"]["kl"] == pytest.approx(
        summary["validation"]["after"]["kl"], rel=1e-5
    )


def test_a_machine_with_too_little_memory_computes_as_stored(
    low, text, tmp_path, slow_in_bfloat16, monkeypatch
):
    monkeypatch.setattr(inputs, "available", lambda: 10**4)
    summary = tuned(low, tmp_path / "out", text, tokens=1024)
    assert summary["compute"]["student"] == "bfloat16"
    assert "30.0 times slower" in summary["compute"]["notes"][0]
    with pytest.raises(MoefyError, match="--compute-dtype float32: float32 takes") as caught:
        tuned(low, tmp_path / "other", text, compute_dtype="float32")
    assert caught.value.code == 5


def test_a_float32_that_training_leaves_alone_keeps_its_bytes(low, text, tmp_path):
    """In a checkpoint of several dtypes, opened in the lower one."""
    mixed = shutil.copytree(low, tmp_path / "mixed")
    tensors = weights(mixed)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() * 1.0001
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    tuned(mixed, out, text, train="router", tokens=1024, compute_dtype="bfloat16")
    assert torch.equal(weights(out)["model.norm.weight"], tensors["model.norm.weight"])


def test_text_that_the_model_writes_keeps_to_the_memory_there_is(pico, monkeypatch):
    """As many documents at a time as fit; where not even one fits, it is refused."""
    folder, settings = pico("llama"), build(None, SMALL, [])
    config = inputs.plain_config(folder)
    sizes = WriterSizes(read_entries(folder).values(), config.to_dict(), config.num_hidden_layers)
    sample, batches = inputs.sample, []

    def sampling(*arguments, batch_size, **options):
        batches.append(batch_size)
        return sample(*arguments, batch_size=batch_size, **options)

    def write(room):
        for module in (inputs, memory):
            monkeypatch.setattr(module, "available", lambda: room)
        return inputs.write_text(folder, settings, torch.float32, Amount(1024, 64))

    monkeypatch.setattr(inputs, "sample", sampling)
    for batch_size in (8, 1):
        write(memory.base_bytes(folder) + sizes.num_bytes(4, batch_size))
        write(memory.base_bytes(folder) + sizes.num_bytes(4, 2 * batch_size) - 1)
    assert batches == [8, 8, 1, 1]
    with pytest.raises(MoefyError, match="writes its own training text takes .* --data FILE") as e:
        write(sizes.num_bytes(4, 1) - 1)
    assert e.value.code == 5 and batches == [8, 8, 1, 1]


def test_a_settings_former_name_is_taken(tmp_path):
    lines = []
    file = tmp_path / "recipe.toml"
    file.write_text('[finetune]\ndtype = "as-stored"\n')
    assert build(file, {}, [], lines.append).compute_dtype == "auto"
    assert build(file, {"dtype": "float32"}, []).compute_dtype == "float32"
    assert build(file, {"compute_dtype": "bfloat16"}, []).compute_dtype == "bfloat16"
    assert build(file, {}, ["dtype=float16"]).compute_dtype == "float16"
    assert lines == [
        "dtype is called compute_dtype now",
        "compute_dtype as-stored is called auto now",
    ]


def stopped(run, out, text, monkeypatch, **settings):
    """Leave the checkpoints of a fine-tune that was stopped behind its last step."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr("moefy.finetune.run.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(run, out, text, **settings)
    return home_of(out)


def test_another_fine_tune_needs_force(run, text, tmp_path, monkeypatch):
    few, out = {"tokens": 1024, "save_every": 2}, tmp_path / "out"
    home = stopped(run, out, text, monkeypatch, **few)
    before = sorted(home.rglob("*"))
    with pytest.raises(MoefyError, match="seed was 0, is 1; .* or --force to start") as caught:
        tuned(run, out, text, **few, seed=1)
    assert caught.value.code == 7 and sorted(home.rglob("*")) == before
    forced = tuned(run, out, text, **few, seed=1, force=True)
    fresh = tuned(run, tmp_path / "fresh", text, **few, seed=1)
    assert forced["validation"] == fresh["validation"] and not home.exists()


def test_the_same_fine_tune_goes_on_with_force_too_and_starts_over_by_restart(
    run, text, tmp_path, monkeypatch
):
    few, out, starts = {"tokens": 1024, "save_every": 2}, tmp_path / "out", []
    from moefy.finetune.trainer import Finetuner

    train = Finetuner.train

    def training(self, resume_from_checkpoint=None, **options):
        starts.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint=resume_from_checkpoint, **options)

    monkeypatch.setattr(Finetuner, "train", training)
    for option in ({}, {"force": True}, {"restart": True, "force": True}):
        stopped(run, out, text, monkeypatch, **few, force=True)
        tuned(run, out, text, **few, **option)
        shutil.rmtree(out)
    assert [str(start).rpartition("-")[2] for start in starts[1::2]] == ["4", "4", "None"]


def test_two_at_once_are_refused(run, text, tmp_path):
    home = home_of(tmp_path / "out")
    with locked(home / "lock", tmp_path / "out"):
        with pytest.raises(MoefyError, match="is writing .*out; wait until it is done") as caught:
            tuned(run, tmp_path / "out", text, tokens=1024)
    assert caught.value.code == 5 and not (tmp_path / "out").exists()


def test_all_shards_of_the_run_are_compared(pico, converted, text, tmp_path, monkeypatch):
    run = shutil.copytree(converted(pico("llama"), max_shard_size="90KB"), tmp_path / "run")
    few, out = {"tokens": 1024, "save_every": 2}, tmp_path / "out"
    stopped(run, out, text, monkeypatch, **few)
    shards = sorted(run.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(MoefyError, match=f"fine-tune: run.{shard.name} differs"):
            tuned(run, out, text, **few)
        shard.write_bytes(whole)


def test_a_logger_that_is_not_installed(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(MoefyError, match=f"needs a package: pip install {name}") as caught:
            check_machine(build(None, {"log_to": name}, []))
        assert caught.value.code == 5


def test_what_a_run_cannot_do_is_refused_before_a_model_is_opened(
    pico, converted, text, tmp_path, monkeypatch
):
    static, whole = converted(pico("llama"), partition="static"), converted(pico("llama"))
    own, other = converted(pico("gpt2"), target="moefy"), str(pico("llama", hidden_size=64))
    monkeypatch.setattr(inputs, "open_model", None)
    long = {"sequence_length": 256, "tokens": 2048, "batch_size": 1}
    for folder, settings, says in (
        (static, {"train": "router"}, "a static run has no routers"),
        (static, {"kl": 0.0, "router_ce": 1.0}, "a static run has no routers"),
        (own, long, "256 tokens, but the model has positions for 128"),
    ):
        with pytest.raises(MoefyError, match=says) as caught:
            tuned(folder, tmp_path / "out", text, **settings)
        assert caught.value.code == 2
    with pytest.raises(MoefyError, match="2 layers of 64; expected one of the run's sizes"):
        tuned(whole, tmp_path / "out", text, teacher=other, hidden=1.0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused(pico, run, text, tmp_path):
    with pytest.raises(MoefyError, match="a dense model: convert it first"):
        tuned(pico("llama"), tmp_path / "out", text)
    with pytest.raises(MoefyError, match="not a whole run"):
        tuned(tmp_path, tmp_path / "out", text)
    own = shutil.copytree(run, tmp_path / "own")
    with pytest.raises(MoefyError, match="is the run itself"):
        tuned(own, own, text, force=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["learning_rat=1"], "did you mean learning_rate"),
        (["train=lots"], "--train is 'lots'"),
        (["kl=0", "ce=0"], "nothing to learn from"),
        (["hidden=1", "teacher_cache=x"], "drop one"),
        (["top_p=2"], "top_p is 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(MoefyError, match=message) as caught:
        build(None, {}, settings)
    assert caught.value.code == 2


def test_parts_leave_out_what_holds_the_gates(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    by_part = parts(model)
    assert set(by_part["router"]) == {f"model.layers.{n}.mlp.gate.weight" for n in range(2)}
    assert all(".mlp." in name for name in by_part["experts"])
    named = {name for part in by_part.values() for name in part}
    left = {name for name, _ in model.named_parameters()} - named
    assert left == {f"model.layers.{n}.mlp.shared_expert_gate.weight" for n in range(2)}
