"""Dense checkpoints under one set of names: tensors that a family joins or names otherwise are seen as separate ones.

Phi-3 stores queries, keys and values as one tensor, and gate and up as another; LFM2 calls them w1, w3 and w2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from btx.checkpoints.reader import Checkpoint, opened
from btx.checkpoints.validate import Entry
from btx.checkpoints.writer import TensorSpec
from btx.errors import ArtifactError
from btx.models.families import DENSE
from btx.models.family import LAYER, Family, part_rows


class Canonical(Checkpoint):
    """A view of an open checkpoint whose joined tensors are seen in parts; nothing is copied or written."""

    def __init__(self, file: Checkpoint, parts: dict[str, tuple[str, ...]]) -> None:
        self.folder, self.config, self.head, self._file = file.folder, file.config, file.head, file
        self.entries: dict[str, Entry] = {}
        self._place: dict[str, tuple[str, int]] = {}
        for name, entry in file.entries.items():
            match = LAYER.fullmatch(name)
            below = parts.get(match[2]) if match else None
            if match is None or below is None:
                self.entries[name] = entry
                continue
            rows = part_rows(below, entry.shape[0], self.config)
            if sum(rows) != entry.shape[0]:
                raise ArtifactError(
                    f"{file.folder}: {name} has {entry.shape[0]} rows, by config.json it should have {sum(rows)}. "
                    "Fetch the checkpoint again."
                )
            names = [name.removesuffix(match[2]) + part for part in below]
            start = 0
            for part, count in zip(names, rows, strict=True):
                made = replace(entry, shape=(count, *entry.shape[1:]))
                self.entries[part] = replace(made, offset=entry.offset + start * made.size // max(1, made.count))
                self._place[part] = (name, start)
                start += made.count

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order."""
        stored, shift = self._place.get(name, (name, 0))
        return self._file.flat(stored, shift + start, shift + stop)

    def close(self) -> None:
        """Close the open files."""
        self._file.close()


def canonical(checkpoint: Checkpoint) -> Checkpoint:
    """An open dense checkpoint under the names of the table of families."""
    family = DENSE.get(checkpoint.config["model_type"])
    return Canonical(checkpoint, family.parts) if family and family.parts else checkpoint


def joined(family: Family, rows: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The tensors of a dense model as its class stores them, from those of the names that the table uses."""
    joins = {parts[0]: (stored, parts) for stored, parts in family.parts.items()}
    inside = {part for parts in family.parts.values() for part in parts}
    found, by_name = [], {row.name: row for row in rows}
    for row in rows:
        match = LAYER.fullmatch(row.name)
        below = match[2] if match else row.name
        if below in joins:
            stored, parts = joins[below]
            prefix = row.name.removesuffix(below)
            some = [by_name[prefix + part] for part in parts]
            shape = (sum(one.shape[0] for one in some), *row.shape[1:])
            found.append(TensorSpec(prefix + stored, row.dtype, shape, partial(_pieces, some)))
        elif below not in inside:
            found.append(row)
    return found


def _pieces(rows: Sequence[TensorSpec]) -> Iterator[torch.Tensor]:
    for row in rows:
        yield from row.pieces()


@contextmanager
def opened_canonical(folder: Path) -> Iterator[Checkpoint]:
    """A dense checkpoint under the names of the table of families, whose files are closed at the end."""
    with opened(folder) as checkpoint:
        yield canonical(checkpoint)
