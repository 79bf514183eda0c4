"""Check everything that a report needs before it loads a model."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moefy.compute_dtype import ComputeDtype
from moefy.config.methods import COPIES
from moefy.config.recipe import Recipe
from moefy.config.report import Settings
from moefy.convert.prepare import device_of
from moefy.errors import MoefyError
from moefy.evaluate import lost_experts, rivals
from moefy.evaluate.cache import VERSIONS, Cache
from moefy.evaluate.candidates import Candidate, check_tokenizer, dense_candidate, run_candidates
from moefy.evaluate.controls import (
    as_written,
    calibration_tokens,
    changed,
    control_candidates,
    controls,
)
from moefy.evaluate.dtypes import one_dtype
from moefy.evaluate.prompts import read_prompts
from moefy.evaluate.session import Session
from moefy.files.publish import write_text
from moefy.files.shards import stored_dtype
from moefy.progress import Watch
from moefy.runs.folder import DenseModel, check_folder, dense_model, read_recipe
from moefy.text.tokenizer import load_tokenizer
from moefy.text.windows import text_windows


def prepare(
    run: Path, summary: dict[str, Any], settings: Settings, place: Path, watch: Watch
) -> Session:
    """The session of a report: candidates, controls, texts, prompts and the dtype of all models.

    Raises:
        MoefyError: code 2 for methods that are impossible, 3 for runs that are not whole,
            tokenizers that differ, and texts that are too short, 5 for models that do not fit, and
            for a device that is not there.
    """
    device = device_of(settings.device)
    rivals.check(settings)
    lost_experts.named(settings.lost_experts, summary)
    against = [name for name in settings.against if name not in rivals.named(settings)]
    folders = [Path(name) for name in against if _is_folder(name)]
    recipe = read_recipe(run)
    model = dense_model(run, summary, recipe, settings.dense, "--dense")
    # Controls are converted from that model on this machine, wherever the run was converted.
    here = {"model": str(model.folder), "revision": None, "device": settings.device}
    recipe = dataclasses.replace(recipe, **here)
    copies = recipe.partition == COPIES
    if copies and (others := [name for name in against if not _is_folder(name)]):
        raise MoefyError(
            f"--against {others[0]!r}: the experts of {run} are copies, of which no method that "
            "divides an FFN is a counterpart; expected other runs or rivals",
            code=2,
        )
    methods = {name: changed(recipe, name) for name in against if not _is_folder(name)}
    check_folder(model.folder)
    own, missing = run_candidates(run)
    others, missing_others = _other_runs(folders)
    tokenizer = load_tokenizer(model.folder)
    for candidate in (*own, *others):
        check_tokenizer(tokenizer, candidate)
    prompts = read_prompts(settings.prompts, tokenizer) if settings.prompts else []
    notes = _other_weights(model, [*own, *others], given=settings.dense is not None)
    recipes = methods if copies else _control_recipes(settings, recipe) | methods
    missing += missing_others
    if copies and settings.controls:
        missing.append("controls are of an FFN that is divided; the dense model is that of copies")
    converted = model.is_source(summary)
    if recipes and not converted:
        missing.append(_without_controls(run, model, asked=methods or settings.controls))
        recipes = {}
    dense = dense_candidate(model, converted=converted)
    candidates, tokens = [dense, *own, *others], calibration_tokens(run, summary)
    extra = control_candidates(recipe, recipes, dense, tokens, place, watch)
    if settings.wants(settings.controls) and summary["shape"]["num_experts"] and not copies:
        extra.append(as_written(own[-1]))
    texts = _by_name(settings.text or own_texts(place))
    windows = {
        name: text_windows(
            tokenizer,
            path,
            num_tokens=settings.num_tokens,
            length=settings.sequence_length,
            text_field=settings.text_field,
        )
        for name, path in texts.items()
    }
    # All models are open at once while a text is scored, and rivals one after the other; a control
    # is at most as large as the run.
    opened = [c.folder or run for c in (*candidates, *extra)]
    opened += [run] * (settings.rivals or bool(rivals.named(settings)))
    compute = one_dtype(settings.compute_dtype, opened, device)
    notes += [f"this report {compute.note}"] if compute.note else []
    return Session(
        summary=summary,
        candidates=candidates,
        controls=extra,
        main=own[-1].label,
        tokenizer=tokenizer,
        texts=texts,
        windows=windows,
        prompts=prompts,
        tokens=tokens,
        cache=Cache(run / "moefy" / "measured", common_key(compute, device)),
        stored=stored_dtype(model.folder),
        compute=compute,
        device=device,
        place=place,
        watch=watch,
        not_run=[{"what": "a stage of the run", "reason": reason} for reason in missing],
        notes=notes,
    )


def common_key(compute: ComputeDtype, device: torch.device) -> dict[str, str]:
    """What every measurement of a report depends on: a GPU rounds otherwise than a processor."""
    return {"dtype": compute.name, "device": device.type, **VERSIONS}


def _other_runs(folders: Sequence[Path]) -> tuple[list[Candidate], list[str]]:
    """The stages of the runs of `--against`, labelled by their folders, and what is missing."""
    candidates: list[Candidate] = []
    missing: list[str] = []
    names = [folder.resolve().name for folder in folders]
    for number, (folder, name) in enumerate(zip(folders, names, strict=True), 1):
        unique = names.count(name) == 1 and name not in ("dense", "converted", "finetuned")
        stages, absent = run_candidates(folder, name if unique else f"{name} ({number})")
        candidates, missing = [*candidates, *stages], [*missing, *absent]
    return candidates, missing


def _control_recipes(settings: Settings, recipe: Recipe) -> dict[str, Recipe]:
    """The controls: all of them or none where the user says so, else the one that is cheap."""
    if settings.controls is not None:
        return controls(recipe) if settings.controls else {}
    quick = settings.effort == "quick" and not settings.rivals
    return {} if quick else {"static": controls(recipe)["static"]}


def _without_controls(run: Path, model: DenseModel, *, asked: Any) -> str:
    """Why there are no controls: `model` is not the one that was converted.

    Raises:
        MoefyError: code 2, if the user `asked` for them.
    """
    if asked:
        raise MoefyError(
            f"{model.folder} is not the model that {run} was converted from; controls and "
            "methods of --against are converted from that one: give it by --dense, or give "
            "--no-controls",
            code=2,
        )
    return f"controls need the model that was converted, which {model.folder} is not"


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """The texts by the stem of their file; by the whole path where two have one stem."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def own_texts(place: Path) -> list[Path]:
    """Prose and code that every Python carries: the manual's topics, and a few modules."""
    manual = place / "python-manual.txt"
    write_text(manual, "\n\n\n".join(pydoc_data.topics.topics.values()))
    library = Path(pydoc_data.__file__).parent.parent
    modules = [library / name for name in ("argparse.py", "csv.py", "textwrap.py", "heapq.py")]
    code = place / "python-library.txt"
    write_text(code, "\n\n\n".join(path.read_text("utf-8") for path in modules if path.is_file()))
    return [manual, code]


def _other_weights(model: DenseModel, candidates: Sequence[Candidate], *, given: bool) -> list[str]:
    """A note for each run that was converted from other weights than those of `model`.

    Raises:
        MoefyError: code 3, where there is one and --dense was not given.
    """
    notes = []
    for candidate in candidates:
        if candidate.summary is None or model.is_source(candidate.summary):
            continue
        if not given:
            raise MoefyError(
                f"{candidate.folder} was not converted from {model.folder}: its weights differ; "
                "expected runs of one model, or give the one to compare all with by --dense"
            )
        notes.append(
            f"{candidate.label} was converted from other weights than {model.folder}, which "
            "--dense names: its loss is compared with another model"
        )
    return notes


def _is_folder(name: str) -> bool:
    """Whether `--against` names a run rather than a method.

    Raises:
        MoefyError: code 2, when it is neither.
    """
    if Path(name).is_dir():
        return True
    if "=" not in name:
        raise MoefyError(
            f"--against {name!r} is no folder of a run and no method; expected a run, settings as "
            f"key=value such as 'method=moefication', or one of {', '.join(rivals.NAMES)}",
            code=2,
        )
    return False
