"""Averages the tensors that are not experts over all models, by the mean or by one of mergekit's methods.

Pure functions of tensors, and `SharedTensors`, which feeds them from open checkpoints: block by block for elementwise
methods, a whole tensor of each model for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from btx.checkpoints.names import BY_TOKEN
from btx.checkpoints.reader import BLOCK, Checkpoint
from btx.errors import ResourceError
from btx.merge.vocabulary import JointVocabulary
from btx.models.family import LAYER
from btx.recipe.merge_settings import (
    GROUPS,
    OPTIONS,
    WEIGHED,
    AveragingSettings,
    MergeSettings,
    SharedSettings,
    group_of,
)

SEED = "seed"
ELEMENTWISE = ("mean", "linear", "task_arithmetic")  # methods that can go block by block
COPIES = 5  # fp32 copies of each model's tensor that mergekit's other methods need: 2.2 to 3.6, plus what was read


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Unweighted mean in fp32, summed in order."""
    total = tensors[0].to(torch.float32, copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(torch.float32)  # adding mixed dtypes directly is far slower
    return total.div_(len(tensors))


def average(
    tensors: dict[str, torch.Tensor], base: torch.Tensor, how: AveragingSettings, *, name: str, seed: int,
    depth: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """One tensor in fp32 from those of all models, by the recipe's method.

    `tensors` by model name; `base` is the seed's own tensor, which some methods subtract; `depth` is the relative depth
    of the tensor's layer, 0 to 1. All but `mean` are mergekit's. The random mask of DARE depends on `seed` and `name`
    only.
    """
    if how.method == "mean":
        return mean(list(tensors.values()))
    from mergekit.merge_methods import merge_tensors

    full = {n: t.to(torch.float32) for n, t in tensors.items()}
    weight = {n: how.weight(n, depth) for n in tensors}
    if how.method == "linear":
        found = merge_tensors(list(full.values()), "linear", parameters={"weight": list(weight.values())})
        return found.contiguous()  # type: ignore[no-any-return]
    if how.method == "slerp":
        return merge_tensors(list(full.values()), "slerp", parameters={"t": how.t}, base_index=0)  # type: ignore[no-any-return]
    moved = {n: t for n, t in full.items() if n != SEED}
    parameters: dict[str, object] = {}
    if how.method in WEIGHED:
        parameters = {"weight": {n: weight[n] for n in moved}, "lambda": how.scale}
    if how.method in OPTIONS["density"]:
        parameters["density"] = how.density
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return merge_tensors(  # type: ignore[no-any-return]
            [base.to(torch.float32), *moved.values()], how.method, ids=[SEED, *moved], base_index=0,
            parameters=parameters,
        )  # fmt: skip


@dataclass(frozen=True)
class SharedTensors:
    """The tensors that are not experts, averaged over all models."""

    models: Mapping[str, Checkpoint]
    base: Checkpoint
    settings: MergeSettings
    joint: JointVocabulary | None = None  # if some models added tokens; `models` and `base` are then trimmed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the written tensors."""
        return self.settings.torch_dtype(self.base.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        shape = self.base.entries[name].shape
        return (self.joint.size, *shape[1:]) if self.joint and name in BY_TOKEN else shape

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor: block by block if the method is elementwise, else whole."""
        for made in self._full(name):
            yield made.to(self.dtype)
        if self.joint and name in BY_TOKEN:
            for row in self.joint.rows(name, self.settings.shared.of(name)):
                yield row.to(self.dtype)

    def whole(self, name: str) -> torch.Tensor:
        """One tensor as it is written, in fp32, flat."""
        return torch.cat([piece.to(torch.float32).flatten() for piece in self.pieces(name)])

    def _full(self, name: str) -> Iterator[torch.Tensor]:
        how, match = self.settings.shared.of(name), LAYER.fullmatch(name)
        depth = int(match[1]) / max(self.base.config["num_hidden_layers"] - 1, 1) if match else 0.0

        def make(tensors: Iterable[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.models, tensors, strict=True))
            return average(named, base, how, name=name, seed=self.settings.seed, depth=depth)

        if how.method not in ELEMENTWISE:
            yield make([m.read(name) for m in self.models.values()], self.base.read(name))
            return
        for base, *blocks in zip(self.base.blocks(name), *(m.blocks(name) for m in self.models.values()), strict=True):
            yield make(blocks, base)


def require_memory(base: Checkpoint, settings: SharedSettings, *, models: int, limit: int) -> None:
    """ResourceError when averaging so many models would take more than `limit` bytes for the largest tensor."""
    counts = {
        name: min(entry.count, BLOCK) if settings.of(name).method in ELEMENTWISE else entry.count
        for name, entry in base.entries.items()
    }
    name = max(counts, key=lambda n: counts[n])
    wanted = 4 * counts[name] * COPIES * (models + 1)
    if wanted > limit:
        method, group = settings.of(name).method, group_of(name)
        other = f", or give the group {group} under merge.shared.groups" if group in GROUPS else ", or merge.shared"
        other += f" a method that goes block by block ({', '.join(ELEMENTWISE)})"
        raise ResourceError(
            f"{name} of {models} models takes about {wanted / 2**30:.2g} GiB to merge by {method}; run.max_memory is "
            f"{limit / 2**30:.2g} GiB. Raise it{'' if method in ELEMENTWISE else other}."
        )
