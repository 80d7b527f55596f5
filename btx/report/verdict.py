"""What may be said of differences: paired over blocks, with the smallest difference that could have been found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Verdict:
    """A difference of two arms in bits per byte, less is better for the first.

    `word` is better, worse or cannot tell; with a single block there is no interval, and no more can be said than
    which was less on that block.
    """

    difference: float
    low: float | None
    high: float | None
    detectable: float | None  # found in 80 % of comparisons like this one, at 95 %
    blocks: int
    freedom: int
    word: str

    def written(self) -> dict[str, Any]:
        """For results."""
        return asdict(self)


def paired(first: Sequence[float], second: Sequence[float]) -> Verdict:
    """Student's paired t over blocks: the mean difference, its 95 % interval and the minimum detectable effect.

    The latter is (t(.975) + t(.8)) · s / √n, with n − 1 degrees of freedom (the usual approximation by central t).
    """
    from scipy.stats import t

    gaps = [a - b for a, b in zip(first, second, strict=True)]
    n = len(gaps)
    mean = math.fsum(gaps) / n
    if n == 1:
        return Verdict(mean, None, None, None, 1, 0, "one block: no interval")
    spread = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (n - 1))
    error = spread / math.sqrt(n)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    detectable = half + float(t.ppf(POWER, n - 1)) * error
    word = "cannot tell" if abs(mean) <= half else "better" if mean < 0 else "worse"
    return Verdict(mean, mean - half, mean + half, detectable, n, n - 1, word)


def equivalent(curve: Sequence[tuple[float, float]], loss: float) -> tuple[str, float]:
    """The compute at which a curve of (compute, loss) reaches a loss, by interpolation in log compute.

    ("=", compute) at the first crossing within the curve; ("<", its first) or (">", its last) beyond it, since nothing
    is extrapolated.
    """
    points = sorted(curve)
    if loss >= points[0][1]:
        return ("=" if loss == points[0][1] else "<", points[0][0])
    for (c0, l0), (c1, l1) in itertools.pairwise(points):
        if l1 <= loss < l0:
            share = (l0 - loss) / (l0 - l1)
            return ("=", math.exp(math.log(c0) + share * (math.log(c1) - math.log(c0))))
    return (">", points[-1][0])
