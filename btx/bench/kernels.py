"""Expert kernels compared with dense matrix products of the same active FLOPs.

The lower bound is six matrix products (two forward, four backward) of S = T · K rows with one expert's weights: the
cost if every row went to one expert and everything but the products were free. Rounds interleave the kernels, so that
a load spike hits them all.

Axes: T tokens, K experts per token, E experts, D hidden size, F feed-forward width.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btx.bench import seconds
from btx.errors import RecipeError, nearest
from btx.graph.step import versions
from btx.models.kernels import NATIVE, absent, known, use_kernel


@dataclass(frozen=True)
class Shape:
    """Sizes of an expert layer, and the number of tokens that pass through it."""

    tokens: int
    k: int
    experts: int
    width: int
    half: int


SHAPES = {
    "demo": Shape(2048, 2, 4, 128, 384),
    "small": Shape(2048, 2, 4, 512, 1408),
    "medium": Shape(2048, 2, 4, 768, 2048),
    "large": Shape(2048, 2, 8, 1024, 2816),
    "fine": Shape(2048, 8, 64, 1024, 512),
    "mixtral-8x7b": Shape(16384, 2, 8, 4096, 14336),
    "qwen3-30b-a3b": Shape(16384, 8, 128, 2048, 768),
}
ON_CPU = ("demo", "small", "medium", "large", "fine")
DENSE = "dense"


@dataclass
class Row:
    """One kernel at one shape: medians over the rounds, in seconds and as ratios to the dense products; peak bytes."""

    shape: str
    dtype: str
    kernel: str
    forward: float = 0.0
    both: float = 0.0
    forward_ratio: float = 0.0
    both_ratio: float = 0.0
    peak_bytes: int = 0
    kept_bytes: int = 0
    spread: list[float] = field(default_factory=list)  # smallest and largest ratio of forward and backward


class _Layer(nn.Module):
    """Mixtral's own expert module on a kernel, with fixed random inputs and routing."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        torch.manual_seed(0)
        config = MixtralConfig(hidden_size=shape.width, intermediate_size=shape.half, num_local_experts=shape.experts,
                               num_experts_per_tok=shape.k)  # fmt: skip
        self.config = config
        with torch.device(device):
            self.experts = MixtralExperts(config).to(dtype)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=shape.width**-0.5)
            self.x = torch.randn(shape.tokens, shape.width, dtype=dtype, requires_grad=True)
            weight, index = torch.randn(shape.tokens, shape.experts).softmax(-1).topk(shape.k, -1)
            self.weight, self.index = weight.requires_grad_(), index
            self.grad = torch.randn(shape.tokens, shape.width, dtype=dtype)

    def set_experts_implementation(self, name: str) -> None:
        """What `use_kernel` calls on a native model."""
        self.config._experts_implementation = name

    def clear(self) -> None:
        """Reset the gradients."""
        for tensor in (self.x, self.weight, *self.experts.parameters()):
            tensor.grad = None

    def both(self) -> None:
        """Forward and backward pass from reset gradients."""
        self.clear()
        self.run().backward(self.grad)  # type: ignore[no-untyped-call]

    def run(self) -> Tensor:
        """Forward pass: (T, D)."""
        out: Tensor = self.experts(self.x, self.index, self.weight)
        return out


class _Dense:
    """The matrix products alone, each allocating its output as a dense layer does."""

    def __init__(self, layer: _Layer, shape: Shape) -> None:
        like = layer.x.detach()
        rows = shape.tokens * shape.k
        self.up, self.down = (p[0].detach() for p in (layer.experts.gate_up_proj, layer.experts.down_proj))
        self.x, self.act, self.hidden = (
            torch.randn(rows, n, dtype=like.dtype, device=like.device)
            for n in (shape.width, shape.half, 2 * shape.half)
        )

    def run(self) -> None:
        """The two forward products."""
        torch.mm(self.x, self.up.T), torch.mm(self.act, self.down.T)

    def both(self) -> None:
        """The two forward and the four backward products."""
        self.run()
        torch.mm(self.x, self.down), torch.mm(self.x.T, self.act)
        torch.mm(self.hidden, self.up), torch.mm(self.hidden.T, self.x)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch allocates during a call, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence file descriptor 2, to which torch's profiler writes directly."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def kept_bytes(work: Callable[[], Tensor], besides: list[Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, storages of `besides` excluded."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(n for at, n in kept.items() if at not in {t.untyped_storage().data_ptr() for t in besides})


def measure(
    shape: str, dtype: torch.dtype, names: list[str], device: torch.device, *, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """Rows of all kernels at one shape, interleaved, after one warm-up round."""
    layer = _Layer(SHAPES[shape], dtype, device)
    dense = _Dense(layer, SHAPES[shape])
    kind = str(dtype).removeprefix("torch.")
    rows = {name: Row(shape, kind, name) for name in (DENSE, *names)}
    forward: dict[str, list[float]] = {name: [] for name in rows}
    both: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name in rows:
            say(f"{shape} {kind} {name}, round {number} of {rounds}")
            work = dense if name == DENSE else layer
            if name != DENSE:
                use_kernel(layer, name)
            with torch.no_grad():
                forward[name].append(_timed(work.run, device))
            both[name].append(_timed(work.both, device))
    for name, row in rows.items():
        row.forward, row.both = (statistics.median(times[name][1:]) for times in (forward, both))
        pairs = [a / b for a, b in zip(both[name][1:], both[DENSE][1:], strict=True)]
        row.forward_ratio, row.both_ratio = row.forward / rows[DENSE].forward, row.both / rows[DENSE].both
        row.spread = [min(pairs), max(pairs)]
        if name != DENSE:
            use_kernel(layer, name)
            layer.clear()
            row.peak_bytes = peak_bytes(layer.both, device)
            row.kept_bytes = kept_bytes(layer.run, [layer.x, *layer.experts.parameters()])
    return list(rows.values())


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return seconds(work)
    torch.cuda.synchronize()

    def finished() -> None:
        work()
        torch.cuda.synchronize()

    return seconds(finished)


def at_hand(device: torch.device) -> list[str]:
    """Kernels that run on a device at full speed; not `batched_mm`, which copies weights for every token."""
    names = [name for name in known() if name != "batched_mm" and not absent(name, device)]
    return [name for name in names if device.type == "cuda" or name in NATIVE or name in ("reference", "sorted")]


def bench_kernels(
    *,
    shapes: list[str],
    kernels: list[str],
    dtypes: list[str],
    rounds: int,
    out: Path | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Measure and write `out` (JSON: rows, versions, device, date); returns the rows.

    RecipeError for an unknown shape, kernel or precision.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or list(ON_CPU if device.type == "cpu" else SHAPES)
    kernels = kernels or at_hand(device)
    for given, choice in ((shapes, SHAPES), (kernels, known()), (dtypes, ("float32", "bfloat16"))):
        for name in given:
            if name not in choice:
                raise RecipeError(f"there is nothing named {name!r} to measure; {nearest(name, choice)}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in dtypes:
            rows += measure(shape, getattr(torch, dtype), kernels, device, rounds=rounds, say=say)
            if out:  # after each, so that a later failure loses nothing
                _write(out, rows, rounds, device)
    return rows


def _write(out: Path, rows: list[Row], rounds: int, device: torch.device) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    about: dict[str, Any] = {"date": date.today().isoformat(), "device": name, "versions": versions(), "rounds": rounds}
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    out.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def table(rows: list[Row]) -> Any:
    """The rows as a rich table."""
    from rich.table import Table

    found = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("shape", "kernel", "ms", "ratio", "+back", "ratio", "spread", "peak", "kept"):
        found.add_column(column, justify="left" if column in ("shape", "kernel") else "right", no_wrap=True)
    for row in rows:
        first = row.kernel == DENSE
        cells = [
            f"{row.forward * 1e3:.1f}",
            f"{row.forward_ratio:.2f}",
            f"{row.both * 1e3:.1f}",
            f"{row.both_ratio:.2f}",
        ]
        if not first:
            cells += [f"{row.spread[0]:.2f}-{row.spread[1]:.2f}"]
            cells += [f"{n / 2**20:.0f} MB" for n in (row.peak_bytes, row.kept_bytes)]
        found.add_row(f"{row.shape} {row.dtype}" if first else "", row.kernel, *cells)
    return found
