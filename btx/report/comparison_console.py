"""What `btx compare` prints at its end: the answer, a row per arm, and where the page is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from btx.recipe.compare_settings import MEAN
from btx.report.comparison import mean
from btx.report.console import near, plain_table
from btx.report.figures import human, human_count

COST = ("tokens", "FLOPs", "critical path", "rates")


def show(folder: Path, short: Path) -> None:
    """Print the results of a finished comparison."""
    from rich.console import Console

    results = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    console = Console()
    console.print("\n" + "\n".join([results["answer"], *results["notes"]]) + "\n", highlight=False, markup=False)
    for budget in sorted({run["budget"] for run in results["runs"]}):
        head, rows = table(results, budget)
        scores = len(head) - len(COST)
        console.print(plain_table(head[:scores], [row[:scores] for row in rows]))
        costs = [[row[0], *row[scores:]] for row in rows[1:]]  # the seed has cost nothing here
        console.print(plain_table(["arm", *COST], costs))
    console.print(f"Page: {near(short)}/comparison.html", soft_wrap=True, highlight=False)


def table(results: dict[str, Any], budget: int) -> tuple[list[str], list[list[str]]]:
    """A head and a row of text per arm at a budget: means over blocks; differences with their 95 % intervals."""
    domains = list(next(iter(results["seeds"].values()))["bits_per_byte"])
    verdicts = {one["arm"]: one[MEAN] for one in results["verdicts"] if one["budget"] == budget}
    head = ["arm", *domains, "mean", f"less {results['control']}", *COST]
    seeds = [one["bits_per_byte"] for one in results["seeds"].values()]
    rows = [["seed", *_means(seeds, domains), "", "", "", "", ""]]
    for arm in dict.fromkeys(run["arm"] for run in results["runs"] if run["budget"] == budget):
        own = [run for run in results["runs"] if (run["arm"], run["budget"]) == (arm, budget)]
        cost = own[0]["cost"]
        rows.append([
            arm, *_means([run["bits_per_byte"] for run in own], domains), gap(verdicts.get(arm)),
            human_count(cost["tokens"]), human(cost["flops"]),
            f"{cost['path_steps']:,} steps, {human(cost['path_flops'])}", "/".join(f"{x:g}" for x in own[0]["rates"]),
        ])  # fmt: skip
    for one in results["lost"]:
        if one["budget"] == budget:
            rates = "/".join(f"{rate:g}" for rate in one["rates"])
            rows.append([one["arm"], *("" for _ in domains), "", f"diverged {one['where']}", "", "", "", rates])
    return head, rows


def _means(bits: list[dict[str, float]], domains: list[str]) -> list[str]:
    count = len(bits)
    each = [math.fsum(one[d] for one in bits) / count for d in domains]
    return [f"{x:.3f}" for x in (*each, math.fsum(map(mean, bits)) / count)]


def gap(verdict: dict[str, Any] | None) -> str:
    """A difference with its interval, and a word where there is one."""
    if verdict is None:
        return ""
    if verdict["low"] is None:
        return f"{verdict['difference']:+.3f} (one block)"
    half = (verdict["high"] - verdict["low"]) / 2
    return f"{verdict['difference']:+.3f} ±{half:.3f} {verdict['word']}"
