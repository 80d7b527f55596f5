"""Numbers for people: three significant digits and a prefix."""

from __future__ import annotations

from typing import Any

WIDE = 9  # columns of a table that fit a terminal


def human(number: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 6738415616 is "6.74G"; with the unit "B", "6.74 GB"."""
    digits, prefix = _scaled(number, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    return f"{digits} {prefix}{unit}" if unit else digits + prefix


def human_count(number: float) -> str:
    """As model sizes are written, in thousands, millions, billions, trillions: 6738415616 is "6.74B"."""
    return "".join(_scaled(number, ("", "k", "M", "B", "T")))


def _scaled(number: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    value, step = float(number), 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:  # 999.5 would round to 1000
        value, step = value / 1000, step + 1
    return f"{value:.3g}", prefixes[step]


def probe_tables(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The results of each further probe as header and rows: a row per model, a column per domain and number.

    Where that is too wide to read, a row per domain and number, a column per model.
    """
    tables = {probe: _probe_table(found) for probe, found in results.get("probes", {}).items()}
    return {probe: _turned(head, rows) if len(head) > WIDE else (head, rows) for probe, (head, rows) in tables.items()}


def _turned(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table with its rows as columns; a row that has no numbers but a reason stays one, at the end."""
    whole = [row for row in rows if len(row) == len(head)]
    columns = [[name, *(row[n] for row in whole)] for n, name in enumerate(head)]
    return ["number", *columns[0][1:]], [*columns[1:], *([": ".join(row)] for row in rows if row not in whole)]


def task_tables(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The results of each task as header and rows, in percent: a row per model.

    Lost are the items that the seed has right and the model wrong, won the reverse. Of items with label spaces also
    how many answers are labels, how many of those are right, and what a random guess would have right.
    """
    found = results.get("tasks", {})
    return {task: (_task_head(one), _task_rows(one)) for task, one in found.items()}


def _task_head(found: dict[str, Any]) -> list[str]:
    labelled = any("compliance" in numbers for numbers in found["models"].values())
    more = ["% labels", "% right of those", "% right by chance"] if labelled else []
    return ["model", "right", "%, 95 % interval", *more, "less the seed's, paired", "lost", "won"]


def _task_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for model, numbers in found["models"].items():
        row = [model, f"{numbers['right']} of {numbers['items']}",
               f"{100 * numbers['accuracy']:.1f} ({_percents(numbers['interval_95'])})"]  # fmt: skip
        if "compliance" in numbers:
            among = numbers["accuracy_of_compliant"]
            row += [f"{100 * numbers['compliance']:.1f}", "none" if among is None else f"{100 * among:.1f}",
                    f"{100 * numbers['chance']:.1f}"]  # fmt: skip
        if change := found["from_seed"].get(model):
            row += [f"{100 * change['difference']:+.1f} ({_percents(change['interval_95'])})",
                    str(change["right_to_wrong"]), str(change["wrong_to_right"])]  # fmt: skip
        rows.append(row)
    return rows


def _percents(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def contamination(results: dict[str, Any]) -> list[str]:
    """A sentence for each task and domain with whether its questions stand in the training text."""
    return [
        f"{task}: {said['found']} of {said['checked']} questions stand word for word in the training text of {domain}."
        for task, found in results.get("tasks", {}).items() for domain, said in found["contamination"].items()
        if said["found"]
    ]  # fmt: skip


def _probe_table(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    answered = [numbers for numbers in found.values() if not _missing(numbers)]
    columns = list(dict.fromkeys((domain, name) for one in answered for domain, row in one.items() for name in row))
    rows = [
        [model, *([_missing(numbers)] if _missing(numbers) else [f"{numbers[d][n]:.4g}" for d, n in columns])]
        for model, numbers in found.items()
    ]
    return ["model", *(f"{domain}: {name.replace('_', ' ')}" for domain, name in columns)], rows


def _missing(numbers: dict[str, Any]) -> str:
    """Why a model has no result; empty if it has one."""
    return next((f"{key}: {said}" for key, said in numbers.items() if isinstance(said, str)), "")
