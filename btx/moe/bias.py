"""Balance without a loss: a bias on every expert's probability in the choice alone, moved against its load.

DeepSeek-V3's (arXiv 2412.19437, section 2.1.2; 2408.15664): a token goes to the experts of largest p_i + b_i, weighted
by their p_i alone, and after each step b_i += u · sign(1/E - load_i), u = 0.001 in theirs. Here p is the softmax of the
router's logits (for sigmoid routers of their log-sigmoids, so sigmoids over their sum), load_i the share of the step's
T · K token-choices on all processes.

Where the target class has such a bias (ERNIE 4.5; LFM2, on sigmoids, if its seed has one) it is the class's own, and
exported. Elsewhere it acts in training only, and is off for the last tenth of the steps, so that the model that is
exported is the one that was trained last.

Axes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from btx.moe.hooks import Routed
from btx.moe.routing import LayerStatistics

OFF = 0.1  # the share of the steps, the last ones, that do without


class LoadBias:
    """The biases of a model's routers in a training of `steps` steps."""

    def __init__(self, routed: Routed, *, rate: float, steps: int) -> None:
        self.dialects, self.rate, self.until = routed.dialects, rate, math.ceil(steps * (1 - OFF))
        for dialect in self.dialects:
            dialect.give_bias()

    def begin(self, step: int) -> None:
        """Called before each step, the first is 0: switches off what no class holds, once its time is over."""
        for dialect in self.dialects:
            if step >= self.until and not dialect.holds_bias:
                dialect.bias_E.zero_()

    def update(self, step: int, layers: Sequence[LayerStatistics]) -> None:
        """Move the biases by the loads of the step that is over; a layer for each router."""
        for dialect, layer in zip(self.dialects, layers, strict=True):
            if step + 1 >= self.until and not dialect.holds_bias:
                continue
            load_E = torch.tensor(layer.load, device=dialect.bias_E.device)
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(load_E)
                load_E /= dist.get_world_size()
            dialect.bias_E.add_(self.rate * torch.sign(1 / len(load_E) - load_E))

    @property
    def largest(self) -> float:
        """The largest absolute bias."""
        return max(float(dialect.bias_E.abs().max()) for dialect in self.dialects)
