"""Charts of a comparison: who differs from the control by how much, and loss against compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from btx.recipe.compare_settings import MEAN
from btx.report.charts import COLOURS, FAINT, INK, STYLE, WIDTH, head, plain, svg_of
from btx.report.comparison import mean


def colours_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each arm, the same in every chart."""
    arms = dict.fromkeys(run["arm"] for run in runs)
    return {arm: COLOURS[n % len(COLOURS)] for n, arm in enumerate(arms)}


def forest_svg(verdicts: Sequence[Mapping[str, Any]], control: str, colours: Mapping[str, str]) -> str:
    """Differences from the control in the mean over domains, with 95 % intervals and the detectable effect."""
    height = 1.35 + 0.36 * len(verdicts)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        head(
            figure,
            f"Bits per byte less those of {control}",
            "left of zero is better; bar: 95 % interval over blocks; grey: what would have gone unseen",
        )
        axes = figure.add_axes((0.24, 0.5 / height, 0.72, 0.36 * len(verdicts) / height))
        for row, one in enumerate(verdicts):
            found = one[MEAN]
            colour = colours[one["arm"]]
            if found["low"] is not None:
                seen = found["detectable"]
                axes.barh(row, 2 * seen, left=-seen, height=0.62, color="#9a9a9a", alpha=0.22, linewidth=0)
                axes.plot(
                    [found["low"], found["high"]], [row, row], color=colour, linewidth=2.5, solid_capstyle="round"
                )
            axes.plot([found["difference"]], [row], "o", color=colour, markersize=7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(verdicts)), [str(one["arm"]) for one in verdicts], size=10, color=INK)
        axes.set_ylim(len(verdicts) - 0.5, -0.5)
        plain(axes, "x")
        axes.tick_params(axis="y", length=0)
        return svg_of(figure, f"Differences from {control}")


def compute_svg(runs: Sequence[Mapping[str, Any]], seed: float, colours: Mapping[str, str]) -> str:
    """Mean bits per byte of every final run against its training FLOPs; a line through the means of an arm."""
    height = 4.4
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        head(
            figure,
            "Loss against compute",
            "mean bits per byte on test; training FLOPs after the seed (6 · active · tokens); a point per block",
        )
        axes = figure.add_axes((0.1, 0.6 / height, 0.72, (height - 1.3) / height))
        ends = []
        for arm, colour in colours.items():
            own = [run for run in runs if run["arm"] == arm]
            points = [(run["cost"]["flops"], mean(run["bits_per_byte"])) for run in own]
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
            middles = _middles(own)
            axes.plot(*zip(*middles, strict=True), "-", color=colour, linewidth=1.8)
            axes.plot(*middles[-1], "_", color=colour, markersize=16, markeredgewidth=2.5)
            ends.append((middles[-1][1], arm, colour))
        axes.axhline(seed, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((seed, "the seed", FAINT))
        axes.set_xscale("log")
        for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            which(EngFormatter(sep=""))
        plain(axes, "y")
        axes.set_xlabel("FLOPs", color=FAINT, size=9)
        _named(axes, ends)
        return svg_of(figure, "Loss against compute")


def _middles(own: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Of each budget: the mean over its blocks."""
    found = []
    for budget in sorted({run["budget"] for run in own}):
        here = [run for run in own if run["budget"] == budget]
        flops = math.fsum(run["cost"]["flops"] for run in here) / len(here)
        found.append((flops, math.fsum(mean(run["bits_per_byte"]) for run in here) / len(here)))
    return found


def _named(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right, at the height of what they name, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap, at = (high - low) * 0.058, -math.inf
    for value, name, colour in sorted(ends):
        at = max(value, at + gap)
        axes.annotate(name, (1.015, at), xycoords=("axes fraction", "data"), size=9.5, color=colour, va="center")
