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

    Where that is too wide to read, a row per domain and number, a column per model; where that is too, a table per
    domain.
    """
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    for probe, found in results.get("probes", {}).items():
        head, rows = _probe_table(found)
        if len(head) > WIDE and len(rows) >= WIDE:
            domains = dict.fromkeys(domain for one in found.values() if not _missing(one) for domain in one)
            tables |= {f"{probe}: {domain}": _probe_table(_of_domain(found, domain)) for domain in domains}
        else:
            tables[probe] = _turned(head, rows) if len(head) > WIDE else (head, rows)
    return tables


def _of_domain(found: dict[str, dict[str, Any]], domain: str) -> dict[str, dict[str, Any]]:
    """The results of a probe on one domain, whose numbers then need its name no more."""
    return {model: numbers if _missing(numbers) else {"": numbers.get(domain, {})} for model, numbers in found.items()}


def _turned(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table with its rows as columns; a row that has no numbers but a reason stays one, at the end."""
    whole = [row for row in rows if len(row) == len(head)]
    columns = [[name, *(row[n] for row in whole)] for n, name in enumerate(head)]
    return ["number", *columns[0][1:]], [*columns[1:], *([": ".join(row)] for row in rows if row not in whole)]


def task_tables(results: dict[str, Any], *, intervals: bool = True) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The results of each task as header and rows, in percent: a row per model; without `intervals` for a terminal.

    Lost are the items that the seed has right and the model wrong, won the reverse. Of items with label spaces also
    how many answers are labels, how many of those are right, and what a random guess would have right.
    """
    found = results.get("tasks", {})
    return {task: (_task_head(one, intervals), _task_rows(one, intervals)) for task, one in found.items()}


def _task_head(found: dict[str, Any], intervals: bool) -> list[str]:
    labelled = any("compliance" in numbers for numbers in found["models"].values())
    among, guess = ("% right of those", "% right by chance") if intervals else ("% of those", "by chance")
    more = ["% labels", among, guess] if labelled else []
    share, change = ("%, 95 % interval", "less the seed's, paired") if intervals else ("%", "- seed")
    return ["model", "right", share, *more, change, "lost", "won"]


def _task_rows(found: dict[str, Any], intervals: bool) -> list[list[str]]:
    rows = []
    for model, numbers in found["models"].items():
        span = f" ({_percents(numbers['interval_95'])})" if intervals else ""
        joint = " of " if intervals else "/"
        row = [model, f"{numbers['right']}{joint}{numbers['items']}", f"{100 * numbers['accuracy']:.1f}{span}"]
        if "compliance" in numbers:
            among = numbers["accuracy_of_compliant"]
            row += [f"{100 * numbers['compliance']:.1f}", "none" if among is None else f"{100 * among:.1f}",
                    f"{100 * numbers['chance']:.1f}"]  # fmt: skip
        if change := found["from_seed"].get(model):
            span = f" ({_percents(change['interval_95'])})" if intervals else ""
            row += [f"{100 * change['difference']:+.1f}{span}",
                    str(change["right_to_wrong"]), str(change["wrong_to_right"])]  # fmt: skip
        rows.append(row)
    return rows


def _percents(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def policy_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What reinforcement changed on items that it did not train on: a row per policy, before → after its run."""
    head = ["policy", "% right", "entropy of formats", "ECE of stated confidence", "tokens"]
    return head, [
        [
            name, _change(one, "accuracy", "{:.1%}"), _change(one, "entropy", "{:.2f}"),
            _change(one, "stated_ece", "{:.2f}"), _change(one, "tokens", "{:.1f}"),
        ]
        for name, one in results.get("policies", {}).items()
    ]  # fmt: skip


def _change(policy: dict[str, dict[str, float]], number: str, how: str) -> str:
    first, last = (policy[end].get(number) for end in ("first", "last"))
    return " → ".join("none" if value is None else how.format(value) for value in (first, last))


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
        [model, *([_missing(numbers)] if _missing(numbers) else [_shown(numbers, *column) for column in columns])]
        for model, numbers in found.items()
    ]
    names = [
        name.replace("_", " ") if not domain else f"{domain}: {name.replace('_', ' ')}" for domain, name in columns
    ]
    return ["model", *names], rows


def _shown(numbers: dict[str, dict[str, float]], domain: str, name: str) -> str:
    value = numbers.get(domain, {}).get(name)
    return "none" if value is None else f"{value:.4g}"


def _missing(numbers: dict[str, Any]) -> str:
    """Why a model has no result; empty if it has one."""
    return next((f"{key}: {said}" for key, said in numbers.items() if isinstance(said, str)), "")
