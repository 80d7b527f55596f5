"""How the router classes of transformers state a routing: what they put out, and what their blocks take back.

Every dialect reads an output as (logits, weights, indices) of axes T tokens, E experts, K experts per token, and writes
such a triple as that class's output. `softmax(logits)` are the probabilities by which the class chooses and weighs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BIAS = "balance_bias"  # name of the buffer of `btx.moe.bias`, which no checkpoint has
GATING = "TopKGating"  # ends the name of JetMoE's router class
Triple = tuple[Tensor, Tensor, Tensor]


class Plain:
    """(logits, weights, indices), weights the softmax over the chosen logits: most classes."""

    def __init__(self, router: nn.Module, block: nn.Module | None = None) -> None:
        self.router: Any = router
        self.block: Any = block  # that the router is in

    @property
    def top_k(self) -> int:
        """K, the number of experts that the stock class chooses."""
        return int(self.router.top_k)

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return int(self.router.num_experts)

    @property
    def holds_bias(self) -> bool:
        """Whether the stock class adds a bias of its own to the scores by which it chooses (ERNIE 4.5, LFM2)."""
        return hasattr(self.router, "moe_statics")

    def give_bias(self) -> None:
        """Give the router a bias (E,) of zeros that acts in training, unless its class has one."""
        if not self.holds_bias and not hasattr(self.router, BIAS):
            weight = matrix_of(self.router).weight
            self.router.register_buffer(BIAS, torch.zeros(self.experts, dtype=torch.float32, device=weight.device))

    @property
    def bias_E(self) -> Tensor:
        """The bias on the choice, a view that can be changed in place; zeros (E,) where there is none."""
        if self.holds_bias:
            return self.router.moe_statics.e_score_correction_bias.data[0]  # type: ignore[no-any-return]
        found = getattr(self.router, BIAS, None)
        return torch.zeros(self.experts) if found is None else found

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return self.holds_bias or hasattr(self.router, BIAS)

    def bias_on(self, logits_TE: Tensor) -> Tensor | None:
        """The bias as it is added to the probabilities by which experts are chosen, if there is any."""
        return self.bias_E.to(logits_TE.device) if self.has_bias else None

    def read(self, output: Any, k: int) -> Triple:
        """Logits (T, E), weights and indices (T, K) of a stock output."""
        logits_TE, weight_TK, index_TK = output
        return logits_TE, weight_TK, index_TK

    def write(self, output: Any, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Any:
        """The stock output with other weights and indices in it, in its own dtype."""
        return output[0], weight_TK.to(output[1].dtype), index_TK

    def listen(self) -> None:
        """Put on the router what `read` needs; called once before it."""

    def remove(self) -> None:
        """Remove what `listen` put on the router."""


class Sorted(Plain):
    """JetMoE's: the token-choices sorted by expert, their tokens, gates and the experts' counts, then the logits."""

    def read(self, output: Any, k: int) -> Triple:
        """As in `Plain`."""
        order, _tokens, gates, sizes, logits_TE = output
        experts = torch.repeat_interleave(torch.arange(len(sizes), device=order.device),
                                          torch.tensor(sizes, device=order.device))  # fmt: skip
        index = torch.empty_like(order).index_copy(0, order, experts)
        weight = torch.zeros_like(gates).index_copy(0, order, gates)
        return logits_TE, weight.view(-1, k), index.view(-1, k)

    def write(self, output: Any, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Any:
        """As in `Plain`."""
        flat = index_TK.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=logits_TE.shape[-1]).tolist()
        gates = weight_TK.to(output[2].dtype).flatten()[order]
        return order, order // index_TK.shape[1], gates, sizes, logits_TE


class Unsummed(Plain):
    """Of Qwen's and OLMo's with norm_topk_prob: false: weights are the chosen experts' probabilities among all."""

    def read(self, output: Any, k: int) -> Triple:
        """As in `Plain`."""
        logits_TE, weight_TK, index_TK = super().read(output, k)
        return logits_TE, weight_TK / weight_TK.sum(-1, keepdim=True), index_TK

    def write(self, output: Any, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Any:
        """As in `Plain`."""
        chosen_TK = logits_TE.float().softmax(-1).gather(-1, index_TK)
        return super().write(output, logits_TE, weight_TK * chosen_TK.sum(-1, keepdim=True), index_TK)


class Sigmoid(Plain):
    """LFM2's, and Cohere 2's if it says so: weights are sigmoids of the logits over their sum, times a factor.

    They are the softmax of log-sigmoids (but for the 1e-6 that LFM2 adds to the sum).
    """

    @property
    def factor(self) -> float:
        """What the stock class multiplies the weights by."""
        return float(getattr(self.router, "routed_scaling_factor", 1.0))

    @property
    def holds_bias(self) -> bool:
        """As in `Plain`; LFM2 has it in the block, where the config asks for it."""
        return hasattr(self.block, "expert_bias")

    @property
    def bias_E(self) -> Tensor:
        """As in `Plain`."""
        return self.block.expert_bias if self.holds_bias else super().bias_E

    def bias_on(self, logits_TE: Tensor) -> Tensor | None:
        """As in `Plain`; the stock class adds its own to sigmoids, so to probabilities it is divided by their sum."""
        found = super().bias_on(logits_TE)
        return found / logits_TE.exp().sum(-1, keepdim=True) if found is not None and self.holds_bias else found

    def read(self, output: Any, k: int) -> Triple:
        """As in `Plain`."""
        logits_TE, weight_TK, index_TK = super().read(output, k)
        return nn.functional.logsigmoid(logits_TE.float()), weight_TK / self.factor, index_TK

    def write(self, output: Any, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Any:
        """As in `Plain`."""
        return super().write(output, logits_TE, weight_TK * self.factor, index_TK)


class Scaled(Plain):
    """Gemma 4's: probabilities in the logits' place, and weights times a learned scale of each expert.

    Logits are taken from the projection inside, since those of vanishing probabilities are lost.
    """

    def __init__(self, router: nn.Module, block: nn.Module | None = None) -> None:
        super().__init__(router, block)
        self._logits_TE: Tensor | None = None
        self._handle: Any = None

    def listen(self) -> None:
        """As in `Plain`."""
        self._handle = self.router.proj.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: Any, logits_TE: Tensor) -> None:
        self._logits_TE = logits_TE

    @property
    def top_k(self) -> int:
        """As in `Plain`."""
        return int(self.router.config.top_k_experts)

    @property
    def experts(self) -> int:
        """As in `Plain`."""
        return int(self.router.proj.out_features)

    def read(self, output: Any, k: int) -> Triple:
        """As in `Plain`."""
        probability_TE, _scaled_TK, index_TK = super().read(output, k)
        logits_TE, self._logits_TE = self._logits_TE, None
        assert logits_TE is not None
        chosen_TK = probability_TE.gather(-1, index_TK)
        return logits_TE, chosen_TK / chosen_TK.sum(-1, keepdim=True), index_TK

    def write(self, output: Any, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Any:
        """As in `Plain`."""
        return super().write(output, logits_TE, weight_TK * self.router.per_expert_scale[index_TK], index_TK)

    def remove(self) -> None:
        """As in `Plain`."""
        self._handle.remove()


def dialect_of(router: nn.Module, block: nn.Module | None = None) -> Plain:
    """The dialect of a stock router, which is in a block."""
    if type(router).__name__.endswith(GATING):
        return Sorted(router, block)
    if hasattr(router, "per_expert_scale"):
        return Scaled(router, block)
    scores = getattr(router, "expert_selection_fn", "sigmoid" if hasattr(router, "routed_scaling_factor") else "")
    if scores == "sigmoid":
        return Sigmoid(router, block)
    summed = scores == "softmax" or getattr(router, "norm_topk_prob", True)  # Cohere 2's, over the chosen alone
    return Plain(router, block) if summed else Unsummed(router, block)


def matrix_of(router: nn.Module) -> Any:
    """The module inside a router, or the router itself, whose `weight` (E, D) makes logits of its input."""
    return next(m for m in router.modules() if (w := m._parameters.get("weight")) is not None and w.ndim == 2)
