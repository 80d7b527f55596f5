"""The cost of a step, as recorded in its manifest: tokens, FLOPs by formula, seconds, memory, bytes."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """`device_seconds` are wall seconds times processes; `peak_memory` is the GPU's if one was used, else resident.

    FLOPs are those of training by formula (`btx.models.flops`), 0 for a step that trains nothing.
    """

    tokens: int = 0
    flops: float = 0.0
    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    peak_memory: int = 0
    bytes: int = 0

    def written(self) -> dict[str, Any]:
        """The fields as a dict, for a manifest."""
        return asdict(self)

    @classmethod
    def read(cls, manifest: dict[str, Any]) -> Cost | None:
        """The cost in a manifest; None if an older btx wrote it."""
        said = manifest.get("cost")
        return said and cls(**{field.name: said[field.name] for field in fields(cls) if field.name in said})


def cost_of(facts: dict[str, Any], *, seconds: float, folder: Path) -> Cost:
    """The cost of a step that ran in this process, from what it says of itself."""
    return Cost(
        tokens=int(facts.get("tokens", 0)),
        flops=float(facts.get("training_flops", 0.0)),
        wall_seconds=round(seconds, 1),
        device_seconds=round(seconds * int(facts.get("processes", 1)), 1),
        peak_memory=peak_memory(),
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )


def peak_memory() -> int:
    """Peak bytes since `forget_peak`: on the GPU if this process used one, else resident; 0 if unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError, ValueError, StopIteration):
        return resident("VmHWM")
    return 0


def resident(key: str) -> int:
    """Resident memory of this process in bytes, from Linux's /proc: VmRSS now, VmHWM at peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def forget_peak() -> None:
    """Reset the peak counters, where the system allows it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
