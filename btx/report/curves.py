"""Charts of what happened inside: routing by layer, and loss and router entropy over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from btx.report.charts import COLOURS, FAINT, INK, PAPER, SHARE, STYLE, WIDTH, head, plain, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 2.3  # inches: the least width of a domain's panel
POINTS = 200  # of a curve at most: a mean over the steps between


def layers_svg(results: Mapping[str, Any]) -> str:
    """Expert load of the exported model by router (rows) and expert (columns), one panel per held-out domain."""
    found = results["routing"][results["exported"]]
    experts, routers = results["experts"], len(next(iter(found.values()))["routers"])
    panel = max(PANEL, 0.16 * len(experts))
    across = max(1, min(len(found), int((WIDTH - 0.6) // panel)))
    down = math.ceil(len(found) / across)
    tall = max(0.9, 0.13 * routers) + 0.75
    height = 0.65 + down * tall
    top = max(share for one in found.values() for layer in one["layers"] for share in layer)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        note = f"share of the token-choices per router and expert, from none (light) to {top:.0%} (dark)"
        head(figure, f"Routing of the {results['exported']} model by layer", note)
        for n, (domain, one) in enumerate(found.items()):
            left = 0.55 + (n % across) * (WIDTH - 0.6) / across
            bottom = height - 0.65 - (n // across + 1) * tall + 0.5
            box = (left / WIDTH, bottom / height, ((WIDTH - 0.6) / across - 0.3) / WIDTH, (tall - 0.75) / height)
            axes = figure.add_axes(box)
            axes.set_title(domain, size=9.5, color=INK)
            axes.pcolormesh(SHARE(np.array(one["layers"]) / top), edgecolors=PAPER, linewidth=0.5)
            axes.invert_yaxis()
            every = max(1, routers // 8)
            axes.set_yticks(np.arange(0, routers, every) + 0.5, one["routers"][::every], size=7.5, color=FAINT)
            few = len(experts) <= 8
            names = experts if few else [""] * len(experts)
            axes.set_xticks(np.arange(len(experts)) + 0.5, names, size=7.5, color=FAINT, rotation=35, ha="right")
            _bare(axes)
        return svg_of(figure, "Routing by layer")


def training_svg(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss by step of every training, and below it the routers' entropy, mean over layers, of mixtures."""
    routed = {label: rows for label, rows in metrics.items() if any("entropy" in row for row in rows)}
    height = 3.4 + (2.1 if routed else 0)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        head(figure, "Training loss", "cross-entropy in nats per token, by optimiser step")
        axes = figure.add_axes((0.09, (height - 3.0) / height, 0.66, 2.3 / height))
        colours = {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(metrics)}
        for label, rows in metrics.items():
            axes.plot(*_curve(rows, lambda row: row["loss"]), color=colours[label], linewidth=1.4, label=label)
        plain(axes, "y")
        names = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8.5)
        for text in names.get_texts():
            text.set_color(INK)
        if routed:
            head(figure, "Router entropy", "mean over layers, as a share of log E: 1 is uniform", at=2.26)
            below = figure.add_axes((0.09, 0.4 / height, 0.66, 1.2 / height))
            for label, rows in routed.items():
                below.plot(*_curve(rows, _entropy), color=colours[label], linewidth=1.4)
            plain(below, "y")
        return svg_of(figure, "Training loss and router entropy")


def _entropy(row: Mapping[str, Any]) -> float:
    found = row.get("entropy") or [math.nan]
    return math.fsum(found) / len(found)


def _curve(rows: Sequence[Mapping[str, Any]], value: Any) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over equal stretches where there are many; NaN where a step has no number."""
    steps = np.array([row["step"] for row in rows], dtype=float)
    values = np.array([float(value(row)) for row in rows])
    parts = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    return [float(steps[part].mean()) for part in parts], [float(values[part].mean()) for part in parts]


def _bare(axes: Axes) -> None:
    axes.tick_params(left=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
