"""Fixtures of all tests: one thread, and pico models built on the spot; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each dense family in turn."""
    return str(request.param)


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """A valid recipe and all that it names, to be broken."""
    from tests.support.world import World

    return World(tmp_path)
