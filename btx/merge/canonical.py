"""Checkpoints under one set of names: tensors that are joined, or named otherwise, are seen as the table has them.

Phi-3 stores queries, keys and values as one tensor, and gate and up as another; LFM2 calls them w1, w3 and w2. Of a
mixture some programs store what transformers has in memory: the experts of a layer as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from btx.checkpoints.reader import Checkpoint, opened
from btx.checkpoints.validate import Entry
from btx.checkpoints.writer import TensorSpec
from btx.errors import ArtifactError
from btx.models.families import DENSE, mixture_family
from btx.models.family import LAYER, Family, part_rows

Parts = dict[str, tuple[int, ...]]  # the tensors that one holds, in order, with their shapes


class Canonical(Checkpoint):
    """A view of an open checkpoint whose joined tensors are seen in parts; nothing is copied or written.

    `within(below, entry, name)` gives the parts of a layer's tensor by its name below the layer; None for one that is
    seen as it is stored.
    """

    def __init__(self, file: Checkpoint, within: Callable[[str, Entry, str], Parts | None]) -> None:
        self.folder, self.config, self.head, self._file = file.folder, file.config, file.head, file
        self.entries: dict[str, Entry] = {}
        self._place: dict[str, tuple[str, int]] = {}
        for name, entry in file.entries.items():
            match = LAYER.fullmatch(name)
            parts = within(match[2], entry, name) if match else None
            if match is None or parts is None:
                self.entries[name] = entry
                continue
            start = 0
            for part, shape in parts.items():
                seen, made = name.removesuffix(match[2]) + part, replace(entry, shape=shape)
                if seen in self.entries or (seen in file.entries and seen != name):
                    raise ArtifactError(
                        f"{file.folder} holds {seen} twice, once within {name}, and it is not clear which is meant. "
                        "Remove the one that is not."
                    )
                self.entries[seen] = replace(made, offset=entry.offset + start * made.size // max(1, made.count))
                self._place[seen] = (name, start)
                start += made.count

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order."""
        stored, shift = self._place.get(name, (name, 0))
        return self._file.flat(stored, shift + start, shift + stop)

    def close(self) -> None:
        """Close the open files."""
        self._file.close()


def canonical(checkpoint: Checkpoint) -> Checkpoint:
    """An open checkpoint under the names of the table of families."""
    if mixture := mixture_family(checkpoint.config):
        return checkpoint if mixture.as_in_memory else Canonical(checkpoint, partial(_of_mixture, mixture))
    family = DENSE.get(checkpoint.config["model_type"])
    if family is None or not family.parts:
        return checkpoint
    return Canonical(checkpoint, partial(_of_dense, family, checkpoint))


def _of_dense(family: Family, checkpoint: Checkpoint, below: str, entry: Entry, name: str) -> Parts | None:
    parts = family.parts.get(below)
    if parts is None:
        return None
    rows = part_rows(parts, entry.shape[0], checkpoint.config)
    if sum(rows) != entry.shape[0]:
        raise ArtifactError(
            f"{checkpoint.folder}: {name} has {entry.shape[0]} rows, by config.json it should have {sum(rows)}. "
            "Fetch the checkpoint again."
        )
    return {part: (count, *entry.shape[1:]) for part, count in zip(parts, rows, strict=True)}


def _of_mixture(family: Family, below: str, entry: Entry, _name: str) -> Parts | None:
    """The published tensors in one that is named as in memory; a shape that cannot be its own is left as it is."""
    memory = family.fused
    constants = {of.memory: name for name, of in family.constants.items() if of.memory}
    if below == memory.router or below in constants:
        return {constants.get(below, family.router): entry.shape}
    kinds = [kind for kind, name in memory.expert.items() if name == below]
    if not kinds or len(entry.shape) != 3 or entry.shape[1] % len(kinds):
        return None
    count, rows, columns = entry.shape
    if family.stacked:
        return {family.expert[kinds[0]]: entry.shape}
    shape = (rows // len(kinds), columns)
    return {family.expert[kind].format(e=e): shape for e in range(count) for kind in kinds}


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
    """A checkpoint under the names of the table of families, whose files are closed at the end."""
    with opened(folder) as checkpoint:
        yield canonical(checkpoint)
