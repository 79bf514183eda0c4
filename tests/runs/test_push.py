"""What is sent to the Hub, by an interface of it that records instead of sending."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from pico import write_tuning

from moefy.errors import MoefyError
from moefy.runs.push import CALIBRATION, chosen, push
from moefy.runs.verify import check_files


class Hub:
    """Stands for `HfApi`: notes each call, and fails where it is told to."""

    def __init__(self, failing: str = "", error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self._failing, self._error = failing, error

    def __getattr__(self, name: str):
        def called(*arguments, **named):
            if name == self._failing and self._error:
                raise self._error
            self.calls.append((name, {**dict(enumerate(arguments)), **named}))
            return f"https://huggingface.co/{arguments[0]}" if name == "create_repo" else None

        return called


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


@pytest.fixture
def run(pico, converted, tmp_path) -> Path:
    """A whole run, with things in it that nobody should get."""
    out = Path(shutil.copytree(converted(pico("llama")), tmp_path / "run"))
    (out / "moefy" / "cache").mkdir()
    for name in ("notes.txt", ".env", "model.gguf", "moefy/cache/config.json", "moefy/x.py"):
        (out / name).write_text("mine")
    (out / "vocab-link.json").symlink_to("/etc/hostname")
    return out


MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
MODEL |= {"tokenizer_config.json"}
TOLD = {f"moefy/{name}" for name in ("recipe.toml", "conversion.json", "conversion.md")}


def test_what_is_sent(run, hub):
    told = push(run, "owner/name", private=True)
    assert set(told["files"]) == MODEL | TOLD | {"README.md"}
    assert told["url"] == "https://huggingface.co/owner/name"
    assert {CALIBRATION, "notes.txt", ".env", "model.gguf"} <= set(told["left_out"])
    (make, made), (folder, sent), (card, carded) = hub.calls
    assert (make, folder, card) == ("create_repo", "upload_folder", "upload_file")
    assert made == {0: "owner/name", "repo_type": "model", "private": True, "exist_ok": True}
    assert set(sent["allow_patterns"]) == MODEL | TOLD and sent["folder_path"] == run
    assert sent["repo_id"] == carded["repo_id"] == "owner/name"
    assert carded["path_in_repo"] == "README.md"
    text = carded["path_or_fileobj"].decode()
    assert 'from_pretrained("owner/name"' in text and "PATH" not in text
    assert ModelCard(text).data.library_name == "transformers"
    assert 'from_pretrained("PATH"' in (run / "README.md").read_text()  # which stays as it was


def test_the_card_of_a_fine_tune_says_that_it_was_trained(run, hub):
    """With no report, from which it could be known; a conversion's says that it was not."""
    push(run, "owner/name")
    assert "without training" in hub.calls[-1][1]["path_or_fileobj"].decode()
    write_tuning(run)
    push(run, "owner/name")
    card = hub.calls[-1][1]["path_or_fileobj"].decode()
    assert "without training" not in card
    assert "and fine-tuned on 1,000 tokens" in card
    assert "Then fine-tuned on 1,000 tokens of `train.txt`" in card and "3.000 to 2.500" in card


def test_what_the_patterns_mean_to_the_hub(run):
    """The library, given the names as patterns, takes these files and no others."""
    from huggingface_hub.utils import filter_repo_objects

    names = [str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()]
    files = chosen(run)
    assert sorted(filter_repo_objects(names, allow_patterns=files)) == files
    assert "vocab-link.json" in names and "vocab-link.json" not in files


def test_a_branch_and_the_calibration_tokens(run, hub):
    told = push(run, "owner/name", revision="v1", calibration=True)
    assert CALIBRATION in told["files"]
    assert [name for name, _ in hub.calls][:2] == ["create_repo", "create_branch"]
    assert all(named["revision"] == "v1" for _, named in hub.calls[2:])


def test_a_dry_run_asks_nothing(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the Hub was asked"))
    told = push(run, "owner/name", dry=True)
    assert told["url"] is None and told["bytes"] > 0


def remove(run: Path) -> None:
    (run / "model.safetensors").unlink()


def change(run: Path) -> None:
    with (run / "config.json").open("a") as file:
        file.write(" ")


def unreported(run: Path) -> None:
    (run / "moefy" / "conversion.json").unlink()


def broken(run: Path) -> None:
    (run / "moefy" / "conversion.json").write_text("[1]")


def tuned(run: Path) -> None:
    """Say that the weights are those of a fine-tune, which they are not."""
    write_tuning(run, outputs={"model.safetensors": "0" * 64})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "lacks model.safetensors"),
        (change, "not as the run wrote it: config.json"),
        (unreported, "not a whole run"),
        (broken, "not a whole run"),
        (tuned, "not as the run wrote it: model.safetensors"),
    ],
)
def test_a_run_that_is_not_whole(damage, says, run, hub):
    check_files(run)
    damage(run)
    with pytest.raises(MoefyError) as caught:
        push(run, "owner/name")
    assert caught.value.code == 3 and says in str(caught.value)
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["a/b/c", "", "owner/na me", "../x", "-x"])
def test_what_is_no_name(repo, run, hub):
    with pytest.raises(MoefyError) as caught:
        push(run, repo, dry=True)
    assert caught.value.code == 2 and "expected owner/name" in str(caught.value)


def refusal() -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return HfHubHTTPError("403 Forbidden\nmore", response=response)


@pytest.mark.parametrize(
    ("failing", "error", "says"),
    [
        ("create_repo", refusal(), "refused owner/name: 403 Forbidden"),
        ("create_repo", OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE"),
        ("upload_folder", ConnectionError("cut"), "out of reach (cut); run the same command"),
        ("upload_file", refusal(), "refused"),
    ],
)
def test_what_the_hub_does_not_do(failing, error, says, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(failing, error))
    with pytest.raises(MoefyError) as caught:
        push(run, "owner/name")
    assert caught.value.code == 5 and says in str(caught.value)
    assert "\n" not in str(caught.value)
