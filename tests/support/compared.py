"""A comparison of the pico project, to be looked at or run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from btx.compare.rounds import Rounds
from btx.conversions.registry import load_recipe
from tests.support.project import write_project


def rounds_of(folder: Path, arms: dict[str, Any], **compare: Any) -> Rounds:
    """A comparison of the pico project, beside dense."""
    path = write_project(folder)
    said = {"arms": {"dense": {}, **arms}, "rates": [1e-3, 2e-3], "budgets": [4096], **compare}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"compare": said}))
    return Rounds(load_recipe(path, []), folder)
