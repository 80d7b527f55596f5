"""The registry of probes: the modules of this folder that define `PROBE`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import btx.probes
from btx.probes.contract import Probe

ALWAYS = "bits_per_byte"  # part of every report


@cache
def probes() -> dict[str, Probe]:
    """All probes, by module name."""
    modules = [
        importlib.import_module(f"btx.probes.{module.name}") for module in pkgutil.iter_modules(btx.probes.__path__)
    ]
    return {module.__name__.rpartition(".")[2]: module.PROBE for module in modules if hasattr(module, "PROBE")}
