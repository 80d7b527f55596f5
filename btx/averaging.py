"""The tensors that are no experts: one out of those of all models, by the mean or by one of mergekit's methods.

Pure functions of tensors, and `Shared`, which feeds them from open checkpoints: block by block where a method goes
element by element, a whole tensor of each model where it must see it whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from btx.checkpoint import Checkpoint
from btx.settings import MergeSettings, SharedSettings

SEED = "seed"
ELEMENTWISE = ("mean", "linear")


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Unweighted mean in fp32, summed in order."""
    total = tensors[0].to(torch.float32, copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(torch.float32)  # adding unlike dtypes at once is far slower
    return total.div_(len(tensors))


def shared(
    tensors: dict[str, torch.Tensor], base: torch.Tensor, settings: SharedSettings, *, name: str, seed: int
) -> torch.Tensor:
    """One tensor out of the models' ones, in fp32, by the method that the recipe names.

    `tensors` by model name; `base` is the seed's own tensor, from which ties, dare_ties and model_stock take the
    differences. All but `mean` are mergekit's. The random mask of DARE depends on `seed` and `name` only.
    """
    if settings.method == "mean":
        return mean(list(tensors.values()))
    from mergekit.merge_methods import merge_tensors

    names = list(tensors)
    full = [tensors[n].to(torch.float32) for n in names]
    weight = [settings.weights.get(n, 1.0) for n in names]
    if settings.method == "linear":
        return merge_tensors(full, "linear", parameters={"weight": weight}).contiguous()  # type: ignore[no-any-return]
    if settings.method == "slerp":
        return merge_tensors(full, "slerp", parameters={"t": settings.t}, base_index=0)  # type: ignore[no-any-return]
    keep = [i for i, n in enumerate(names) if n != SEED]
    ids = [SEED, *(names[i] for i in keep)]
    parameters: dict[str, object] = {}
    if settings.method in ("ties", "dare_ties"):
        parameters = {"weight": {names[i]: weight[i] for i in keep}, "density": settings.density}
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return merge_tensors(  # type: ignore[no-any-return]
            [base.to(torch.float32), *(full[i] for i in keep)], settings.method, ids=ids, base_index=0,
            parameters=parameters,
        )  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """The tensors that are no experts, made out of all models' ones."""

    models: Mapping[str, Checkpoint]
    base: Checkpoint
    settings: MergeSettings

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is written."""
        return self.settings.torch_dtype(self.base.dtype)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor: block by block where the method goes element by element, else whole."""
        for made in self._full(name):
            yield made.to(self.dtype)

    def whole(self, name: str) -> torch.Tensor:
        """One tensor as it is written, in fp32, flat."""
        return torch.cat([piece.to(torch.float32) for piece in self.pieces(name)])

    def _full(self, name: str) -> Iterator[torch.Tensor]:
        def make(tensors: Iterable[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.models, tensors, strict=True))
            return shared(named, base, self.settings.shared, name=name, seed=self.settings.seed)

        if self.settings.shared.method in ELEMENTWISE:
            for base, *blocks in zip(
                self.base.blocks(name), *(m.blocks(name) for m in self.models.values()), strict=True
            ):
                yield make(blocks, base)
        else:
            yield make([m.read(name) for m in self.models.values()], self.base.read(name))
