"""Pictures of a report as plain SVG, and the page that holds them; no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import Any

from btx.report.figures import probe_tables

CELL_W, CELL_H, LEFT, TOP = 92, 30, 130, 62
INK, PAPER, FAINT = "#1a1a1a", "#ffffff", "#6b6b6b"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{weight}>'
        f"{escape(text)}</text>"
    )


def _shade(t: float, low: tuple[int, int, int], high: tuple[int, int, int]) -> str:
    mixed = [round(a + (b - a) * max(0.0, min(1.0, t))) for a, b in zip(low, high, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _grid(title: str, note: str, rows: list[str], columns: list[str], cells: list[list[tuple[str, str, bool]]]) -> str:
    """A labelled grid; a cell is (text, background, bold)."""
    width, height = LEFT + CELL_W * len(columns) + 12, TOP + CELL_H * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        _text(10, 20, title, size=15, bold=True),
        _text(10, 36, note, size=11, fill=FAINT),
    ]
    for c, name in enumerate(columns):
        parts.append(_text(LEFT + CELL_W * (c + 0.5), TOP - 8, name, anchor="middle", fill=FAINT, size=12))
    for r, name in enumerate(rows):
        y = TOP + CELL_H * r
        parts.append(_text(LEFT - 10, y + 20, name, anchor="end"))
        for c, (text, fill, bold) in enumerate(cells[r]):
            x = LEFT + CELL_W * c
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_W - 2}" height="{CELL_H - 2}" rx="3" fill="{fill}"/>'
            )
            parts.append(_text(x + CELL_W / 2, y + 20, text, anchor="middle", bold=bold))
    return "\n".join([*parts, "</svg>"]) + "\n"


def matrix_svg(results: dict[str, Any]) -> str:
    """Bits per byte, model by domain; the colour says how much better or worse than the seed."""
    table, mean = results["bits_per_byte"], results["mean"]
    columns = [*next(iter(table.values())), "mean"]
    values = {m: [*row.values(), mean[m]] for m, row in table.items()}
    spread = max(abs(v - s) for row in values.values() for v, s in zip(row, values["seed"], strict=True)) or 1.0
    best = [min(row[c] for row in values.values()) for c in range(len(columns))]
    cells = []
    for row in values.values():
        cells.append(
            [(f"{v:.3f}", _against(v - s, spread), v == b) for v, s, b in zip(row, values["seed"], best, strict=True)]
        )
    note = "lower is better; blue: better than the seed, red: worse; bold: best of its column"
    return _grid("Bits per byte on held-out text", note, list(values), columns, cells)


def _against(difference: float, spread: float) -> str:
    white = (247, 247, 247)
    return _shade(abs(difference) / spread, white, (120, 170, 220) if difference < 0 else (235, 140, 120))


def routing_svg(results: dict[str, Any]) -> str:
    """Share of the tokens' choices per expert and domain in the finetuned model, mean over layers."""
    found = results["routing"]["finetuned"]
    top = max(x for r in found.values() for x in r["mean"])
    cells = [
        [(f"{x:.1%}", _shade(x / top, (247, 247, 247), (130, 190, 140)), False) for x in r["mean"]]
        for r in found.values()
    ]
    return _grid(
        "Routing of the finetuned model",
        "share of the tokens' choices, mean over layers; rows: held-out text",
        list(found),
        results["experts"],
        cells,
    )


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _span(ends: list[float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def page(title: str, results: dict[str, Any], pictures: dict[str, str]) -> str:
    """A page of its own: pictures, intervals, routing per layer, held-out sizes, costs."""
    intervals = [
        [m, d, f"{results['bits_per_byte'][m][d]:.4f}", _span(span), _span(results["difference_from_seed_95"][m][d])]
        for m, row in results["interval_95"].items()
        for d, span in row.items()
    ]
    layers = [
        [d, r["routers"][n], *(f"{x:.1%}" for x in load), f"{r['entropy'][n]:.3f}"]
        for d, r in results["routing"]["finetuned"].items()
        for n, load in enumerate(r["layers"])
    ]
    costs = [
        [n, f"{c['tokens']:,}", f"{c['steps']:,}", f"{c['parameters']:,}", f"{c['training_flops']:.3g}"]
        for n, c in results["cost"].items()
    ]
    held = [
        [d, str(h["documents"]), str(h["sources"]), f"{h['tokens']:,}", f"{h['bytes']:,}"]
        for d, h in results["held_out"].items()
    ]
    further = "".join(
        f"<h2>{escape(probe.replace('_', ' ').capitalize())}</h2>{_html_table(head, rows)}\n"
        for probe, (head, rows) in probe_tables(results).items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; color: {INK}; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem }}
td, th {{ padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto; display: block; margin: 1rem 0 }}
</style></head><body>
<h1>{escape(title)}</h1>
{"".join(pictures.values())}
<h2>What it cost</h2>{_html_table(["training", "tokens", "steps", "parameters", "FLOPs (6 · active · tokens)"], costs)}
<h2>95 % intervals, bootstrap over source documents</h2>
{_html_table(["model", "domain", "bits per byte", "interval", "less the seed's, paired"], intervals)}
{further}<h2>Routing per layer, finetuned</h2>
{_html_table(["text", "layer", *results["experts"], "entropy / log E"], layers)}
<h2>Held-out text ({results["split"]})</h2>{_html_table(["domain", "documents", "sources", "tokens", "bytes"], held)}
</body></html>
"""
