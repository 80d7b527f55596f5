"""Initialises routers from data, in closed form: rows that send each domain to its expert, without any training.

All run the merged model, for each router's real inputs (after the norm, with the averaged shared tensors):

- `activations`: ridge regression from a token's router input x to its domain, all domains weighted equally: targets are
  1 for its own domain and 0 for the others, less their mean, W = (Σ_d E_d[x xᵀ] + λ I)⁻¹ (E_d[x] − mean over d).
- `embeddings`: each domain's mean input embedding, less the mean over the domains.
- `arrow`: each expert's own direction (`btx.merge.arrow`), with the sign that makes its mean logit on its domain's
  inputs positive: a router of these classes is linear, where the paper takes the product's size.

One factor then scales a layer's rows: so that their softmax has the requested mean entropy over the tokens, or so that
it gives the tokens' own domains the greatest likelihood (a temperature, as in arXiv 1706.04599). An expert
without data of its own, such as the seed's, gets the row of a domain with average inputs: zeros. Experts of one domain
get its row with a little noise each: of equal rows top-k would only ever select the first.

Axes: T tokens, E experts, D hidden width, N domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from btx.errors import DivergedError
from btx.moe.dialects import matrix_of
from btx.moe.hooks import find_routers
from btx.moe.routing import mean_entropy

RIDGE = 1e-3  # λ as a share of the Gram matrix's mean diagonal entry
APART = 0.1  # RMS of the noise between experts of one domain, as a share of the rows' RMS
KEPT = 512  # tokens per domain and layer on which the entropy or the likelihood is measured
FACTORS: list[float] = [2.0 ** (step / 4) for step in range(-24, 33)]  # over the logits' RMS: the likeliest is taken


@dataclass
class Seen:
    """Inputs of one router on one domain: sums over tokens in float64, and a sample of the inputs themselves."""

    gram_DD: Tensor | float = 0.0
    sum_D: Tensor | float = 0.0
    tokens: int = 0
    some_TD: list[Tensor] = field(default_factory=list)

    def add(self, x_TD: Tensor) -> None:
        """Add router inputs."""
        room = KEPT - sum(map(len, self.some_TD))
        if room > 0:
            self.some_TD.append(x_TD[:room].float())
        x_TD = x_TD.double()
        self.gram_DD = self.gram_DD + x_TD.T @ x_TD
        self.sum_D = self.sum_D + x_TD.sum(0)
        self.tokens += len(x_TD)


@torch.inference_mode()
def observe(model: Any, batches: Mapping[str, Iterable[Tensor]]) -> dict[str, list[Seen]]:
    """Inputs of every router, first layer first, on each domain's batches of token ids (B, S)."""
    routers = list(find_routers(model).values())
    found = {name: [Seen() for _ in routers] for name in batches}
    current: list[Seen] = []
    handles = [
        matrix_of(router).register_forward_pre_hook(
            lambda _module, args, layer=layer: current[layer].add(args[0].flatten(0, -2).cpu())
        )
        for layer, router in enumerate(routers)
    ]
    try:
        for name, some in batches.items():
            current = found[name]
            for ids in some:
                model.base_model(input_ids=ids.to(model.device), use_cache=False)  # logits are not needed
    finally:
        for handle in handles:
            handle.remove()
    return found


def from_activations(seen: Sequence[Seen]) -> Tensor:
    """Rows (N, D) in float32 by ridge regression to the domains."""
    gram = torch.stack([torch.as_tensor(one.gram_DD) / one.tokens for one in seen]).sum(0)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    rows: Tensor = torch.linalg.solve(gram + ridge, _centred(seen).T).T.float()
    return rows


def _centred(seen: Sequence[Seen]) -> Tensor:
    means = torch.stack([torch.as_tensor(one.sum_D) / one.tokens for one in seen])
    return means - means.mean(0)


@torch.inference_mode()
def from_embeddings(model: Any, batches: Mapping[str, Iterable[Tensor]]) -> Tensor:
    """Rows (N, D) in float32, the same for every layer: mean input embeddings, centred."""
    table = model.get_input_embeddings().weight
    means = [
        torch.cat([table[ids.to(table.device).flatten()] for ids in some]).double().mean(0) for some in batches.values()
    ]
    rows = torch.stack(means).cpu()
    return (rows - rows.mean(0)).float()


def scaled(rows_ED: Tensor, seen: Iterable[Seen], entropy: float) -> Tensor:
    """Rows scaled by one factor so that their softmax has the mean entropy `entropy` · log E on the tokens seen.

    Bisection: the entropy of softmax(s z) never rises with s. Entropy 1 gives zeros. Rows that give every expert the
    same logits cannot be scaled and stay.
    """
    logits_TE = torch.cat([x for one in seen for x in one.some_TD]) @ rows_ED.T
    spread = float((logits_TE - logits_TE.mean(-1, keepdim=True)).square().mean().sqrt())
    if entropy >= 1.0 or spread == 0.0:
        return rows_ED * 0.0 if entropy >= 1.0 else rows_ED
    wanted, low, high = entropy * math.log(rows_ED.shape[0]), 0.0, 1.0 / spread
    while mean_entropy(logits_TE * high) > wanted and high < 1e6 / spread:
        low, high = high, 2.0 * high
    for _ in range(24):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean_entropy(logits_TE * middle) > wanted else (low, middle)
    return rows_ED * (0.5 * (low + high))


def calibrated(rows_ED: Tensor, seen: Sequence[Seen], own: Sequence[Sequence[int]]) -> Tensor:
    """Rows scaled by the factor that gives tokens' own domains the greatest likelihood; domains are weighted alike.

    `own` has the experts of each domain seen, if any; their probabilities add up. Rows that give every expert the same
    logits stay.
    """
    logits = [torch.cat(one.some_TD) @ rows_ED.T for one in seen]
    spread = float(torch.cat([z - z.mean(-1, keepdim=True) for z in logits]).square().mean().sqrt())
    if spread == 0.0:
        return rows_ED

    def surprise(factor: float) -> float:
        log_p = [(z * (factor / spread)).log_softmax(-1) for z in logits]
        return sum(float(-p[:, list(mine)].logsumexp(-1).mean()) for p, mine in zip(log_p, own, strict=True) if mine)

    scale = min(FACTORS, key=surprise) / spread
    return rows_ED * scale


def apart(owners: Sequence[str], rows_ND: Tensor, layer: int) -> Tensor:
    """Small random rows (E, D) for experts that share their owner, zeros for the rest."""
    made = torch.randn(len(owners), rows_ND.shape[1], generator=torch.Generator().manual_seed(layer))
    shared = torch.tensor([owners.count(owner) > 1 for owner in owners])
    return made * shared[:, None] * (APART * rows_ND.square().mean().sqrt())


def _oriented(rows: Sequence[Tensor], seen: Mapping[str, Seen], owners: Sequence[str]) -> Tensor:
    """Rows (E, D), each with the sign that makes its logits positive on average on its owner's tokens."""
    means = {name: torch.as_tensor(one.sum_D).float() for name, one in seen.items()}
    against = [owner in means and float(row @ means[owner]) < 0 for row, owner in zip(rows, owners, strict=True)]
    return torch.stack([-row if turned else row for row, turned in zip(rows, against, strict=True)])


def fresh_routers(
    model: Any, batches: Mapping[str, Sequence[Tensor]], owners: Sequence[str], *, how: str, entropy: float | None,
    together: bool = False, directions: Sequence[Sequence[Tensor]] = (),
) -> list[Tensor]:  # fmt: skip
    """Router weights (E, D) in float32 for every layer; `owners` names each expert's domain, `batches` those with data.

    `entropy` is the mean one as a share of log E; None: the scale of the greatest likelihood. `together`: experts of
    one owner get identical rows, as chunks of one model must. `directions` are each expert's by layer, for arrow.
    ValueError when fewer than two domains have data, DivergedError for a model whose hidden states are not finite.
    """
    if len(batches) < 2:
        raise ValueError(f"routers from {how} need data of two domains or more, not {len(batches)}")
    seen, names = observe(model, batches), list(batches)
    for layer, inputs in enumerate(zip(*seen.values(), strict=True)):
        size = sum(float(torch.as_tensor(one.gram_DD).trace()) for one in inputs)
        if not 0.0 < size < math.inf:  # RMS norms turn what overflows in their squares into zeros
            raise DivergedError(
                f"merge.router: {how} finds inputs of router {layer} of the merged model that are all zero, NaN or "
                "infinite, so a training before the merge diverged. Lower its learning rate."
            )
    embedded = from_embeddings(model, batches) if how == "embeddings" else None
    own = [[e for e, owner in enumerate(owners) if owner == name] for name in names]
    routers = []
    for layer in range(len(next(iter(seen.values())))):
        here = [seen[name][layer] for name in names]
        if how == "arrow":
            rows_ED = _oriented([one[layer] for one in directions], dict(zip(names, here, strict=True)), owners)
        else:
            rows_ND = from_activations(here) if embedded is None else embedded
            nothing = torch.zeros_like(rows_ND[0])
            rows_ED = torch.stack([rows_ND[names.index(o)] if o in names else nothing for o in owners])
            if not together:
                rows_ED = rows_ED + apart(owners, rows_ND, layer)
        routers.append(calibrated(rows_ED, here, own) if entropy is None else scaled(rows_ED, here, entropy))
    return routers
