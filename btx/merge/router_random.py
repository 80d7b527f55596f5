"""Router rows that no data makes: random or orthogonal ones, at the scale of the router's inputs.

That scale is estimated from the merged weights alone, so that a merge runs no model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

from btx.checkpoints.names import EMBEDDING
from btx.errors import ArtifactError
from btx.merge.averaging import SharedTensors
from btx.models.family import Family


def random_rows(name: str, count: int, scale: Callable[[], torch.Tensor], shared_: SharedTensors) -> list[torch.Tensor]:
    """Router weights, a row per expert, scaled to the router's inputs and drawn from a seed of the layer's own."""
    from btx.moe.routing import init_router

    key = int.from_bytes(hashlib.sha256(f"{shared_.settings.seed}/{name}".encode()).digest()[:7])
    generator = torch.Generator().manual_seed(key)
    made = init_router(
        scale(), experts=count, entropy=shared_.settings.random_entropy, generator=generator,
        orthogonal=shared_.settings.router == "orthogonal",
    )  # fmt: skip
    return [made.to(shared_.dtype)]


def scale_of(shared_: SharedTensors, norm: str, offset: float = 0.0) -> torch.Tensor:
    """The merged weight (D,) of a norm with what its class adds to it; ArtifactError when that is all zeros."""
    scale = shared_.whole(norm) + offset
    if not scale.any():
        raise ArtifactError(
            f"{norm} is all {0 - offset:g} in the merged model, so its router would see nothing but zeros. "
            f"Use other weights for it than those of {shared_.base.folder}."
        )
    return scale


class RouterScales:
    """The RMS (D,) of each component of a layer's router input, estimated from the merged weights alone.

    After an RMS norm it is the norm's weight, with what its class adds to that; in a mixture whose routers normalise
    their input themselves, their scale over sqrt(D). Where the router sees the bare residual
    stream (FlexOlmo), the input is the sum of the embedding and of normed outputs, two per layer up to the router's
    own: their mean squares add up, as far as they are uncorrelated.
    """

    def __init__(self, family: Family, shared_: SharedTensors) -> None:
        self.family, self.shared = family, shared_
        self._embedding: torch.Tensor | None = None

    def __call__(self, layer: int) -> torch.Tensor:
        """The RMS for one layer; ArtifactError when its norm's weight is all zeros."""
        names = [f"model.layers.{n}.{norm}" for n in range(layer + 1) for norm in self.family.norms]
        if self.family.residual:
            added = [self.shared.whole(name).square() for name in names[:-1]]  # the last is added after the router
            return torch.stack([self._embedding_square(), *added]).sum(0).sqrt()
        own = f"model.layers.{layer}.{self.family.input_scale}"
        if own in self.shared.base.entries:
            return scale_of(self.shared, own) / math.sqrt(self.shared.base.config["hidden_size"])
        return scale_of(self.shared, names[-1], self.family.norm_offset)

    def _embedding_square(self) -> torch.Tensor:
        if self._embedding is None:
            rows, width = self.shared.shape(EMBEDDING)
            total, rest = torch.zeros(width), torch.empty(0)
            for piece in self.shared.pieces(EMBEDDING):
                rest = torch.cat([rest, piece.flatten().to(torch.float32)])
                full = len(rest) // width * width
                total += rest[:full].view(-1, width).square().sum(0)
                rest = rest[full:]
            self._embedding = total / rows
        return self._embedding
