"""The registry of claims: the modules of this folder that define `CLAIM`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import btx.claims
from btx.claims.contract import Claim, Finding, Results


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of the founding note."""
    names = [module.name for module in pkgutil.iter_modules(btx.claims.__path__)]
    modules = [importlib.import_module(f"btx.claims.{name}") for name in names]
    return tuple(sorted((one.CLAIM for one in modules if hasattr(one, "CLAIM")), key=lambda claim: claim.number))


def judged(results: Results) -> list[tuple[Claim, Finding]]:
    """Every claim that a report speaks to, with what it says."""
    return [(claim, found) for claim in claims() if (found := claim.judge(results))]
