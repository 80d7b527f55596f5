"""The interface of a probe: a module of this folder whose `PROBE` measures a model on held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx.models.opened import Opened
from btx.recipe.settings import Settings

Document = tuple[NDArray[np.int64], int]  # ids (the first is context, not scored), bytes of text


@dataclass(frozen=True)
class Data:
    """The input of a probe: held-out documents by domain, window length, batch size, and the tokenizer."""

    documents: dict[str, list[Document]]
    length: int  # of a window, in tokens
    batch_tokens: int  # of a forward pass, at most
    tokenizer: Callable[[], Any] | None = None  # loads the model's own, for a probe that reads its text


@dataclass(frozen=True)
class Found:
    """The result of a probe: numbers by domain and name, a row per item, and tables of any shape."""

    numbers: dict[str, dict[str, float]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    missing: str = ""  # the reason, if the model cannot be measured


class NoSettings(Settings):
    """A probe without settings."""


@dataclass(frozen=True)
class Probe:
    """One probe.

    `measure` gets the model, the seed (None unless `reference` is set), the data and the settings. A recipe enables a
    probe under `probes`, by its module name. `needs` are the capabilities (`btx.models.opened`) that a model must have;
    a new `version` invalidates earlier measurements.
    """

    measure: Callable[[Opened, Any, Data, Any], Found]
    settings: type[Settings] = NoSettings
    needs: frozenset[str] = frozenset()
    reference: bool = False
    version: int = 1
