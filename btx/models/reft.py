"""LoReFT (arXiv 2404.03592): a frozen model whose residual stream is edited in a low-rank subspace.

After chosen layers h becomes h + Rᵀ (W h + b − R h), R (r, D) with orthonormal rows: what h is in the subspace of R is
replaced by a linear function of h. Axes: B sequences, S tokens, D hidden width, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from btx.models.opened import HIDDEN_STATES, Stock

PARTS = ("R", "W", "b")
Parts = tuple[Tensor, Tensor, Tensor]  # (r, D), (r, D), (r,)


def edited(h_BSD: Tensor, tensors: Parts, where_BS: Tensor | None) -> Tensor:
    """h + Rᵀ (W h + b − R h), computed in float32, at the positions `where_BS`; everywhere without them."""
    x_BSD, (R_rD, W_rD, b_r) = h_BSD.float(), tensors
    change_BSD = (x_BSD @ (W_rD - R_rD).T + b_r) @ R_rD
    if where_BS is not None:
        change_BSD = change_BSD * where_BS.to(change_BSD.device)[..., None]
    return h_BSD + change_BSD.to(h_BSD.dtype)


class Intervention(nn.Module):
    """The edit after one layer, to be trained: it begins as the identity, W = R and b = 0.

    R is the orthonormal factor of a free matrix, by QR with a positive diagonal, so that weight decay, which scales the
    matrix, leaves R alone. (torch's own parametrisation of such a shape loses rows to weight decay: it truncates a
    diagonal of ones to integers.)
    """

    in_float32 = True  # R stays orthonormal in float32 alone

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.subspace = nn.Parameter(nn.init.orthogonal_(torch.empty(width, rank)))
        self.source = nn.Linear(width, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.tensors[0])
            self.source.bias.zero_()

    @property
    def tensors(self) -> Parts:
        """R (r, D), W (r, D) and b (r,)."""
        found_Dr, upper_rr = torch.linalg.qr(self.subspace)
        return (found_Dr * upper_rr.diagonal().sign()).T, self.source.weight, self.source.bias


class Edits:
    """The edits of a model: forward hooks of layers, and where they act now.

    `everywhere` acts at every position; else at `where` (B, S), and nowhere while that is None.
    """

    def __init__(self, net: Any, tensors: Mapping[int, Any], *, everywhere: bool) -> None:
        """`tensors` has by layer an `Intervention`, or R, W and b themselves."""
        self.everywhere = everywhere
        self.where: Tensor | None = None
        layers = net.base_model.layers
        self.handles = [layers[n].register_forward_hook(self._hook(one)) for n, one in tensors.items()]

    def _hook(self, one: Any) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not self.everywhere and self.where is None:
                return output
            found = one.tensors if isinstance(one, Intervention) else one
            h_BSD = output[0] if isinstance(output, tuple) else output
            h_BSD = edited(h_BSD, found, None if self.everywhere else self.where)
            return (h_BSD, *output[1:]) if isinstance(output, tuple) else h_BSD

        return hook

    @contextmanager
    def at(self, where_BS: Tensor | None) -> Iterator[None]:
        """Act at these positions inside the context."""
        self.where = where_BS
        try:
            yield
        finally:
            self.where = None


def chosen(places_BS2: Tensor, *, prefix: int, suffix: int) -> Tensor:
    """Which positions (B, S) are edited: the first `prefix` and the last `suffix` of each prompt.

    `places_BS2` are the tokens of the prompt before and after each position, -1 outside of prompts.
    """
    before_BS, after_BS = places_BS2.unbind(-1)
    return (before_BS >= 0) & ((before_BS < prefix) | (after_BS < suffix))


class Intervened(Stock):
    """A model with trained edits.

    With `prefix` and `suffix` they act on prompts alone: without one, as in held-out text, the model is the seed.
    """

    def __init__(self, net: Any, tensors: Mapping[int, Parts], *, prefix: int | None, suffix: int | None) -> None:
        """Without `prefix` and `suffix` the edits act everywhere."""
        super().__init__(net)
        self.capabilities = frozenset({HIDDEN_STATES})
        self.prefix, self.suffix = prefix, suffix
        placed = {n: (R.to(net.device), W.to(net.device), b.to(net.device)) for n, (R, W, b) in tensors.items()}
        self.edits = Edits(net, placed, everywhere=prefix is None)

    def _prompt(self, ids_BS: Tensor, prompt: int) -> Tensor | None:
        """Which positions are edited where the first `prompt` tokens are the prompt."""
        if self.prefix is None or self.suffix is None or not prompt:
            return None
        at = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        places_S2 = torch.stack([at, prompt - 1 - at], dim=-1).masked_fill((at >= prompt)[:, None], -1)
        return chosen(places_S2.expand(len(ids_BS), -1, -1), prefix=self.prefix, suffix=self.suffix)

    def log_probs(self, ids_BS: Tensor, prompt: int = 0) -> Tensor:
        """Log-softmax of the logits, in float32, with edits of the prompt."""
        with self.edits.at(self._prompt(ids_BS, prompt)):
            return super().log_probs(ids_BS)

    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, Any]:
        """All ids are the prompt; later ids see it as it was edited, through the cache."""
        with self.edits.at(self._prompt(ids_BS, ids_BS.shape[1])):
            return super().prefill(ids_BS)
