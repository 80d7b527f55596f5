"""The page of a report: one HTML file with its pictures in it; no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import Any

from btx.report.charts import INK
from btx.report.figures import probe_tables


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
        for d, r in results["routing"][results["exported"]].items()
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
{further}<h2>Routing per layer, {escape(results["exported"])}</h2>
{_html_table(["text", "layer", *results["experts"], "entropy / log E"], layers)}
<h2>Held-out text ({results["split"]})</h2>{_html_table(["domain", "documents", "sources", "tokens", "bytes"], held)}
</body></html>
"""
