"""The search for rates: a function of what was tried, alike for every arm, and settled by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from btx.compare.search import Grid, Point, at_edge, following

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def searched(grid: Grid, loss: Callable[[Point], float]) -> tuple[dict[Point, float], list[list[Point]]]:
    """Everything that a search tries of a loss, and its rounds."""
    scores: dict[Point, float] = {}
    rounds = []
    while points := following(grid, scores):
        rounds.append(points)
        assert not scores.keys() & set(points)
        scores |= {point: loss(point) for point in points}
        assert len(rounds) < 10
    return scores, rounds


def bowl(*best: float) -> Callable[[Point], float]:
    """A loss with its least at a point."""
    return lambda point: sum(math.log(x / b) ** 2 for x, b in zip(point, best, strict=True))


def test_a_best_within_the_grid_is_refined_on_both_sides_and_no_more() -> None:
    one, rounds = searched(Grid(RATES, (1.0,), 2), bowl(2e-3))
    assert rounds == [[(r,) for r in RATES], [(1.41e-3,), (2.83e-3,)]]
    two, rounds = searched(Grid(RATES, (1.0, 0.5), 2), bowl(2e-3, 1e-3))
    assert rounds[0] == [(r, r / 2) for r in RATES]
    assert rounds[1] == [(2e-3, 5e-4), (2e-3, 2e-3)]  # the last stage alone
    assert len(one) == len(two)  # every arm gets as many trials


@pytest.mark.parametrize("best", [1e-5, 1.0])
def test_a_best_at_an_edge_is_followed_so_far_and_then_said(best: float) -> None:
    grid = Grid(RATES, (1.0,), 2)
    scores, rounds = searched(grid, bowl(best))
    beyond = [(5e-4,), (2.5e-4,)] if best < 1e-3 else [(1.6e-2,), (3.2e-2,)]
    assert [points[0] for points in rounds[1:3]] == beyond
    assert at_edge(scores)
    assert len(scores) == len(RATES) + 2 + 2
    assert not at_edge(searched(grid, bowl(4e-3))[0])


def test_a_best_one_beyond_the_grid_ends_the_extension() -> None:
    grid = Grid(RATES, (1.0,), 2)
    scores, rounds = searched(grid, bowl(1.6e-2))
    assert rounds[1:3] == [[(1.6e-2,)], [(3.2e-2,)]]
    assert not at_edge(scores)


def test_a_rate_that_diverged_is_no_best() -> None:
    scores, _ = searched(Grid(RATES, (1.0,), 2), lambda point: math.inf if point[0] > 2e-3 else bowl(4e-3)(point))
    assert min(scores, key=scores.__getitem__) == (2e-3,)


def test_a_search_that_was_stopped_goes_on_where_it_was() -> None:
    grid, loss = Grid(RATES, (1.0, 0.5), 2), bowl(8e-3, 4e-3)
    whole, _ = searched(grid, loss)
    order = list(whole)
    for done in range(len(order)):
        scores = {point: whole[point] for point in order[:done]}
        while points := following(grid, scores):
            scores |= {point: loss(point) for point in points}
        assert scores == whole


def test_a_best_between_two_that_were_tried_is_at_no_edge() -> None:
    """The refinement brackets it, though the best of the grid itself was its last rate."""
    grid = Grid(RATES, (1.0,), 0)
    scores, _ = searched(grid, bowl(5.66e-3))
    assert min(scores, key=scores.__getitem__) == (5.66e-3,)
    assert not at_edge(scores)
    assert at_edge({point: loss for point, loss in scores.items() if point[0] < 6e-3})


def test_a_last_stage_whose_best_rate_is_the_last_tried_is_at_an_edge() -> None:
    grid = Grid(RATES, (1.0, 1.0), 0)
    assert not at_edge(searched(grid, bowl(2e-3, 2e-3))[0])
    scores, _ = searched(grid, bowl(2e-3, 1e-4))
    assert at_edge(scores)  # of the last stage, though the first is within the grid
    assert min(scores, key=scores.__getitem__)[1] == 5e-4
    confirmed = {(1e-3, 5e-4): 1.0, (2e-3, 1e-3): 2.0, (4e-3, 2e-3): 3.0}
    assert at_edge(confirmed)
    assert not at_edge(confirmed | {(1e-3, 5e-4): 2.5})
