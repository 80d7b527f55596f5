"""Models of unequal feed-forward width at one width: narrower ones are zero-padded, which changes no output.

A unit of a SwiGLU block whose gate, up and down weights are zero gives silu(0) · 0 · 0 = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from btx.checkpoints.reader import Checkpoint
from btx.models.families import feed_forward_width, mixture_family, with_width
from btx.models.family import DOWN, GATE, LAYER, UP


class Padded(Checkpoint):
    """A view of an open checkpoint whose feed-forward blocks have `width` units; nothing is copied or written."""

    def __init__(self, narrow: Checkpoint, width: int) -> None:
        self.folder, self._narrow, self._width = narrow.folder, narrow, width
        self.config = with_width(narrow.config, width)
        self.entries = {}
        for name, entry in narrow.entries.items():
            axis = _axis(name)
            shape = tuple(width if a == axis else s for a, s in enumerate(entry.shape))
            self.entries[name] = replace(entry, shape=shape)

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order, zeros in the padding."""
        axis, own = _axis(name), self._narrow.entries[name]
        if axis is None:
            return self._narrow.flat(name, start, stop)
        if axis == 0:
            inside = self._narrow.flat(name, min(start, own.count), min(stop, own.count))
            return torch.nn.functional.pad(inside, (0, stop - start - len(inside)))
        first, last = start // self._width, -(-stop // self._width)
        columns = own.shape[1]
        rows = self._narrow.flat(name, first * columns, last * columns).view(-1, columns)
        wide = torch.nn.functional.pad(rows, (0, self._width - columns)).flatten()
        return wide[start - first * self._width : stop - first * self._width]

    def close(self) -> None:
        """Close the open files."""
        self._narrow.close()


def _axis(name: str) -> int | None:
    """The axis of a tensor that is the feed-forward width; None if it has none."""
    match = LAYER.fullmatch(name)
    return {GATE: 0, UP: 0, DOWN: 1}.get(match[2]) if match else None


def same_width(models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """All models, padded to the width of the widest block of the widest model; mixtures as they are."""
    if any(mixture_family(model.config) for model in models.values()):
        return dict(models)
    widths = {name: feed_forward_width(model.config, str(model.folder)) for name, model in models.items()}
    widest = max(widths.values())
    return {
        name: model if widths[name] == widest == model.config.get("intermediate_size") else Padded(model, widest)
        for name, model in models.items()
    }
