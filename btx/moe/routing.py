"""Routing rules, router initialisation and routing statistics.

Pure functions of tensors. The stock MoE classes of transformers route by top-k alone; this file holds the
other rules of the BTX paper (arXiv 2403.07816, section 3.3), which `btx.moe.hooks` installs on such a
model, routers initialised at a chosen entropy, and statistics of load and entropy. The balance losses are
in `btx.moe.balance`.

Axes: T tokens, E experts, K experts per token, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rule = Literal["top_k", "switch", "soft", "sample_top1"]
RULES: tuple[str, ...] = get_args(Rule)

# Sample Top-1 anneals its Gumbel-softmax as tau = max(0.5, exp(-r t)); both constants are the paper's.
TEMPERATURE_RATE = 1e-4
TEMPERATURE_FLOOR = 0.5


class Routing(NamedTuple):
    """The routing of one MoE layer in one forward pass: raw logits, selected experts, their routing weights."""

    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor


# --- rules -------------------------------------------------------------------------------------------------


def experts_per_token(rule: str, *, k: int, experts: int) -> int:
    """K, the number of experts per token under `rule`; the checkpoint's `num_experts_per_tok` must equal it.

    ValueError for an unknown rule, and for a `k` that the rule contradicts: `switch` and `sample_top1`
    choose one expert, `soft` chooses all, `top_k` any number from 1 to `experts`.
    """
    if rule not in RULES:
        raise ValueError(f"unknown routing rule {rule!r}; known: {', '.join(RULES)}")
    low, high = {"top_k": (1, experts), "soft": (experts, experts)}.get(rule, (1, 1))
    if not low <= k <= high:
        right = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"rule {rule!r} over {experts} experts takes k = {right}, not {k}")
    return k


def temperature(step: int) -> float:
    """Gumbel-softmax temperature max(0.5, exp(-1e-4 · step)) of Sample Top-1; the first step is 0."""
    if step < 0:
        raise ValueError(f"step {step} is negative; the first step is 0")
    return max(TEMPERATURE_FLOOR, math.exp(-TEMPERATURE_RATE * step))


def route(
    logits_TE: Tensor,
    rule: str,
    k: int,
    *,
    step: int = 0,
    generator: torch.Generator | None = None,
    exponential_TE: Tensor | None = None,
    training: bool = False,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts by `rule`: (index_TK, weight_TK), differentiable in the logits through the weights.

    - `top_k`: softmax over the k largest logits, largest first; the same as softmax, top-k, renormalise, and
      computed that way, bit for bit like the stock routers. For k = 1 the weight is a constant 1, and only a
      balance loss trains the router.
    - `switch`: top-1 (Fedus et al., 2101.03961). They multiply by p, the chosen expert's probability. The
      stock classes renormalise, so their top-1 weight is exactly 1; ours is p / p.detach(): 1 going forward,
      d log p going back. So the trained model is the exported one, and N copies of a seed stay the seed.
    - `soft`: every expert in order 0..E-1, weighted by the full softmax.
    - `sample_top1` (the paper): in training, a Gumbel-softmax sample at `temperature(step)` of which only
      the largest entry is kept, its soft value being the weight; otherwise the arg max with weight 1, which
      is stock top-1.

    `bias_E` is added to the probabilities by which `top_k` and `switch` choose, and to no weight (`btx.moe.bias`).

    Weights are float32 (float64 for float64 logits). Noise is `exponential_TE`, draws from Exp(1), or else comes
    from `generator`, by default torch's global state. Under activation checkpointing, pass the noise or use the
    global state: the recompute restores no other generator.
    """
    experts_per_token(rule, k=k, experts=logits_TE.shape[-1])
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if rule == "soft":
        return _soft(logits_TE)
    if rule == "switch":
        return _switch(logits_TE, bias_E)
    if rule == "sample_top1" and training:
        if exponential_TE is None:
            exponential_TE = torch.empty_like(logits_TE, requires_grad=False).exponential_(generator=generator)
        return _gumbel_top1(logits_TE, temperature(step), exponential_TE)
    return _top_k(logits_TE, k, bias_E)


def _chosen(logits_TE: Tensor, k: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k largest probabilities, or those of the k largest sums of probability and bias; and whose they are."""
    prob_TE = logits_TE.softmax(-1)
    if bias_E is None:
        return prob_TE.topk(k, -1)
    index_TK = (prob_TE.detach() + bias_E).topk(k, -1).indices
    return prob_TE.gather(-1, index_TK), index_TK


def _top_k(logits_TE: Tensor, k: int, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    prob_TK, index_TK = _chosen(logits_TE, k, bias_E)
    return index_TK, prob_TK / prob_TK.sum(-1, keepdim=True)


def _switch(logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    prob_T1, index_T1 = _chosen(logits_TE, 1, bias_E)
    return index_T1, prob_T1 / prob_T1.detach()


def _soft(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    index_TE = torch.arange(logits_TE.shape[-1], device=logits_TE.device).expand(logits_TE.shape)
    return index_TE.contiguous(), logits_TE.softmax(-1)


def _gumbel_top1(logits_TE: Tensor, tau: float, exponential_TE: Tensor) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(logits_TE.dtype).tiny  # a draw may round to 0, whose Gumbel value would be infinite
    gumbel_TE = -exponential_TE.to(logits_TE.dtype).clamp_min(tiny).log()
    weight_T1, index_T1 = ((logits_TE + gumbel_TE) / tau).softmax(-1).topk(1, -1)
    return index_T1, weight_T1


# --- router initialisation ---------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def logit_std(entropy: float, *, experts: int) -> float:
    """Standard deviation of independent normal logits whose softmax has mean entropy `entropy` · log E.

    `entropy` is in (0, 1], a share of the maximum; 1 gives 0. Solved by bisection, which is exact on a given
    sample since the entropy of softmax(s z) never rises with s; the sample, about a million fixed normal
    draws, is off by less than 0.003.
    """
    if not 0.0 < entropy <= 1.0:
        raise ValueError(f"entropy {entropy} is not a share of log E in (0, 1]; 1 is a router of zeros")
    if experts < 2:
        raise ValueError(f"{experts} expert leaves nothing to route; at least 2 are needed")
    if entropy == 1.0:
        return 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum's last bits depend on how many share it, and routers must not
    try:
        return _solved(entropy * math.log(experts), experts)
    finally:
        torch.set_num_threads(threads)


def _solved(entropy: float, experts: int) -> float:
    """`logit_std` for an entropy in nats."""
    rows = min(65536, max(4096, 2**20 // experts))
    sample = torch.randn(rows, experts, generator=torch.Generator().manual_seed(2403_07816))
    low, high = 0.0, 1.0
    while mean_entropy(sample * high) > entropy:
        low, high = high, 2.0 * high
    for _ in range(24):  # to 1e-7 of the bracket, past what float32 logits can tell apart
        middle = 0.5 * (low + high)
        above = mean_entropy(sample * middle) > entropy
        low, high = (middle, high) if above else (low, middle)
    return 0.5 * (low + high)


def init_router(
    norm_weight_D: Tensor, *, experts: int, entropy: float, generator: torch.Generator, orthogonal: bool = False
) -> Tensor:
    """Router weight_ED, float32, of mean softmax entropy `entropy` · log E over tokens; 1 gives zeros.

    `norm_weight_D` is the root mean square of each component of the router's input: the weight of the RMS
    norm before it, when the normalised input is isotropic; measure it where the router sees the bare
    residual (FlexOlmo). An input x then has logits of variance Σ_d (W_ed w_d)²: rows are drawn normal and
    scaled so that this is `logit_std`² exactly, whatever the width. N(0, 1) rows instead, at width 4096,
    have entropy 0.02: one expert takes 99 %. `orthogonal` makes the experts' logits uncorrelated: rows W_ed w_d are
    orthogonal, if there are no more of them than components.
    """
    scale_D = norm_weight_D.detach().to(device=generator.device, dtype=torch.float32)
    if scale_D.ndim != 1 or not bool(scale_D.isfinite().all()) or not bool(scale_D.any()):
        raise ValueError(
            f"norm weight of shape {tuple(scale_D.shape)} must be a finite vector over D, and not all zero"
        )
    std = logit_std(entropy, experts=experts)
    normal_ED = torch.randn(experts, len(scale_D), generator=generator, device=generator.device)
    if orthogonal and experts <= int(scale_D.count_nonzero()):
        used = scale_D != 0
        basis = torch.linalg.qr((normal_ED * scale_D)[:, used].T).Q.T
        normal_ED[:, used] = basis / scale_D[used]
    weight_ED: Tensor = normal_ED * (std / (normal_ED * scale_D).norm(dim=-1, keepdim=True))
    return weight_ED


# --- statistics --------------------------------------------------------------------------------------------


class LayerStatistics(NamedTuple):
    """Routing statistics of one MoE layer: load per expert, which sums to 1, entropies, and dead experts."""

    load: list[float]  # share of the token-choices (T · K of them) that went to each expert
    entropy: float  # mean over tokens of the full softmax's entropy, in nats
    entropy_share: float  # the same as a share of log E
    dead: list[int]  # experts whose load is below the threshold


def statistics(layers: Sequence[Routing], *, dead_below: float | None = None) -> list[LayerStatistics]:
    """Load, entropy and dead experts of every layer, as plain Python numbers.

    An expert is dead when its load is below `dead_below`, a share of all token-choices; by default a tenth
    of 1/E.
    """
    totals = RoutingTotals()
    totals.add(layers)
    return totals.statistics(dead_below=dead_below)


class RoutingTotals:
    """Sums over the tokens of several forward passes, for statistics over all of them."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor, int]] = []

    def add(self, layers: Sequence[Routing]) -> None:
        """Count the tokens of one more forward pass; every pass has the same layers."""
        found = [_totals(layer) for layer in layers]
        if self._layers:
            assert len(found) == len(self._layers)
            found = [
                (c + choices_E, e + entropy, n + tokens)
                for (c, e, n), (choices_E, entropy, tokens) in zip(self._layers, found, strict=True)
            ]
        self._layers = found

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return self._layers[0][2] if self._layers else 0

    def statistics(self, *, dead_below: float | None = None) -> list[LayerStatistics]:
        """As the function of that name, over all tokens counted."""
        return [_layer_statistics(*totals, dead_below) for totals in self._layers]


def _totals(layer: Routing) -> tuple[Tensor, Tensor, int]:
    """A layer's choices of each expert (E,), its summed entropy, and how many tokens it saw."""
    experts = layer.logits_TE.shape[-1]
    choices_E = _counts(layer.index_TK, experts)
    return choices_E, _entropy_T(layer.logits_TE).double().sum(), len(layer.logits_TE)


def _layer_statistics(choices_E: Tensor, entropy: Tensor, tokens: int, dead_below: float | None) -> LayerStatistics:
    experts = len(choices_E)
    load: list[float] = (choices_E / choices_E.sum()).tolist()
    threshold = 0.1 / experts if dead_below is None else dead_below
    mean = float(entropy) / tokens
    return LayerStatistics(
        load=load,
        entropy=mean,
        entropy_share=mean / math.log(experts) if experts > 1 else 1.0,
        dead=[expert for expert, share in enumerate(load) if share < threshold],
    )


def _counts(index_TK: Tensor, experts: int) -> Tensor:
    """How often each expert was selected (E,); unlike bincount, without synchronising with the device."""
    index = index_TK.flatten()
    ones = torch.ones(len(index), dtype=torch.float64, device=index.device)
    return torch.zeros(experts, dtype=torch.float64, device=index.device).index_add_(0, index, ones)


def mean_entropy(logits_TE: Tensor) -> float:
    """Mean over tokens of the softmax's entropy, in nats."""
    return float(_entropy_T(logits_TE).mean())


def _entropy_T(logits_TE: Tensor) -> Tensor:
    entropy_T: Tensor = torch.special.entr(logits_TE.detach().float().softmax(-1)).sum(-1)
    return entropy_T
