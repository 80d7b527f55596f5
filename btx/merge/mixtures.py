"""The merge of mixtures: the experts of all models side by side, with what belongs to each; other tensors averaged.

What belongs to an expert is its rows of the router and its entries in tensors that have one for every expert. So N
copies of a mixture give its output where a token visits N times as many experts (`OwnExperts` says why), as long as no
row is added to a model's own.
"""

from __future__ import annotations

from functools import partial

import torch

from btx.checkpoints.validate import DTYPES
from btx.checkpoints.writer import TensorSpec
from btx.merge.averaging import SharedTensors
from btx.merge.expert_rows import expert_rows
from btx.merge.layout import Experts
from btx.merge.router_random import RouterScales, random_rows
from btx.models.family import DOWN, LAYER, Constant, Family
from btx.models.mixture import patterns

RANDOM = ("random", "orthogonal")  # routers that the merge itself makes rows of


def mixture_rows(family: Family, experts: Experts, shared_: SharedTensors) -> list[TensorSpec]:
    """Every tensor of the Mixture of Experts, in the order of the seed's tensors; experts come where its routers do."""
    found: list[TensorSpec] = []
    dtype, models = shared_.dtype, list(shared_.models.values())
    kinds, scales = patterns(family), RouterScales(family, shared_)
    entries_of = {name: of for name, of in family.constants.items() if "E" in of.shape}
    for name, entry in shared_.base.entries.items():
        match = LAYER.fullmatch(name)
        prefix, rest = (name.removesuffix(match[2]), match[2]) if match else ("", name)
        if match and rest == family.router:
            for kind in kinds:
                shape = (experts.hidden, experts.width) if kind == DOWN else (experts.width, experts.hidden)
                found += expert_rows(family, experts, models, prefix, kind, shape, dtype)
            make = partial(_router, name, experts, partial(scales, int(match[1])), shared_)
            found.append(TensorSpec(name, dtype, (experts.count, experts.hidden), make))
        elif rest in entries_of:
            of, stored = entries_of[rest], torch.promote_types(DTYPES[entry.dtype], dtype)  # some keep it in float32
            make = partial(_entries, name, experts, shared_, of, stored)
            found.append(TensorSpec(name, stored, of.sizes(experts.count, experts.hidden), make))
        elif not any(pattern.fullmatch(rest) for pattern in kinds.values()):
            found.append(TensorSpec(name, dtype, shared_.shape(name), partial(shared_.pieces, name)))
    return found


def _side_by_side(name: str, experts: Experts, shared_: SharedTensors, axis: int) -> torch.Tensor:
    """A tensor of every branch's model, in float32, one after another along the axis of experts."""
    whole = [shared_.models[owner].read(name).to(torch.float32) for owner in experts.branches.values()]
    return torch.cat(whole, axis)


def _entries(
    name: str, experts: Experts, shared_: SharedTensors, of: Constant, dtype: torch.dtype
) -> list[torch.Tensor]:
    found = _side_by_side(name, experts, shared_, of.shape.index("E"))
    return [(found / len(experts.branches) if of.shared_out else found).to(dtype)]


def _router(name: str, experts: Experts, scale: partial[torch.Tensor], shared_: SharedTensors) -> list[torch.Tensor]:
    """The models' own rows, one above another, and a random one for each branch added to all of its own."""
    rows_ED = _side_by_side(name, experts, shared_, 0)
    if shared_.settings.router in RANDOM:
        [added_ND] = random_rows(name, len(experts.branches), scale, shared_)
        rows_ED += added_ND.repeat_interleave(experts.each, 0)
    return [rows_ED.to(shared_.dtype)]
