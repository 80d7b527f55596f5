"""Charts as self-contained SVG, drawn by matplotlib: text stays text, and the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
CELL_INK = "#1b1b1b"  # of text on a coloured cell, which stays dark where a page turns INK light
CELL, EDGE = (0.98, 0.34), 0.14  # inches
FONTS = "system-ui, Helvetica, Arial, sans-serif"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "btx", "font.family": "DejaVu Sans", "text.color": INK,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "text.parse_math": False,
}  # fmt: skip
COLOURS = (
    "#4477aa",
    "#cc6677",
    "#228833",
    "#aa8800",
    "#66aacc",
    "#aa3377",
    "#888888",
    "#117755",
)  # of lines and points
WIDTH = 7.6  # inches of a chart that is not a table
AGAINST = LinearSegmentedColormap.from_list("against", ["#78aadc", "#f7f7f7", "#eb8c78"])  # better, equal, worse
SHARE = LinearSegmentedColormap.from_list("share", ["#f7f7f7", "#82be8c"])


@dataclass(frozen=True)
class Grid:
    """A table whose cells are coloured: `colours` are RGBA in [0, 1], `bold` marks the cells to look at."""

    title: str
    note: str
    rows: Sequence[str]
    columns: Sequence[str]
    texts: Sequence[Sequence[str]]
    colours: Any  # (rows, columns, 4)
    bold: Any  # (rows, columns) of bool


def matrix_svg(results: dict[str, Any]) -> str:
    """Bits per byte, model by domain; the colour says how much better or worse than the seed."""
    table, mean = results["bits_per_byte"], results["mean"]
    values = np.array([[*row.values(), mean[model]] for model, row in table.items()])
    against = values - values[list(table).index("seed")]
    spread = float(np.abs(against).max()) or 1.0
    return drawn(Grid(
        "Bits per byte on held-out text", "lower is better; blue: better than the seed, red: worse; bold: best of its "
        "column", list(table), [*next(iter(table.values())), "mean"], [[f"{v:.3f}" for v in row] for row in values],
        AGAINST(TwoSlopeNorm(0, -spread, spread)(against)), values == values.min(axis=0),
    ))  # fmt: skip


def routing_svg(results: dict[str, Any]) -> str:
    """Share of the routed tokens per expert and domain in the exported model, mean over layers."""
    name = results["exported"]
    found = results["routing"][name]
    shares = np.array([one["mean"] for one in found.values()])
    return drawn(Grid(
        f"Routing of the {name} model", "share of the tokens' choices, mean over layers; rows: held-out text",
        list(found), results["experts"], [[f"{x:.1%}" for x in row] for row in shares],
        SHARE(shares / shares.max()), np.zeros(shares.shape, bool),
    ))  # fmt: skip


def drawn(grid: Grid) -> str:
    """The SVG of a grid, as wide as its labels and columns."""
    left = 0.1 * max(map(len, grid.rows)) + 2 * EDGE
    top = 0.82
    width = max(left + CELL[0] * len(grid.columns) + EDGE, 0.085 * len(grid.note) + EDGE)
    height = top + CELL[1] * len(grid.rows) + EDGE
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        head(figure, grid.title, grid.note)
        axes = figure.add_axes((
            left / width, EDGE / height, CELL[0] * len(grid.columns) / width, CELL[1] * len(grid.rows) / height
        ))  # fmt: skip
        _cells(axes, grid)
        return svg_of(figure, grid.title)


def _cells(axes: Axes, grid: Grid) -> None:
    axes.pcolormesh(np.asarray(grid.colours), edgecolors=PAPER, linewidth=2)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(len(grid.columns)) + 0.5, grid.columns, size=9, color=FAINT)
    axes.set_yticks(np.arange(len(grid.rows)) + 0.5, grid.rows, size=10, color=INK)
    axes.tick_params(left=False, top=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for r, row in enumerate(grid.texts):
        for c, text in enumerate(row):
            weight = "bold" if grid.bold[r][c] else "normal"
            axes.text(c + 0.5, r + 0.52, text, ha="center", va="center", size=10, color=CELL_INK, weight=weight)


def svg_of(figure: Figure, title: str) -> str:
    """A figure as an <svg> element, without prologue, date or names of this machine's fonts."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r" *<metadata>.*?</metadata>\n", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # several pictures in one page must not share an id
    text = re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, text)
    return text.replace(">", f' role="img"><title>{escape(title)}</title>', 1)


def head(figure: Figure, title: str, note: str, at: float | None = None) -> None:
    """A title and a line below it, at the top of a figure, or so many inches above its bottom."""
    width, height = figure.get_size_inches()
    top = height if at is None else at
    figure.text(EDGE / width, (top - 0.26) / height, title, size=12, weight="bold")
    figure.text(EDGE / width, (top - 0.47) / height, note, size=8.5, color=FAINT)


def plain(axes: Axes, grid: str) -> None:
    """Axes with a line at the bottom and faint lines across one direction, x or y."""
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)
    axes.grid(axis=grid, color=FAINT, alpha=0.25, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=FAINT, labelsize=9, left=False)
