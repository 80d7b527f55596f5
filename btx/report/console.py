"""Terminal output: the results and how to use them at the end of a run, and the tables of `btx status`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.claims.registry import judged
from btx.graph.artifact import STATES, locked, read_manifest
from btx.graph.cost import Cost
from btx.graph.step import elsewhere, undone
from btx.report.claims import TITLE, lines
from btx.report.figures import contamination, human, policy_table, probe_tables, task_tables

WIDE = 200  # columns, where no terminal limits them


def show(report: Path, export: Path) -> None:
    """Print the results of a finished run."""
    from rich.console import Console

    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    console = Console()
    console.print()
    console.print("Bits per byte on held-out text (* best)")
    console.print(matrix(results))
    for probe, (head, rows) in probe_tables(results).items():
        console.print(probe.replace("_", " "))
        for part in probe_parts(head, rows):
            console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)
    for task, (head, rows) in task_tables(results, intervals=False).items():
        console.print(f"Task {task}")
        console.print(plain_table(head, rows))
    for sentence in contamination(results):
        console.print(sentence, highlight=False)
    head, rows = policy_table(results)
    if rows:
        console.print("Policies, on held-out items: before → after")
        console.print(plain_table(head, rows))
    console.print(f"Routing of the {results['exported']} model, mean of layers")
    console.print(routing(results))
    if found := judged(results):
        console.print(TITLE)
        for line in lines(found):
            console.print(f"  {line}", soft_wrap=True, highlight=False)
    console.print(f"Report: {near(report)}/report.html", soft_wrap=True, highlight=False)
    console.print(f"Export: {near(export)}", soft_wrap=True, highlight=False)
    console.print("\nTo load and sample it:\n", highlight=False)
    for line in sample_lines(near(export)):
        console.print(f"    {line}", soft_wrap=True, highlight=False, markup=False)
    console.print()


def near(path: Path) -> str:
    """The path, relative to the working directory if it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def sample_lines(folder: str) -> list[str]:
    """Two lines of Python that load the export with transformers and sample it."""
    return [
        f'from transformers import pipeline; generate = pipeline("text-generation", model="{folder}")',
        'print(generate("Question: Tom has 12 apples and", max_new_tokens=60)[0]["generated_text"])',
    ]


def matrix(results: dict[str, Any]) -> Any:
    """Bits per byte, model by domain, the best of each column marked."""
    from rich.table import Table

    rows, mean = results["bits_per_byte"], results["mean"]
    domains = list(next(iter(rows.values())))
    best = {d: min(row[d] for row in rows.values()) for d in domains}
    table = Table()
    table.add_column("model")
    for name in (*domains, "mean"):
        table.add_column(name, justify="right")
    for model, row in rows.items():
        cells = [_cell(row[d], best[d]) for d in domains]
        table.add_row(model, *cells, _cell(mean[model], min(mean.values())))
    return table


def probe_parts(head: list[str], rows: list[list[str]]) -> list[Any]:
    """A table of the models that have numbers, and a line for each that has a reason instead."""
    whole = [row for row in rows if len(row) == len(head)]
    return [plain_table(head, whole), *(f"  {': '.join(row)}" for row in rows if row not in whole)]


def plain_table(head: list[str], rows: list[list[str]]) -> Any:
    """A table of text; a row may be shorter than the header."""
    from rich.table import Table

    table = Table()
    for n, name in enumerate(head):
        table.add_column(name, justify="right" if n else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _cell(value: float, best: float) -> str:
    return f"[bold]{value:.3f}*[/bold]" if value == best else f"{value:.3f} "


def routing(results: dict[str, Any]) -> Any:
    """Share of routing choices per expert, by domain, in the exported model."""
    from rich.table import Table

    experts = results["experts"]
    table = Table()
    table.add_column("held-out text")
    for name in experts:
        table.add_column(name, justify="right")
    for domain, found in results["routing"][results["exported"]].items():
        table.add_row(domain, *(f"{x:.1%}" for x in found["mean"]))
    return table


@dataclass(frozen=True)
class Planned:
    """The planned cost of a step; bytes of memory and disk."""

    flops: float
    memory: int
    disk: int


def status_table(graph: Any, planned: Mapping[str, Planned]) -> None:
    """Print every step with its state and folder, then its planned and actual cost."""
    from rich.console import Console
    from rich.table import Table

    states, costs = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("step", "state", "folder"):
        states.add_column(name, overflow="fold")
    for name in ("planned → actual", "FLOPs", "memory", "disk", "seconds"):
        costs.add_column(name, no_wrap=True, justify="left" if costs.columns == [] else "right")
    steps = [step for step in graph.steps.values() if step.kind != "given"]
    other: dict[str, list[str]] = {}  # labels of steps made in another environment, by what differs
    todo = {step.label for step in undone(steps)}
    for step in steps:
        state = _state(step) if step.label in todo else "done"
        states.add_row(step.label, state, near(step.folder) if step.folder.exists() else "")
        manifest = read_manifest(step.folder) if state == "done" else None
        if manifest and (differing := elsewhere(manifest, step.where)):
            other.setdefault("; ".join(differing), []).append(step.label)
        cost = Cost.read(manifest) if manifest else None
        if cost or step.label in planned:
            costs.add_row(step.label, *_beside(planned.get(step.label), cost))
    console = Console(width=None if sys.stdout.isatty() else WIDE, soft_wrap=True)
    console.print(states)
    if costs.rows:
        console.print()
        console.print(costs)
    for said, labels in other.items():
        console.print(f"\nReused, though made in another environment ({said}): {', '.join(labels)}.")


def _beside(planned: Planned | None, cost: Cost | None) -> list[str]:
    """Planned and actual FLOPs, memory and disk, and actual seconds; zeros are left blank."""
    before = _figures(planned.flops, planned.memory, planned.disk) if planned else [""] * 3
    after = _figures(cost.flops, cost.peak_memory, cost.bytes) if cost else [""] * 3
    cells = [f"{one} → {two}" if one and two else one or two for one, two in zip(before, after, strict=True)]
    return [*cells, f"{cost.wall_seconds:,.0f}" if cost else ""]


def _figures(flops: float, memory: int, disk: int) -> list[str]:
    return [f"{flops:.2g}" if flops else "", *(human(size, "B") if size else "" for size in (memory, disk))]


def _state(step: Any) -> str:
    if locked(step.lock_file):
        return "under way"
    if step.exists:
        return "made from other inputs"
    if step.folder.exists():
        return "damaged"
    if saved := sorted((step.work / STATES).glob("step-*")) if step.trains else []:
        return f"saved at step {int(saved[-1].name.removeprefix('step-'))}"
    return "to do"
