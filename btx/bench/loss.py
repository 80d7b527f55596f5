"""The output head and its loss, forward and backward, compared with materialising all logits.

Each implementation runs in its own process; rounds are interleaved. Memory is the peak above the memory held before,
of the GPU or of the process. Errors are relative to float64 on the first CHECKED tokens.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from btx.bench import apart, forget_peak, resident, seconds
from btx.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

WAYS = {
    "ours": "btx.training.loss, in chunks of rows",
    "torch": "torch's linear_cross_entropy (2.13 and newer), in the same chunks",
    "whole": "all logits, then torch's cross_entropy in float32",
}
CHECKED = 512


def at_hand() -> list[str]:
    """The implementations that this torch provides."""
    from torch.nn import functional

    return [name for name in WAYS if name != "torch" or hasattr(functional, "linear_cross_entropy")]


def bench_loss(
    *, tokens: int, vocabulary: int, width: int, dtype: str, rounds: int, names: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Median seconds, peak bytes and errors of each implementation.

    RecipeError if memory is too small for all logits (three float32 copies: logits, log-softmax and its gradient).
    """
    import torch

    needs = 12 * tokens * vocabulary
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _available()
    if "whole" in names and needs > free:
        raise RecipeError(
            f"all logits of {tokens:,} tokens over {vocabulary:,} rows take {needs / 1e9:.0f} GB and "
            f"{free / 1e9:.0f} GB are free; give --way ours --way torch, or fewer --tokens."
        )
    found: dict[str, Any] = {name: {"what": WAYS[name], "rounds": []} for name in names}
    for number in range(rounds):
        for name in names:
            say(f"round {number + 1} of {rounds}: {name}")
            about = {"name": name, "tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": dtype}
            said = apart("btx.bench.loss", about)
            found[name]["rounds"].append(said.pop("seconds"))
            found[name] |= said
    for row in found.values():
        row["seconds"] = statistics.median(row["rounds"])
    return found


def _available() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def table(found: dict[str, Any]) -> Any:
    """One row per implementation, as a rich table."""
    from rich.table import Table

    drawn = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("way", "seconds", "memory", "error: loss", "hidden", "weight"):
        drawn.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for name, row in found.items():
        drawn.add_row(
            name, f"{row['seconds']:.3f}", f"{row['memory'] / 1e9:.2f} GB", *(f"{x:.1e}" for x in row["errors"])
        )
    return drawn


def run(about: dict[str, Any]) -> dict[str, Any]:
    """Run one implementation: seconds and peak bytes of a call on all tokens, and errors; a first call warms up."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden_TD = torch.randn(about["tokens"], about["width"], device=device).to(getattr(torch, about["dtype"]))
    weight_VD = torch.randn(about["vocabulary"], about["width"], device=device).mul_(about["width"] ** -0.5)
    targets_T = torch.randint(about["vocabulary"], (about["tokens"],), device=device)
    hidden_TD.requires_grad_(), weight_VD.requires_grad_()

    def both(count: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TD.grad = weight_VD.grad = None
        loss = _loss(about["name"], hidden_TD[:count], weight_VD, targets_T[:count])
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden_TD.grad is not None
        assert weight_VD.grad is not None
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), hidden_TD.grad[:count], weight_VD.grad

    right = _loss_in_float64(hidden_TD[:CHECKED], weight_VD, targets_T[:CHECKED])
    errors = [float((one.double() - two).norm() / two.norm()) for one, two in zip(both(CHECKED), right, strict=True)]
    del right
    if device.type == "cuda":
        both(about["tokens"])
        torch.cuda.empty_cache()
        hidden_TD.grad = weight_VD.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        took = seconds(lambda: both(about["tokens"]))
        return {"seconds": took, "memory": torch.cuda.max_memory_allocated() - before, "errors": errors}
    hidden_TD.grad = weight_VD.grad = None
    before = resident("VmRSS")
    forget_peak()
    took = seconds(lambda: both(about["tokens"]))
    return {"seconds": took, "memory": resident("VmHWM") - before, "errors": errors}


def _loss(name: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    from torch import nn
    from torch.nn import functional

    from btx.training.loss import linear_cross_entropy, rows_of

    if name == "ours":
        return linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    cast_VD = weight_VD.to(hidden_TD.dtype)
    if name == "torch":
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows_of(len(weight_VD), weight_VD.device))  # type: ignore[attr-defined, unused-ignore]
        found: Tensor = functional.linear_cross_entropy(hidden_TD, cast_VD, targets_T, reduction="sum", options=options)
        return found
    return functional.cross_entropy(functional.linear(hidden_TD, cast_VD).float(), targets_T, reduction="sum")


def _loss_in_float64(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch
    from torch.nn import functional

    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD))
    loss = functional.cross_entropy(functional.linear(hidden, weight), targets_T, reduction="sum")
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), grad_hidden, grad_weight
