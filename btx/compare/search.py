"""Which learning rates are tried next, as a function of those tried: pure, so that a stopped search goes on.

A point is a peak rate for each stage of a conversion. First all stages move together, over a grid of one factor that
is the same for every arm; while the best is at an edge, the next rate beyond it is tried, a limited number of times.
Then an arm of several stages moves its last stage alone by one factor to each side, and an arm of one stage by half a
factor, so that every arm gets as many trials, extensions aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Point = tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """The grid of an arm: its first stage's rates, and what the other stages' are as a multiple of them."""

    rates: tuple[float, ...]
    ratios: tuple[float, ...]  # of each stage to the first; the first is 1
    extensions: int

    @property
    def factor(self) -> float:
        """From one rate to the next."""
        return float((self.rates[-1] / self.rates[0]) ** (1 / (len(self.rates) - 1)))

    def together(self, rate: float) -> Point:
        """All stages moved with the first."""
        return tuple(rounded(rate * ratio) for ratio in self.ratios)

    @property
    def rungs(self) -> list[Point]:
        """The points on which all stages move together: the grid, and its extensions to both sides, in order."""
        more = [self.factor**n for n in range(1, self.extensions + 1)]
        rates = [*(self.rates[0] / by for by in reversed(more)), *self.rates, *(self.rates[-1] * by for by in more)]
        return [self.together(rate) for rate in rates]

    def around(self, best: Point) -> list[Point]:
        """The two points beside the best: its last stage alone by a factor, or of one stage by half a factor."""
        step = self.factor if len(best) > 1 else self.factor**0.5
        return [(*best[:-1], rounded(best[-1] / step)), (*best[:-1], rounded(best[-1] * step))]

    def neighbours(self, best: Point) -> list[Point]:
        """The best and the points a factor to each side of it, all stages together."""
        return [tuple(rounded(rate * by) for rate in best) for by in (1 / self.factor, 1.0, self.factor)]


def rounded(rate: float) -> float:
    """Three significant digits, so that a recipe can say it and meet the same folders."""
    return float(f"{rate:.3g}")


def following(grid: Grid, scores: Mapping[Point, float]) -> list[Point]:
    """The points to be tried next, given the mean loss of those tried; none when the search is over."""
    if missing := [point for point in map(grid.together, grid.rates) if point not in scores]:
        return missing
    rungs, tried = grid.rungs, _tried(grid, scores)
    best = min(tried, key=lambda n: scores[rungs[n]])
    if len(tried) < len(grid.rates) + grid.extensions:
        if best == tried[0]:
            return [rungs[best - 1]]
        if best == tried[-1]:
            return [rungs[best + 1]]
    return [point for point in grid.around(rungs[best]) if point not in scores]


def at_edge(scores: Mapping[Point, float]) -> bool:
    """Whether the best of all that was tried is not bracketed: its first stage's rate is the lowest or the highest of
    those tried, or its last stage's is among those tried beside the same others."""
    best = min(scores, key=scores.__getitem__)
    first, last = {point[0] for point in scores}, {point[-1] for point in scores if point[:-1] == best[:-1]}
    return any(len(line) > 1 and rate in (min(line), max(line)) for rate, line in ((best[0], first), (best[-1], last)))


def _tried(grid: Grid, scores: Mapping[Point, float]) -> list[int]:
    """Which rungs were tried, in order."""
    return [n for n, point in enumerate(grid.rungs) if point in scores]
