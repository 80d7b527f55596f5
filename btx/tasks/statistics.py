"""Intervals of shares, alone and paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (J. Am. Stat. Assoc. 22, 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Items right before and wrong after, the reverse, and the difference of the shares with its 95 % interval.

    The interval is the adjusted Wald one of Bonett and Price (Br. J. Math. Stat. Psychol. 65, 2012), which stays
    honest at few items: one is added to either count, two to the number of items.
    """
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    won = sum(b and not a for a, b in zip(before, after, strict=True))
    count = len(before)
    up, down = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * ((up + down - (up - down) ** 2) / (count + 2)) ** 0.5
    ends = [max(-1.0, up - down - half), min(1.0, up - down + half)]
    return {"right_to_wrong": lost, "wrong_to_right": won, "difference": (won - lost) / count, "interval_95": ends}
