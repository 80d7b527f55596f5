"""The page of a comparison: the answer, then the table, the pictures, the tax, the decomposition, rates and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from btx.recipe.compare_settings import MEAN
from btx.report.comparison import mean
from btx.report.comparison_charts import colours_of, compute_svg, forest_svg
from btx.report.comparison_console import gap
from btx.report.comparison_console import table as arms_table
from btx.report.figures import human
from btx.report.html import document, figure, table


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    title = f"{results['title']}: what the conversion cost"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="answer">{escape(results["answer"])}</p>', _protocol(results)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in results["notes"]]
    for budget in sorted({run["budget"] for run in results["runs"]}):
        parts.append(_budget(results, budget))
    seeds = [mean(one["bits_per_byte"]) for one in results["seeds"].values()]
    parts.append(figure(compute_svg(results["runs"], sum(seeds) / len(seeds), colours_of(results["runs"]))))
    parts += [_tax(results), _decomposition(results), _choices(results), _lineage(results)]
    return document(title, "\n".join(part for part in parts if part))


def _protocol(results: Mapping[str, Any]) -> str:
    blocks = len(results["seeds"])
    documents = escape(", ".join(f"{domain} {count:,}" for domain, count in results["documents"].items()))
    made = all(one["tokens"] for one in results["seeds"].values())
    each = (
        "a seed model with its own draws" if made else "the same seed with its own draws, which says nothing of others"
    )
    return (
        f'<p class="note">Scored on the {results["split"]} split in {results["precision"]}; rates chosen on select, on '
        f"the first block. {blocks} block{'s' * (blocks > 1)}: each {each}, by which "
        "differences are paired; intervals are Student's t over blocks. Mean: over the domains, each counted once. "
        f"Held-out documents: {documents}. Lower is better.</p>"
    )


def _budget(results: dict[str, Any], budget: int) -> str:
    said = results["budgets"][budget]
    head, rows = arms_table(results, budget)
    verdicts = [one for one in results["verdicts"] if one["budget"] == budget]
    found = f"<h2>{escape(said)} after the seed</h2>\n{table(head, rows, f'arms at {said}')}\n"
    if not verdicts:
        return found
    return found + figure(forest_svg(verdicts, results["control"], colours_of(results["runs"])))


def _tax(results: Mapping[str, Any]) -> str:
    if not results["tax"]:
        return ""
    domains = list(results["tax"][0]["domains"])
    rows = [
        [
            one["arm"], f"{one['budget'] + 1}", *(gap(one["domains"][d]) for d in domains), gap(one[MEAN]),
            ", ".join(_equivalent(found) for found in one["equivalent"]),
        ]
        for one in results["tax"]
    ]  # fmt: skip
    head = ["arm", "budget", *domains, "mean", "equivalent compute, by block"]
    return (
        "<h2>The tax</h2><p>Bits per byte less those of training from scratch "
        f"({escape(results['scratch'])}): below zero, the seed's weights were worth having. Equivalent compute: the "
        "FLOPs at which scratch reaches the same loss, over those that the conversion took after its seed (and over "
        "both together); only between runs that were made, else a bound.</p>" + table(head, rows, "the tax")
    )


def _equivalent(found: Mapping[str, Any]) -> str:
    sign = {"=": "", "<": "less than ", ">": "more than "}[found["sign"]]
    total = f" ({found['of_total']:.2f})" if found["of_total"] else ""
    return f"{sign}{found['of_conversion']:.2f}{total}"


def _decomposition(results: Mapping[str, Any]) -> str:
    rows = [
        [one["arm"], f"{one['budget'] + 1}", f"{term['from']} → {term['to']}", f"{term['change']:+.3f}"]
        for one in results["decomposition"] for term in one["terms"]
    ]  # fmt: skip
    if not rows:
        return ""
    return (
        "<h2>Where a merge gains and loses</h2><p>Changes of the mean bits per byte along the way, averaged over "
        "blocks; they sum to the whole. On each domain the best expert counts, as a rule its own.</p>"
        + table(["arm", "budget", "step", "change"], rows, "decomposition")
    )


def _choices(results: Mapping[str, Any]) -> str:
    rows = []
    for one in results["choices"]:
        for stage in ("screened", "confirmed"):
            rows += [
                [
                    one["arm"],
                    f"{one['tokens']:,}",
                    rates,
                    stage,
                    f"{loss:.4f}",
                    "chosen" if rates == one["chosen"] else "",
                ]
                for rates, loss in sorted(one[stage].items(), key=lambda found: [*map(float, found[0].split("/"))])
            ]
        rows += [[one["arm"], f"{one['tokens']:,}", rates, "", "diverged", ""] for rates in one["diverged"]]
    several = len(results["budgets"]) > 1
    of = [f"{one['arm']} at {one['tokens']:,}" if several else str(one["arm"]) for one in results["choices"]]
    edges = [name for name, one in zip(of, results["choices"], strict=True) if one["edge"]]
    told = f"<p>The optimum lies at the edge of what was tried: {escape(', '.join(edges))}.</p>" if edges else ""
    lost = [f"{one['arm']} diverged {one['where']}, at {one['tokens']:,} tokens." for one in results["lost"]]
    told += f"<p>{escape(' '.join(lost))}</p>" if lost else ""
    spent = ", ".join(f"{name}: {one['equivalents']:g}" for name, one in zip(of, results["choices"], strict=True))
    body = table(["arm", "tokens", "rates", "", "mean bits per byte, select", ""], rows, "rates tried")
    return (
        f"<h2>Rates</h2>{told}<p>Full runs that each search came to: {escape(spent)}.</p>"
        f"<details><summary>All {len(rows)} trials</summary>{body}</details>"
    )


def _lineage(results: Mapping[str, Any]) -> str:
    rows = [
        [
            run["arm"], str(run["block"]), f"{run['cost']['tokens']:,}", f"{run['cost']['steps']:,}",
            human(run["cost"]["flops"]), f"{run['cost']['path_steps']:,}", human(run["cost"]["path_flops"]),
            f"{run['parameters']:,}" if run["parameters"] else "", run["model"], run["digest"][:12],
        ]
        for run in results["runs"]
    ]  # fmt: skip
    head = ["arm", "block", "tokens", "steps", "FLOPs", "path steps", "path FLOPs", "parameters", "folder", "SHA-256"]
    return (
        "<h2>What it cost, and which folders</h2><p>The path is the longest chain of trainings, which the fastest set "
        f"of machines still does one after another.</p>{table(head, rows, 'costs and lineage')}"
    )
