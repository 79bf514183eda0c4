"""What of a run is on disk for good, so that a rerun goes on from there and ends with its bytes.

Every record is a file that appears whole. Facts say which run it is; of the states between layers
there are two generations, so that one that is damaged costs a layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.environment import differences
from moefy.errors import MoefyError
from moefy.files.buffers import MEMORY, Store
from moefy.files.publish import (
    PART,
    STATE,
    clear,
    damaged_state,
    has_state,
    place_of,
    read_sealed,
    replacing,
    write_sealed,
)
from moefy.files.safetensors_header import read_header, some
from moefy.files.shards import ShardWriter, read, save, sha256

FACTS = "facts"
RESTART = "start over with --restart"


Kept = tuple[dict[str, Tensor], Any]
"""Tensors, and a value that JSON can hold."""


class State:
    """Records of an unfinished run in `folder`, which is made for the first of them.

    Without a folder nothing is kept, and nothing found.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._stored: dict[str, Any] = self.load(FACTS) or {}
        self._facts = dict(self._stored)
        self._claimed: dict[str, Any] = {}

    def claim(self, facts: Mapping[str, Any], *, force: bool = False) -> None:
        """Note what the run is, or compare with what was noted: with `force` another run's records
        are removed, and what it has written.

        Raises:
            MoefyError: code 7, naming what differs.
        """
        now = json.loads(json.dumps(facts))
        known = {key: self._stored[key] for key in now if key in self._stored}
        lines = differences(known, {key: now[key] for key in known})
        if lines and not force:
            raise MoefyError(
                f"{self.folder} is of another run: {some(lines)}; give the command that began it, "
                "or --force to start over",
                code=7,
            )
        if lines and self.folder:
            clear(self.folder.parent)
            (self.folder.parent / PART).mkdir()
            self._stored, self._facts = {}, dict(self._claimed)
        self._claimed |= now
        self._facts |= now

    def save(self, name: str, value: Any) -> None:
        """Record a value that JSON can hold."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        if name != FACTS and self._stored != self._facts:
            self.save(FACTS, self._facts)
            self._stored = dict(self._facts)
        write_sealed(self.folder / f"{name}.json", value)

    def load(self, name: str) -> Any:
        """A recorded value, None if there is none.

        Raises:
            MoefyError: code 7 when the record is damaged.
        """
        return None if self.folder is None else read_sealed(self.folder / f"{name}.json")

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], value: Any = None) -> None:
        """Record tensors, and with them a value."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / f"{name}.safetensors") as draft:
            digests = save(self.folder, draft.stem, tensors)
        self.save(name, {"digests": digests, "value": value})

    def load_tensors(
        self, name: str, store: Store = MEMORY
    ) -> tuple[dict[str, Tensor], Any] | None:
        """Recorded tensors, in `store`, and their value, None if there are none.

        Raises:
            MoefyError: code 7, when they are damaged.
        """
        if (record := self.load(name)) is None:
            return None
        assert self.folder is not None
        file = self.folder / f"{name}.safetensors"
        try:
            entries = read_header(file)
            tensors = {key: read(key, entry, store.empty) for key, entry in entries.items()}
            digests = {key: sha256(tensor) for key, tensor in tensors.items()}
        except (OSError, MoefyError):
            digests = {}
        if digests != record["digests"]:
            raise damaged_state(file)
        return tensors, record["value"]

    def save_layer(
        self,
        layer: int,
        states_BTD: Tensor,
        extra: Mapping[str, Tensor],
        written: Mapping[str, str],
        value: Any,
    ) -> None:
        """Record that a layer is done: the states that leave it, tensors and a value to keep, and
        the digests of what it has written. The states of the layer before stay."""
        if self.folder is None:
            return
        self.save_tensors(f"states-{layer % 2}", {"states": states_BTD}, layer)
        self.save_tensors(f"layer-{layer}", extra, {"written": dict(written), "value": value})

    def layers(
        self, writer: ShardWriter, store: Store = MEMORY
    ) -> tuple[Tensor | None, list[Kept]]:
        """The states that leave the last layer that is done, in `store`, and what was kept of every
        layer.

        Where the last layer's record is damaged, the one before counts as the last.

        Raises:
            MoefyError: code 7, when more is damaged.
        """
        count = num_layers(self.folder)
        try:
            return self._layers(count, writer, store)
        except MoefyError:
            if count == 0:
                raise
            return self._layers(count - 1, writer, store)

    def _layers(
        self, count: int, writer: ShardWriter, store: Store
    ) -> tuple[Tensor | None, list[Kept]]:
        kept = []
        for layer in range(count):
            tensors, record = self.load_tensors(f"layer-{layer}") or ({}, {})
            if not writer.keep(record["written"]):
                found = f"what layer {layer} has in {writer.folder} was changed"
                raise MoefyError(f"{found}; {RESTART}", code=7)
            kept.append((tensors, record["value"]))
        if not count:
            return None, []
        states = self.load_tensors(f"states-{(count - 1) % 2}", store)
        if states is None or states[1] != count - 1:
            found = f"{self.folder} lacks the states behind layer {count - 1}"
            raise MoefyError(f"{found}; {RESTART}", code=7)
        return states[0]["states"], kept


def num_layers(folder: Path | None) -> int:
    """How many layers are recorded as done in a state's folder."""
    count = 0
    while folder is not None and (folder / f"layer-{count}.json").exists():
        count += 1
    return count


def unfinished(out: Path) -> int | None:
    """How many layers a stopped run has left beside `out` for a rerun; None where it left none."""
    place = place_of(Path(os.path.abspath(out)))
    return num_layers(place / STATE) if has_state(place) else None
