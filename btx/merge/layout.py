"""How the feed-forward blocks of several models are laid out as experts of one Mixture of Experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from btx.checkpoint import BLOCK, Checkpoint
from btx.errors import RecipeError
from btx.families import DOWN
from btx.merge.settings import MergeSettings


@dataclass(frozen=True)
class Experts:
    """How the models' feed-forward blocks are laid out as MoE experts: one each, split in chunks, or blended.

    split (paper, section on expert splitting): each block is cut into `chunks` of width F/C; the output projection is
    multiplied by C so that equal gates over all N·C chunks give the mean of the models' outputs.
    blend: the n-th expert is made of the n-th chunk (of N) of every model; the output projection is multiplied so
    that equal gates over all N experts give the mean of the models' outputs (the factor is 1).
    """

    form: str
    models: int
    chunks: int
    width: int

    @property
    def count(self) -> int:
        """Number of MoE experts."""
        return self.models * self.chunks if self.form == "split" else self.models

    @property
    def expert_width(self) -> int:
        """Feed-forward width of one MoE expert."""
        return self.width // self.chunks if self.form == "split" else self.width

    @property
    def parts(self) -> int:
        """Chunks that each model's feed-forward block is cut into."""
        return {"one": 1, "split": self.chunks, "blend": self.models}[self.form]

    def sources(self, expert: int) -> list[tuple[int, int]]:
        """What MoE expert `expert` is made of: (model, chunk) pairs, in the order of its rows."""
        if self.form == "blend":
            return [(model, expert) for model in range(self.models)]
        return [divmod(expert, self.parts)]

    def pieces(self, models: list[Checkpoint], expert: int, name: str) -> Iterator[torch.Tensor]:
        """The feed-forward tensor `name` of MoE expert `expert`, as blocks in row-major order."""
        rows, columns = models[0].entries[name].shape
        if not name.endswith(DOWN):
            size = rows // self.parts * columns
            for model, chunk in self.sources(expert):
                yield from models[model].blocks(name, chunk * size, (chunk + 1) * size)
        elif self.parts == 1:
            yield from models[expert].blocks(name)
        else:
            yield from self._columns(models, expert, name)

    def _columns(self, models: list[Checkpoint], expert: int, name: str) -> Iterator[torch.Tensor]:
        rows, columns = models[0].entries[name].shape
        width, step = columns // self.parts, max(1, BLOCK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            cut = [
                models[m].flat(name, start * columns, stop * columns).view(-1, columns)[:, c * width : (c + 1) * width]
                for m, c in self.sources(expert)
            ]
            joined = torch.cat(cut, 1)
            yield joined.to(torch.float32) * self.chunks if self.form == "split" else joined


def layout(settings: MergeSettings, models: int, width: int) -> Experts:
    """The expert layout of a recipe; RecipeError when the feed-forward width cannot be cut that way."""
    chunks = settings.chunks if settings.experts == "split" else models if settings.experts == "blend" else 1
    if width % chunks:
        raise RecipeError(
            f"merge.experts: {settings.experts} cuts the feed-forward width {width} into {chunks} chunks, "
            "which does not come out even. Choose another number of chunks."
        )
    return Experts(settings.experts, models, chunks if settings.experts == "split" else 1, width)
