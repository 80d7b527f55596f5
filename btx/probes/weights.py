"""How far weights have moved from the seed's, by group of tensors and layer: cosine, and relative change ‖w − s‖ / ‖s‖.

A mixture's experts are each compared with the seed's feed-forward block, or with the one in its place of the experts of
a seed that is a mixture; routers have no counterpart and are left out. Weights say where a training acted, hidden
states (`drift`) what came of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from btx.models.families import DENSE
from btx.models.family import DOWN, GATE, LAYER, UP, part_rows
from btx.models.flops import experts_in
from btx.models.opened import WEIGHTS, Opened, Stock
from btx.probes.contract import Data, Found, Probe

GROUPS = (
    ("embed", "embeddings"),
    ("lm_head", "head"),
    ("norm", "norms"),
    ("attn", "attention"),
    ("mlp", "feed_forward"),
)


def measure(model: Opened, seed: Opened, _data: Data, _settings: Any) -> Found:
    """By group the cosine and the change over all of its tensors together; a row per tensor, or expert's tensor."""
    assert isinstance(model, Stock)  # as their capabilities say
    assert isinstance(seed, Stock)
    if model.net.config.hidden_size != seed.net.config.hidden_size:
        return Found({}, missing="its width is not the seed's")
    sums: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    before = {(name, number): tensor for name, number, tensor in _tensors(seed.net)}
    own = 1 + max(number for _, number in before)  # experts of the seed
    for name, number, after in _tensors(model.net):
        base = before.get((name, number % own if own and number >= 0 else -1))
        if base is None or base.shape != after.shape:
            continue
        group = next((group for part, group in GROUPS if part in name), "other")
        found = _products(base, after)
        sums[group] = sums.get(group, torch.zeros(4, dtype=torch.float64)) + found
        layer = LAYER.fullmatch(name)
        rows.append({
            "group": group, "tensor": name, "layer": int(layer[1]) if layer else -1, "expert": number, **_told(found),
        })  # fmt: skip
    return Found({group: _told(found) for group, found in sums.items()}, rows)


def _tensors(net: Any) -> Iterator[tuple[str, int, Tensor]]:
    """Names as a dense model has them, the number of an expert (-1 elsewhere), and the weights."""
    stacked = {id(p) for module in experts_in(net) for p in module.parameters()}
    for name, parameter in _named(net):
        if id(parameter) not in stacked:
            yield name, -1, parameter.detach()
            continue
        layer = LAYER.fullmatch(name)
        prefix = name.removesuffix(layer[2]) if layer else ""
        for number, expert in enumerate(parameter.detach()):
            if name.endswith("gate_up_proj"):
                for kind, half in zip((GATE, UP), expert.chunk(2), strict=True):
                    yield f"{prefix}{kind}", number, half
            elif name.endswith("down_proj"):
                yield f"{prefix}{DOWN}", number, expert


def _named(net: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters by name, joined ones of a dense model in their parts."""
    family = DENSE.get(net.config.model_type)
    for name, parameter in net.named_parameters():
        layer = LAYER.fullmatch(name)
        parts = family.parts.get(layer[2]) if family and layer else None
        if layer is None or parts is None:
            yield name, parameter
            continue
        rows = part_rows(parts, len(parameter), net.config.to_dict())
        for part, tensor in zip(parts, torch.split(parameter, rows), strict=True):
            yield name.removesuffix(layer[2]) + part, tensor


def _products(base: Tensor, after: Tensor) -> Tensor:
    """s · w, s · s, w · w and |w − s|², in float64."""
    s, w = base.detach().flatten().double().cpu(), after.flatten().double().cpu()
    return torch.stack([s @ w, s @ s, w @ w, (w - s) @ (w - s)])


def _told(found: Tensor) -> dict[str, float]:
    cross, before, after, change = map(float, found)
    return {"cosine": cross / max((before * after) ** 0.5, 1e-30), "change": (change / max(before, 1e-30)) ** 0.5}


PROBE = Probe(measure, needs=frozenset({WEIGHTS}), reference=True)
