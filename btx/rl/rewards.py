"""Rewards of judged answers, and what formats they lead to: pure functions.

`binary` is 1 for a right answer and 0 for a wrong one. `calibrated` (RLCR, arXiv 2507.16806) takes off the Brier loss
of the stated confidence q, so that the best q is the chance of being right, and being right still pays most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

Reward = Literal["binary", "calibrated"]
Scale = Literal["none", "group"]


def binary(right: bool) -> float:
    """1[right]."""
    return float(right)


def calibrated(right: bool, stated: float | None, unstated: float) -> float:
    """1[right] − (q − 1[right])²; `unstated` takes the place of the squared error of an answer that states no q.

    Stating the true chance p costs p (1 − p), a quarter at most; a q drawn at random costs a third. At less than that,
    here `unstated` = 0.25 as if q were one half, a policy that has not learned what to state first learns to be silent,
    and then stays so (seen). At 1 it counts as a confident mistake, as the authors' code has it.
    """
    lost = unstated if stated is None else (stated - float(right)) ** 2
    return float(right) - lost


def confidence(text: str, pattern: str) -> float | None:
    """The last confidence that a text states, by the first group of a pattern: 0.8, or 80 %; None if there is none
    from 0 to 1."""
    found = [match[1] for match in re.finditer(pattern, text)]
    if not found or found[-1] is None:
        return None
    said = found[-1].strip()
    try:
        value = float(said.rstrip("% ")) / (100 if said.endswith("%") else 1)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def optimum(shares: Mapping[str, float], accuracy: Mapping[str, float], kl: float) -> dict[str, float]:
    """The shares of formats that maximise the binary reward less `kl` times KL to the policy that had `shares`.

    Proportional to α_f (p_f e^(1/kl) + 1 − p_f), p_f the accuracy of answers in a format: the policy tilted by
    e^(reward/kl) (the closed form of KL-regularised reward). As kl grows, the shares stay; as it falls, they follow
    accuracy times share, and only what is never right vanishes.
    """
    most = max(shares, key=lambda name: accuracy[name])
    gain = math.exp(-1 / kl)  # the wrong ones' weight, so that nothing overflows
    tilted = {name: share * (accuracy[name] + (1 - accuracy[name]) * gain) for name, share in shares.items()}
    whole = sum(tilted.values())
    return (
        {name: one / whole for name, one in tilted.items()} if whole else {name: float(name == most) for name in shares}
    )
