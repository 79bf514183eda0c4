"""A fine-tune on every class, over several processes, killed, and with everything switched on."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from tuned_run import rows as log_rows
from tuned_run import weights

import moefy
from moefy.config.finetune import Settings, build
from moefy.finetune.router_hooks import Routing, update_bias
from moefy.finetune.run import finetune

ROOT = Path(moefy.__file__).parent.parent
SMALL = {"tokens": 2048, "sequence_length": 64, "validation_tokens": 512, "batch_size": 4}
CLASSES = [
    ("llama", "qwen2_moe"),
    ("llama", "mixtral"),
    ("llama", "granitemoeshared"),
    ("llama", "glm4_moe"),
    ("qwen3", "qwen3_moe"),
    ("granitemoehybrid", "granitemoehybrid"),
    ("olmo2", "flex_olmo"),
    ("ernie4_5", "ernie4_5_moe"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    ("cohere2", "cohere2_moe"),
    ("lfm2", "lfm2_moe"),
    ("gpt2", "moefy"),
]
BIASED = ("glm4_moe", "ernie4_5_moe", "lfm2_moe")


def tuned(run, out, text, **settings):
    return finetune(run, out, build(None, {"data": str(text), **SMALL, **settings}, []))


@pytest.mark.parametrize(("family", "target"), CLASSES)
def test_routers_of_every_class_are_read_and_learn(pico, converted, family, target):
    run = converted(pico(family), target=target)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        plain = model.eval()(ids, use_cache=False).logits
    routing = Routing(model.train(), Settings(router_ce=1.0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert routing.layers
    with routing.recording():
        logits = model(ids, use_cache=False).logits
    assert torch.allclose(logits, plain, atol=1e-4)
    logits.square().mean().backward()
    for layer in routing.layers:
        assert layer.logits_TE is not None and layer.index_TK is not None
        k = layer.index_TK.shape[1]
        assert layer.energy_TE.shape == (64, layer.num_experts)
        # As long as nothing is moved, what is highest is what is chosen.
        best = layer.logits_TE.topk(k).indices.sort(-1).values
        assert (best == layer.index_TK.sort(-1).values).float().mean() > 0.98
        assert all(row.grad is not None and row.grad.abs().sum() > 0 for row, _ in layer.learned)
        assert (layer.bias_E is not None) == (target in BIASED)


@pytest.mark.parametrize("target", BIASED)
def test_a_selection_bias_evens_out_the_load(pico, converted, target):
    family = next(family for family, name in CLASSES if name == target)
    run = converted(pico(family), target=target)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    routing = Routing(model)
    # Few different tokens, so that the load is uneven at first.
    ids = torch.randint(0, 24, (8, 64), generator=torch.Generator().manual_seed(0))

    def variation():
        with torch.no_grad(), routing.recording() as layers:
            model(ids, use_cache=False)
        values = []
        for layer in layers:
            load_E = layer.index_TK.flatten().bincount(minlength=layer.num_experts).float()
            update_bias(layer, load_E, 0.02)
            values.append(float(load_E.std(correction=0) / load_E.mean()))
        return sum(values) / len(values)

    before = variation()
    for _ in range(60):
        after = variation()
    assert before > 0.1 and after < 0.5 * before


def test_everything_switched_on(pico, converted, text, tmp_path):
    run = converted(pico("llama"), target="glm4_moe")
    summary = tuned(
        run,
        tmp_path / "out",
        text,
        **{"ce": 0.5, "hidden": 0.1, "router_ce": 0.1, "temperature": 2.0, "balance": "bias"},
        **{"noise": 0.5, "expert_dropout": 0.1, "capacity_factor": 1.25, "cold_expert_share": 0.1},
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        measure_every=2,
        log_to="tensorboard",
        dtype="float32",
    )
    rows = log_rows(tmp_path / "out")
    assert {"kl", "ce", "hidden", "router_ce", "z"} <= set(rows[0]) and "aux" not in rows[0]
    assert any("validation" in row for row in rows)
    assert summary["steps"] == 4
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert "router_ce = 0.1" in (tmp_path / "out" / "moefy" / "recipe.toml").read_text()


@pytest.mark.parametrize(("family", "target"), [("llama", "qwen2_moe"), ("gpt2", "moefy")])
def test_gradient_checkpointing_changes_nothing(pico, converted, text, tmp_path, family, target):
    run = converted(pico(family), target=target)
    for name in ("plain", "checkpointed"):
        tuned(run, tmp_path / name, text, gradient_checkpointing=name == "checkpointed")
    new, old = weights(tmp_path / "checkpointed"), weights(tmp_path / "plain")
    assert all(torch.allclose(new[name], old[name], atol=1e-6) for name in old)


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral"])
def test_adapters_are_merged(pico, converted, text, tmp_path, target):
    run = converted(pico("llama"), target=target)
    summary = tuned(run, tmp_path / "out", text, train="lora", learning_rate=1e-2, tokens=4096)
    new, old = weights(tmp_path / "out"), weights(run)
    assert new.keys() == old.keys()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {
        name
        for name in new
        if (".mlp." in name or ".block_sparse_moe." in name) and "shared_expert_gate" not in name
    }
    assert summary["validation"]["after"] != summary["validation"]["before"]


def test_adapters_leave_biases_alone(pico, converted, text, tmp_path):
    run = converted(pico("gpt2"), target="moefy")
    tuned(run, tmp_path / "out", text, train="lora", learning_rate=1e-2, tokens=1024)
    new, old = weights(tmp_path / "out"), weights(run)
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    parts = {name.rpartition(".mlp.")[2] for name in changed}
    assert {"experts.up_proj", "experts.down_proj"} <= parts
    assert not any("bias" in part for part in parts)


def command(run, out, text, *more, **changes):
    settings = [f"--set={key}={value}" for key, value in {**SMALL, **changes}.items()]
    return [
        "-m",
        "moefy",
        "finetune",
        str(run),
        "--out",
        str(out),
        "--data",
        str(text),
        *settings,
        *more,
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


SHARED = {
    "a copy each": {"router_gradient": "all"},
    "FSDP2": {"router_gradient": "all", "fsdp": 2},
    "FSDP2 and expert parallelism": {"router_gradient": "chosen", "fsdp": 2, "expert_parallel": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SHARED)
def test_two_processes_match_one(pico, converted, text, tmp_path, how):
    run = converted(pico("llama"))
    more = {"balance": "variation", "balance_weight": 1.0, "learning_rate": 1e-3}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = command(run, tmp_path / "two", text, **more, **SHARED[how], batch_size=2)
    done = subprocess.run(
        [*launch, *two], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report:") == 1
    tuned(run, tmp_path / "one", text, **more, router_gradient=SHARED[how]["router_gradient"])
    new, old, start = weights(tmp_path / "two"), weights(tmp_path / "one"), weights(run)
    moved = max(float((old[name] - start[name]).abs().max()) for name in old)
    apart = max(float((old[name] - new[name]).abs().max()) for name in old)
    assert apart < 0.02 * moved
    rows = [log_rows(tmp_path / n) for n in ("one", "two")]
    for one, other in zip(*rows, strict=True):
        assert ("validation" in one) == ("validation" in other)
        if "validation" in one:
            continue
        for key in ("loss", "kl", "aux", "load_cv", "tokens"):
            assert other[key] == pytest.approx(one[key], rel=1e-3)


SCONTROL = "#!/bin/sh\necho localhost\n"
SRUN = """#!/bin/sh
# On this machine as often as the job has machines; each is one of them to torchrun.
for node in $(seq "$SLURM_NNODES"); do "$@" & done
for node in $(seq "$SLURM_NNODES"); do wait -n || exit; done
""".replace("/bin/sh", "/bin/bash")


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_goes_on_in_fewer_processes(pico, converted, text, tmp_path):
    """slurm.sbatch starts torchrun.sh on two "machines" of one process; then torchrun.sh alone."""
    run, launch, stubs = converted(pico("llama")), ROOT / "recipes" / "launch", tmp_path / "stubs"
    stubs.mkdir()
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (stubs / name).write_text(script)
        (stubs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**environment(), "PATH": f"{stubs}:{os.environ['PATH']}", "PORT": port}
    place |= {"PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    place |= {"SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_NODELIST": "a[1-2]"}
    small = {**SMALL, "batch_size": 2, "save_every": 2, "balance": "none", "tokens": 8192}
    words = [f"--set={key}={value}" for key, value in small.items()]
    words += ["--set=gradient_checkpointing=false", "--device", "cpu"]

    def start(script, out, *more):
        command = ["bash", launch / script, run, text, "--out", tmp_path / out, *words, *more]
        return subprocess.Popen(
            command,
            env=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    whole = start("slurm.sbatch", "whole")
    printed = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, printed[-3000:]
    assert printed.count("Report:") == 1
    job, home = start("slurm.sbatch", "out"), tmp_path / ".out.moefy-finetune"
    while job.poll() is None and not list(home.glob("checkpoint-*")):
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGTERM)  # as Slurm does; torchrun then ends its processes
    job.communicate(timeout=600)
    assert not (tmp_path / "out").exists() and list(home.glob("checkpoint-*"))
    place |= {"GPUS": "1", "NODES": "1"}
    alone = start("torchrun.sh", "out", "--gradient-accumulation-steps", "2")
    printed = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, printed[-3000:]
    summaries = [
        json.loads((tmp_path / out / "moefy" / "finetune.json").read_text())
        for out in ("whole", "out")
    ]
    layouts = [one["settings"]["fsdp"] for one in summaries]
    assert layouts == [2, 1] and {one["steps"] for one in summaries} == {32}
    new, old, before = weights(tmp_path / "out"), weights(tmp_path / "whole"), weights(run)
    moved = max(float((old[name] - before[name]).abs().max()) for name in old)
    assert max(float((old[name] - new[name]).abs().max()) for name in old) < 1e-3 * moved


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bytes(pico, converted, text, tmp_path):
    run = converted(pico("llama"))
    more = {"tokens": 16384, "save_every": 2}  # seconds, of which it is killed in the first
    tuned(run, tmp_path / "whole", text, **more)
    home, out = tmp_path / ".out.moefy-finetune", tmp_path / "out"
    dice = random.Random(0)
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, *command(run, out, text, **more)],
            env=environment(),
            stderr=subprocess.PIPE,
        )
        if attempt < 2:  # let it come to a checkpoint it had not, and a little further
            seen = sorted(home.glob("checkpoint-*"))
            while process.poll() is None and sorted(home.glob("checkpoint-*")) == seen:
                time.sleep(0.02)
            time.sleep(dice.random() * 0.3)
            process.send_signal(signal.SIGKILL)
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode == (-signal.SIGKILL if attempt < 2 else 0), errors
        assert out.exists() == (attempt == 2)
    new, old = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert not home.exists()


def test_exploration_ends_with_the_written_forward(pico, converted):
    """What disturbs choices does so in training only, and not at its end."""
    run = converted(pico("llama"))
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        routing = Routing(model, Settings(noise=5.0, cold_expert_share=0.5))
        assert torch.equal(model(ids, use_cache=False).logits, plain)
        model.train()
        assert not torch.allclose(model(ids, use_cache=False).logits, plain, atol=1e-3)
        routing.progress = 0.5
        assert torch.allclose(model(ids, use_cache=False).logits, plain, atol=1e-5)
