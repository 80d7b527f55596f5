"""Whether this system gives a sandbox, for the tests that run programs in one."""

from __future__ import annotations

import pytest

from btx.tasks import canaries
from btx.tasks.enclosed import NotEnclosedError


def why_not() -> str:
    """Why there is none; empty if there is."""
    try:
        canaries.require()
    except NotEnclosedError as error:
        return str(error)
    return ""


WHY_NOT = why_not()
held = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
