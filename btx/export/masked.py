"""The experts that `btx moe mask` has put aside, whole, beside a mixture without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from btx.checkpoints.reader import Checkpoint
from btx.errors import ArtifactError
from btx.models.mixture import Moe, Shapes, number_in, require_shapes


class Masked:
    """The masked experts of a mixture: their places, names and tensors."""

    def __init__(self, checkpoint: Checkpoint, moe: Moe) -> None:
        config: dict[str, Any] = checkpoint.config
        places, names = config.get("places"), config.get("names")
        if not (isinstance(places, list) and isinstance(names, list) and len(places) == len(names) > 0):
            raise self._damaged(checkpoint, "it does not name a place for every expert")
        total = moe.count + len(places)
        if not all(type(p) is int and 0 <= p < total for p in places) or len(set(places)) < len(places):
            raise self._damaged(checkpoint, f"places {places!r:.80} are not distinct places among {total} experts")
        if not all(isinstance(n, str) for n in names) or len({*names, *moe.names}) < total:
            raise self._damaged(checkpoint, f"names {names!r:.80} are not distinct names of experts")
        if config["model_type"] != moe.config["model_type"]:
            raise self._damaged(checkpoint, f"it belongs to a {config['model_type']}")
        self.checkpoint, self.places, self.names = checkpoint, [int(p) for p in places], [str(n) for n in names]
        self.top_k = number_in(checkpoint, "top_k", total)
        require_shapes(checkpoint, self._shapes(moe), lambda _rest: True)

    @staticmethod
    def _damaged(checkpoint: Checkpoint, why: str) -> ArtifactError:
        return ArtifactError(f"{checkpoint.folder}/config.json is damaged: {why}. Mask the experts again.")

    def _shapes(self, moe: Moe) -> Shapes:
        for layer in moe.layers:
            yield moe.family.router_name(layer), (len(self.places), moe.hidden)
            for name, of in moe.of_experts.items():
                yield f"model.layers.{layer}.{name}", of.sizes(len(self.places), moe.hidden)
            yield from ((f"model.layers.{layer}.{e}.{k}", moe.shape(k)) for e in self.places for k in moe.family.expert)

    def pieces(self, place: int, prefix: str, kind: str) -> Iterator[torch.Tensor]:
        """A tensor of the masked expert with this place, in blocks."""
        return self.checkpoint.blocks(f"{prefix}{place}.{kind}")
