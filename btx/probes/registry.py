"""Every probe that there is: the listing of this folder is the registry."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import btx.probes
from btx.probes.contract import Probe

ALWAYS = "bits_per_byte"  # which every report has


@cache
def probes() -> dict[str, Probe]:
    """By the names of their modules."""
    modules = [
        importlib.import_module(f"btx.probes.{module.name}") for module in pkgutil.iter_modules(btx.probes.__path__)
    ]
    return {module.__name__.rpartition(".")[2]: module.PROBE for module in modules if hasattr(module, "PROBE")}
