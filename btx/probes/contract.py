"""What a probe is: a module of this folder whose `PROBE` measures a model on held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx.models.opened import Opened
from btx.recipe.settings import Settings

Document = tuple[NDArray[np.int64], int]  # ids led by one of context, bytes of text


@dataclass(frozen=True)
class Data:
    """What a probe looks at: held-out documents by domain, and how they are cut into passes."""

    documents: dict[str, list[Document]]
    length: int  # of a window, in tokens
    batch_tokens: int  # of a pass, at most


@dataclass(frozen=True)
class Found:
    """What a probe says of a model: numbers by domain and name, a row per item, and tables of any shape."""

    numbers: dict[str, dict[str, float]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    missing: str = ""  # why the model has no answer, where it has none


class NoSettings(Settings):
    """Of a probe that has none."""


@dataclass(frozen=True)
class Probe:
    """One probe.

    `measure` is given the model, the seed where `reference` asks for it, the data and the settings. A recipe asks for
    it under `probes`, by the name of its module. `needs` are capabilities (`btx.models.opened`) without which a model
    has no answer; a new `version` measures anew.
    """

    measure: Callable[[Opened, Any, Data, Any], Found]
    settings: type[Settings] = NoSettings
    needs: frozenset[str] = frozenset()
    reference: bool = False
    version: int = 1
