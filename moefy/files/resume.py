"""The saved state of an unfinished conversion, from which a rerun resumes and ends in equal bytes.

Every record is a file that appears whole. Facts identify the run. Two generations of the states
between layers are kept: if one is damaged, one layer is done again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.environment import differences
from moefy.errors import MoefyError
from moefy.files import publish
from moefy.files.buffers import MEMORY, Store
from moefy.files.safetensors_header import read_header, some
from moefy.files.shards import ShardWriter, read, save, sha256

FACTS = "facts"
RESTART = "start over with --restart"

Record = tuple[dict[str, Tensor], Any]
"""Tensors, and a JSON value."""


class State:
    """Records of an unfinished run in `folder`, which the first record creates.

    Without a folder nothing is saved.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._stored: dict[str, Any] = self.load(FACTS) or {}
        self._facts = dict(self._stored)
        self._claimed: dict[str, Any] = {}

    def claim(self, facts: Mapping[str, Any], *, force: bool = False) -> None:
        """Record facts of the run, and compare them with recorded ones.

        With `force` the records and files of another run are removed.

        Raises:
            MoefyError: code 7, with what differs.
        """
        lines = self.differences(facts)
        if lines and not force:
            raise MoefyError(
                f"{self.folder} is of another run: {some(lines)}; give the command that began it, "
                "or --force to start over",
                code=7,
            )
        if lines and self.folder:
            publish.clear(self.folder.parent)
            (self.folder.parent / publish.PART).mkdir()
            self._stored, self._facts = {}, dict(self._claimed)
        now = json.loads(json.dumps(facts))
        self._claimed |= now
        self._facts |= now

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """What differs between `facts` and the recorded ones of the same names, a line each."""
        now = json.loads(json.dumps(facts))
        known = {key: self._stored[key] for key in now if key in self._stored}
        return differences(known, {key: now[key] for key in known})

    def save(self, name: str, value: Any) -> None:
        """Record a JSON value."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        if name != FACTS and self._stored != self._facts:
            self.save(FACTS, self._facts)
            self._stored = dict(self._facts)
        publish.write_sealed(self.folder / f"{name}.json", value)

    def load(self, name: str) -> Any:
        """A recorded value; None if there is none.

        Raises:
            MoefyError: code 7 when the record is damaged.
        """
        return None if self.folder is None else publish.read_sealed(self.folder / f"{name}.json")

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], value: Any = None) -> None:
        """Record tensors and a JSON value."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        with publish.replacing(self.folder / f"{name}.safetensors") as draft:
            digests = save(self.folder, draft.stem, tensors)
        self.save(name, {"digests": digests, "value": value})

    def load_tensors(self, name: str, store: Store = MEMORY) -> Record | None:
        """Recorded tensors, read into `store`, and their value; None if there are none.

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
            raise publish.damaged_state(file)
        return tensors, record["value"]

    def save_layer(
        self,
        layer: int,
        states_BTD: Tensor,
        extra: Mapping[str, Tensor],
        written: Mapping[str, str],
        value: Any,
    ) -> None:
        """Record a finished layer: its output states, `extra` tensors, the digests of the tensors
        that it wrote, and a JSON value. The states of the layer before stay."""
        if self.folder is None:
            return
        self.save_tensors(f"states-{layer % 2}", {"states": states_BTD}, layer)
        self.save_tensors(f"layer-{layer}", extra, {"written": dict(written), "value": value})

    def layers(
        self, writer: ShardWriter, store: Store = MEMORY
    ) -> tuple[Tensor | None, list[Record]]:
        """The output states of the last finished layer, in `store`, and every layer's record.

        If the last layer's record is damaged, the layer before counts as the last.

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
    ) -> tuple[Tensor | None, list[Record]]:
        records = []
        for layer in range(count):
            tensors, record = self.load_tensors(f"layer-{layer}") or ({}, {})
            if not writer.keep(record["written"]):
                raise MoefyError(f"layer {layer} in {writer.folder} was changed; {RESTART}", code=7)
            records.append((tensors, record["value"]))
        if not count:
            return None, []
        states = self.load_tensors(f"states-{(count - 1) % 2}", store)
        if states is None or states[1] != count - 1:
            raise MoefyError(
                f"{self.folder} lacks the states behind layer {count - 1}; {RESTART}", code=7
            )
        return states[0]["states"], records


def num_layers(folder: Path | None) -> int:
    """Number of finished layers in a state's folder."""
    if folder is None:
        return 0
    return next(n for n in itertools.count() if not (folder / f"layer-{n}.json").exists())


def unfinished(out: Path) -> int | None:
    """Number of finished layers that a stopped run left beside `out`; None if it left no state."""
    place = publish.place_of(Path(os.path.abspath(out)))
    return num_layers(place / publish.STATE) if publish.has_state(place) else None
