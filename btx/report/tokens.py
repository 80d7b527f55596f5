"""Sample texts whose tokens are coloured by the expert that most layers send them to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from btx.report.charts import COLOURS


def token_view(rows: Sequence[Mapping[str, Any]], pieces: Mapping[int, str], experts: Sequence[str]) -> str:
    """HTML of the rows of the probe `token_routing`: a paragraph per text; what each layer chose shows on hover."""
    texts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        texts.setdefault((row["domain"], row["document"]), []).append(row)
    key = " ".join(_span(name, n, "") for n, name in enumerate(experts))
    shown = "".join(
        f"<h3>{escape(domain)}</h3><p class='tokens'>{''.join(_token(row, pieces, experts) for row in text)}</p>"
        for (domain, _), text in texts.items()
    )
    return f"<p class='tokens'>{key}</p>{shown}"


def _token(row: Mapping[str, Any], pieces: Mapping[int, str], experts: Sequence[str]) -> str:
    counts = Counter(row["experts"])
    most = min(counts, key=lambda expert: (-counts[expert], expert))
    told = ", ".join(f"{experts[expert]} {count}" for expert, count in counts.most_common())
    layers = " ".join(f"{layer}:{experts[expert]}" for layer, expert in enumerate(row["experts"]))
    return _span(pieces[row["id"]], most, f"{told} of {len(row['experts'])} layers; {layers}")


def _span(text: str, expert: int, told: str) -> str:
    title = f' title="{escape(told, quote=True)}"' if told else ""
    return f'<span style="background:{COLOURS[expert % len(COLOURS)]}55"{title}>{escape(text)}</span>'
