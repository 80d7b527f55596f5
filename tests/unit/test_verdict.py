"""Verdicts against scipy's own test, and as an instrument: A/A at its nominal rate, a planted effect found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from btx.report.verdict import equivalent, paired


def test_an_interval_is_that_of_the_paired_t_test() -> None:
    a, b = [1.0, 1.2, 0.9, 1.05], [1.1, 1.25, 1.05, 1.1]
    found = paired(a, b)
    test = stats.ttest_rel(a, b)
    span = test.confidence_interval(0.95)
    assert found.difference == pytest.approx(float(np.mean(np.subtract(a, b))))
    assert (found.low, found.high) == pytest.approx((span.low, span.high))
    assert found.word == ("better" if test.pvalue < 0.05 else "cannot tell")
    assert (found.blocks, found.freedom) == (4, 3)


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_the_same_thing_twice_is_called_different_at_the_nominal_rate(blocks: int) -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 2, blocks))
    told = [paired(a, b).word != "cannot tell" for a, b in draws.tolist()]
    assert np.mean(told) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


@pytest.mark.parametrize("blocks", [4, 8])
def test_an_effect_as_large_as_is_said_to_be_detectable_is_found_four_times_in_five(blocks: int) -> None:
    error = math.sqrt(2 / blocks)  # of the mean difference, both sides of unit variance
    effect = error * (stats.t.ppf(0.975, blocks - 1) + stats.t.ppf(0.8, blocks - 1))
    draws = np.random.default_rng(1).normal(size=(4000, 2, blocks))
    found = [paired((a - effect).tolist(), b.tolist()) for a, b in draws]
    assert np.mean([one.word == "better" for one in found]) == pytest.approx(0.8, abs=0.05)
    assert np.mean([one.word == "worse" for one in found]) < 0.001
    mean = np.mean([one.detectable for one in found])  # s is below σ on average: c4 of n − 1
    assert mean == pytest.approx(effect, rel=0.1)


def test_equal_blocks_are_not_told_apart_and_one_block_says_nothing() -> None:
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert (same.word, same.difference, same.detectable) == ("cannot tell", 0.0, 0.0)
    one = paired([1.0], [2.0])
    assert (one.low, one.high, one.detectable) == (None, None, None)
    assert one.word not in ("better", "worse")


def test_equivalent_compute_is_read_off_the_curve_and_never_beyond_it() -> None:
    curve = [(1e9, 3.0), (4e9, 2.0), (1.6e10, 1.5)]
    assert equivalent(curve, 2.5) == ("=", pytest.approx(2e9))  # half way in log compute
    assert equivalent(curve, 2.0) == ("=", pytest.approx(4e9))
    assert equivalent(curve, 3.5) == ("<", 1e9)
    assert equivalent(curve, 1.0) == (">", 1.6e10)
    assert equivalent(curve[::-1], 2.5) == equivalent(curve, 2.5)
    assert equivalent([(1e9, 3.0), (2e9, 2.0), (4e9, 2.5)], 2.2)[1] < 2e9  # the first crossing
