"""Every class of step that there is: the listings of `btx/steps/` and `btx/conversions/` are the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import btx.conversions
import btx.steps
from btx.graph.step import Step


def classes() -> dict[str, type[Step]]:
    """By their names."""
    for room in (btx.steps, btx.conversions):
        for module in pkgutil.iter_modules(room.__path__):
            importlib.import_module(f"{room.__name__}.{module.name}")
    return {cls.__name__: cls for cls in _below(Step) if cls.__module__.startswith("btx.")}


def _below(cls: type[Step]) -> Iterator[type[Step]]:
    for one in cls.__subclasses__():
        yield one
        yield from _below(one)
