"""Upload a finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefy.errors import MoefyError, first_line
from moefy.progress import Watch
from moefy.report import filled, model_card, read_report, readable
from moefy.runs.folder import read_tuning
from moefy.runs.verify import check_files

CARD = "README.md"
MODEL = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
RECORDS = ("recipe.toml", "conversion.*", "finetune.*", "report.json", "report.md", "report.html")
CALIBRATION = "moefy/calibration.safetensors"
"""The tokens of the calibration text, from which it can be read."""


def push(
    run: Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    calibration: bool = False,
    dry: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Upload the run to the model repository `repo`, creating it if need be; give what was sent.

    The card is sent last, with the repository's name in its snippet; the folder does not change.
    Caches, exports and other files are left out, and the calibration tokens unless `calibration`.
    A second call resumes an upload that was cut short. With `dry` nothing uses the network.

    Raises:
        MoefyError: code 2 for an invalid repository name, 3 for a run that is not whole, 5 if the
            Hub refuses or is out of reach.
    """
    summary = check_files(run, watch)
    _check_name(repo)
    card = _card(run, summary, repo)
    files = chosen(run, calibration=calibration)
    sent = {name: (run / name).stat().st_size for name in files}
    everything = {str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()}
    result = {
        "repo": repo,
        "revision": revision,
        "private": private,
        "files": sent,
        "bytes": sum(sent.values()),
        "left_out": sorted(everything - {*files}),
        "url": None,
    }
    if dry:
        return result
    return result | {"url": _upload(run, repo, files, card, private, revision, watch)}


def chosen(run: Path, *, calibration: bool = False) -> list[str]:
    """The files of a run that are uploaded: the model, its card and the records of the run."""
    patterns = [*MODEL, CARD, *(f"moefy/{name}" for name in RECORDS)]
    patterns += [CALIBRATION] if calibration else []
    files = {file for pattern in patterns for file in run.glob(pattern)}
    return [
        str(file.relative_to(run))
        for file in sorted(files)
        if file.is_file() and not file.is_symlink()
    ]


def _upload(
    run: Path,
    repo: str,
    files: list[str],
    card: str,
    private: bool | None,
    revision: str | None,
    watch: Watch,
) -> str:
    """Send the files, then the card; give the repository's address."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = huggingface_hub.HfApi()
    named: dict[str, Any] = {"repo_id": repo, "repo_type": "model", "revision": revision}
    try:
        watch("upload", 0, 2)
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, repo_type="model", exist_ok=True)
        api.upload_folder(
            folder_path=run,
            allow_patterns=[name for name in files if name != CARD],
            commit_message="Upload the model",
            **named,
        )
        watch("upload", 1, 2)
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            commit_message="Upload the model card",
            **named,
        )
    except LocalTokenNotFoundError as error:
        raise MoefyError("no token of the Hub is set; run `hf auth login`", code=5) from error
    except OfflineModeIsEnabled as error:
        raise MoefyError("HF_HUB_OFFLINE is set; unset it to upload", code=5) from error
    except HfHubHTTPError as error:
        raise MoefyError(f"the Hub refused {repo}: {first_line(error)}", code=5) from error
    except (HTTPError, OSError) as error:
        raise MoefyError(
            f"the Hub is out of reach ({first_line(error)}); run the same command again to resume",
            code=5,
        ) from error
    watch("upload", 2, 2)
    return str(url)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MoefyError(
            f"REPO {repo!r} is not a repository name ({first_line(error)}); expected owner/name",
            code=2,
        ) from error


def _card(run: Path, summary: dict[str, Any], repo: str) -> str:
    """The card of a run, with the numbers of its report if it has one.

    Raises:
        MoefyError: code 7 for a report that is broken or of another format.
    """
    measured = (run / "moefy" / "report.json").is_file()
    with readable(run):
        report = filled(read_report(run)) if measured else None
        return model_card(summary, report, repo, read_tuning(run))
