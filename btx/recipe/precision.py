"""Resolves `precision: auto`, before anything is hashed. torch is imported only where there may be a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16"]
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")  # CUDA, ROCm, WSL, Jetson


def automatic(device: str) -> Precision:
    """The precision that `auto` stands for on the device that `run.device` names: auto, cpu or cuda.

    bf16 on a GPU that has it, and on CPUs where it is faster: AMD's with AVX-512 bf16 (docs/benchmarks), and those with
    tiles (AMX), which were not measured. Intel's with AVX-512 bf16 alone multiply in it at half the speed of fp32.
    Without a GPU's device file torch is not imported, which takes seconds.
    """
    if device != "cpu" and any(Path(file).exists() for file in GPU_FILES):
        import torch

        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if fast_on_cpu(_cpuinfo()) else "fp32"


def fast_on_cpu(cpuinfo: str) -> bool:
    """Whether a CPU, as Linux describes it in /proc/cpuinfo, multiplies bfloat16 matrices faster than float32 ones."""
    about = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    found = {key.strip(): value.split() for key, value in about.items()}
    flags = found.get("flags", [])
    return "amx_bf16" in flags or ("avx512_bf16" in flags and found.get("vendor_id") == ["AuthenticAMD"])


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
