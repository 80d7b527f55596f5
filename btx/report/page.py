"""The page of a report: its pictures, intervals, routing per layer, held-out sizes and costs."""

from __future__ import annotations

from html import escape
from typing import Any

from btx.claims.registry import judged
from btx.report.claims import section, summary
from btx.report.figures import contamination, policy_table, probe_tables, task_tables
from btx.report.html import document, figure, table


def _span(ends: list[float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def page(title: str, results: dict[str, Any], pictures: dict[str, str], texts: str = "") -> str:
    """The whole page; `texts` is HTML of sample texts, if the recipe asked for them."""
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
    lineage = [[label, one["folder"], one["digest"][:16]] for label, one in results["lineage"].items()]
    further = "".join(
        f"<h2>{escape(probe.replace('_', ' ').capitalize())}</h2>{table(head, rows, probe)}\n"
        for probe, (head, rows) in probe_tables(results).items()
    )
    tasks = "".join(
        f"<h2>Task {escape(task)}</h2>{table(head, [row + [''] * (len(head) - len(row)) for row in rows], task)}\n"
        for task, (head, rows) in task_tables(results).items()
    ) + "".join(f"<p>{escape(sentence)}</p>\n" for sentence in contamination(results))
    claims = judged(results)
    head, policies = policy_table(results)
    if policies:
        further += f"<h2>Policies, on held-out items</h2>{table(head, policies, 'policies')}\n"
    return document(
        title,
        f"""<h1>{escape(title)}</h1>
{summary(claims)}{"".join(map(figure, pictures.values()))}
<h2>What it cost</h2>
{table(["training", "tokens", "steps", "parameters", "FLOPs (6 · active · tokens)"], costs, "what it cost")}
<h2>95 % intervals, bootstrap over source documents</h2>
{table(["model", "domain", "bits per byte", "interval", "less the seed's, paired"], intervals, "intervals")}
{section(claims)}{tasks}{further}{f"<h2>Tokens by expert</h2>{texts}" if texts else ""}
<h2>Routing per layer, {escape(results["exported"])}</h2>
{table(["text", "layer", *results["experts"], "entropy / log E"], layers, "routing per layer")}
<h2>Lineage</h2>
{table(["model", "folder", "SHA-256"], lineage, "lineage")}
<h2>Held-out text ({results["split"]})</h2>
{table(["domain", "documents", "sources", "tokens", "bytes"], held, "held-out text")}""",
    )
