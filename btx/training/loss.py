"""The next-token loss without the logits of a whole batch: the output head and the cross-entropy in chunks of rows.

At 128k vocabulary rows and 16k tokens, float32 logits take 8.4 GB, and their gradient as much again. Here a chunk's
logits are made, turned into its loss and gradients, and dropped.

Axes: T tokens, D hidden width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from btx.data.sampler import IGNORED
from btx.models.families import DENSE, MOE

CAP = "final_logit_softcapping"  # the config field
CHUNK = 2**25  # logits made at once, at most: 128 MiB in float32
ON_GPU = 4  # times as many on a GPU, most of which products of few rows leave idle (docs/benchmarks)


def rows_of(vocabulary: int, device: torch.device) -> int:
    """Number of tokens whose logits are made at once."""
    return max(16, CHUNK * (ON_GPU if device.type == "cuda" else 1) // vocabulary)


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, cap: float | None = None
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden · weightᵀ), a float32 scalar.

    With a `cap`, logits z are cap · tanh(z / cap) first, as Gemma's (arXiv 2408.00118).

    The products are in the dtype of `hidden_TD`, to which the weight is cast; loss and weight gradient are summed in
    float32. torch's own function (2.13 and newer) does the same for float32; in bfloat16 it rounds the loss and the
    sum of the chunks' weight gradients to bfloat16 (off by 7e-4 and 2.6e-3 where one product is off by 1.7e-3), so
    there and in older versions of torch it is done here.
    """
    rows = rows_of(len(weight_VD), weight_VD.device)
    if len(hidden_TD) <= rows:
        logits_TV = capped(functional.linear(hidden_TD, weight_VD.to(hidden_TD.dtype)).float(), cap)
        return functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    plain = cap is None and hidden_TD.dtype == weight_VD.dtype == torch.float32
    if plain and hasattr(functional, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)  # type: ignore[attr-defined, unused-ignore]
        found: Tensor = functional.linear_cross_entropy(
            hidden_TD, weight_VD, targets_T, reduction="sum", ignore_index=IGNORED, options=options
        )
        return found
    chunked: Tensor = _Chunked.apply(hidden_TD, weight_VD, targets_T, rows, cap)  # type: ignore[no-untyped-call]
    return chunked


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits, softly capped where there is a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _Chunked(torch.autograd.Function):
    """Computes gradients with the loss, chunk by chunk, since the logits that they need are gone afterwards."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, rows: int, cap: float | None
    ) -> Tensor:
        cast_VD = weight_VD.to(hidden_TD.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            loss, error_CV = _chunk(hidden_TD[part], cast_VD, targets_T[part], cap)
            total += loss
            grad_hidden_TD[part] = error_CV @ cast_VD
            grad_weight_VD += error_CV.T @ hidden_TD[part]
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden_TD * scale.to(grad_hidden_TD.dtype), (grad_weight_VD * scale).to(ctx.dtype), None, None, None


def _chunk(hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss, and its gradient in the logits: softmax minus the target's one, zero where ignored."""
    logits_CV = hidden_CD @ weight_VD.T
    slope_CV: Tensor | float = 1.0
    if cap is not None:
        logits_CV = capped(logits_CV.float(), cap)
        slope_CV = 1.0 - (logits_CV / cap).square()
    log_prob_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
    counted_C1 = (targets_C != IGNORED).unsqueeze(1)
    target_C1 = targets_C.clamp(min=0).unsqueeze(1)
    loss = -(log_prob_CV.gather(1, target_C1) * counted_C1).sum()
    error_CV = log_prob_CV.exp_().scatter_add_(1, target_C1, -torch.ones_like(target_C1, dtype=torch.float32))
    return loss, error_CV.mul_(counted_C1).mul_(slope_CV).to(hidden_CD.dtype)


def output_head(model: Any) -> nn.Linear | None:
    """The output head, if its product may be fused into the loss; None where that could compute something else.

    Between the head and the loss the classes of our families multiply by a constant (Granite) or do nothing, also when
    hidden states take the logits' place, or cap logits (Gemma), as the loss does here. Of other classes that is not
    known.
    """
    head = model.get_output_embeddings()
    known = model.config.model_type in DENSE.keys() | MOE.keys()
    return head if known and isinstance(head, nn.Linear) and head.bias is None else None


def cap_of(model: Any) -> float | None:
    """The soft cap of a model's logits, if it has one."""
    found = getattr(model.config, CAP, None)
    return None if found is None else float(found)


@contextmanager
def without_head(model: Any, head: nn.Linear) -> Iterator[None]:
    """Inside the context, the model's logits are the head's input, scaled as logits are, and not capped."""
    cap = cap_of(model)
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    if cap is not None:
        setattr(model.config, CAP, None)
    try:
        yield
    finally:
        del head.forward
        if cap is not None:
            setattr(model.config, CAP, cap)
