"""What a run loses when serving loses one of its experts: each is taken out once, alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate.cache import tensors_digest
from moefy.evaluate.critical_experts import summary
from moefy.evaluate.expert_masks import Expert, losses
from moefy.evaluate.session import Session

ALL = "all"
"""Names every expert."""

LENGTH = 128
"""Tokens of a window."""

TOKENS = {"quick": 256, "usual": 512, "full": 2048}
"""Tokens of all texts together, by effort; `--tokens` may be fewer."""


def named(asked: Sequence[str], run: Mapping[str, Any]) -> list[Expert]:
    """The experts that `--lost-experts` names, of a run by its conversion.json.

    Raises:
        MoefyError: code 2, for a run without experts, or an expert that it does not have.
    """
    if not asked:
        return []
    known = {
        f"{row['layer']}.{expert}": (row["layer"], expert)
        for row in run["layers"]
        for expert in range(run["shape"]["num_experts"])
    }
    if not known:
        raise MoefyError("--lost-experts needs a run with experts, and this one has none", code=2)
    if ALL in asked:
        return [*known.values()]
    if unknown := [name for name in asked if name not in known]:
        layers = ", ".join(dict.fromkeys(str(layer) for layer, _ in known.values()))
        raise MoefyError(
            f"--lost-experts {unknown[0]} is not there; expected `all`, or LAYER.EXPERT with an "
            f"expert of 0 to {run['shape']['num_experts'] - 1} in one of the layers {layers}",
            code=2,
        )
    return [known[name] for name in dict.fromkeys(asked)]


def lost_experts(session: Session, settings: Settings) -> dict[str, Any]:
    """The loss of the run's last stage without each expert: of each alone, the mean and the worst.

    Every window is stored when it is done. How long all of them take is found on the first window,
    from an expert of the lowest and one of the highest layer.
    """
    main = next(c for c in session.candidates if c.label == session.main)
    experts = named(settings.lost_experts, session.summary)
    windows = _windows(session, min(settings.num_tokens, TOKENS[settings.effort]))

    def seconds(model: Any) -> float:
        start = time.perf_counter()
        done = len([*losses(model, windows[0], [experts[0], experts[-1]])])
        return (time.perf_counter() - start) / done

    each = session.cached("lost-expert-seconds", main, seconds, window=len(windows[0]))
    shadows = session.summary["recipe"].get("shadow", 0) > 0
    count = len(experts) * (1 + shadows)
    total = count * len(windows)
    minutes = max(1, round(each * total / 60))
    stage = f"{len(experts):,} lost experts, about {minutes} min in all"
    rows = []
    for number, ids_T in enumerate(windows):

        def measure(model: Any, ids_T: Tensor = ids_T, past: int = number) -> list[float]:
            result = []
            for loss in losses(model, ids_T, experts, shadows=shadows):
                session.watch(stage, past * count + len(result), total)
                result.append(loss)
            return result

        key = {"window": tensors_digest([ids_T]), "experts": experts}
        rows.append(session.cached("lost-experts", main, measure, **key))
    return {"label": main.label, **summary(experts, windows, rows)}


def _windows(session: Session, num_tokens: int) -> list[Tensor]:
    """Windows of about `num_tokens`, of each text alike."""
    result = []
    for windows in session.windows.values():
        pieces = (piece for ids_T in windows for piece in ids_T.split(LENGTH) if len(piece) > 1)
        count = -(-num_tokens // len(session.windows) // len(windows[0][:LENGTH]))
        result += itertools.islice(pieces, count)
    return result
