"""Cases for tests of routing, balance losses and router initialisers: logits and recorded layers."""

import torch
from torch import Tensor

from btx.moe.routing import Routing, route


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2.0 * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def rule_k(rule: str, experts: int) -> int:
    return {"top_k": min(2, experts), "soft": experts}.get(rule, 1)


def routing(logits_TE: Tensor, rule: str = "top_k", k: int = 2, **options: object) -> Routing:
    return Routing(logits_TE, *route(logits_TE, rule, k, **options))  # type: ignore[arg-type]


def spread(tokens: int, experts: int, over: int, k: int) -> Routing:
    """Routing with all probability on the first `over` experts, the k choices assigned round-robin."""
    logits_TE = torch.full((tokens, experts), -1e4, dtype=torch.float64)
    logits_TE[:, :over] = 0.0
    index_TK = (torch.arange(tokens)[:, None] * k + torch.arange(k)) % over
    return Routing(logits_TE, index_TK, torch.full((tokens, k), 1.0 / k, dtype=torch.float64))
