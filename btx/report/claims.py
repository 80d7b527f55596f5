"""Claims about conversions in a report: a row per system, which opens the page, and a section for each below."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from btx.claims.contract import Claim, Finding
from btx.report.figures import human
from btx.report.html import table

TITLE = "Claims, as far as this run tests them"
HEAD = ["system", "gain", "forgetting", "cost", "its claim, at this size"]


def rows(found: Sequence[tuple[Claim, Finding]]) -> list[list[str]]:
    """A row per system, under HEAD."""
    return [[claim.system, one.gain, one.forgetting, _cost(one), one.verdict] for claim, one in found]


def lines(found: Sequence[tuple[Claim, Finding]]) -> list[str]:
    """A line per system, which says the same."""
    return [
        f"{row[0]}: {'; '.join(f'{name} {cell}' for name, cell in zip(HEAD[1:4], row[1:4], strict=True))}; "
        f"{HEAD[4]}: {row[4]}"
        for row in rows(found)
    ]


def _cost(finding: Finding) -> str:
    if not finding.cost["steps"]:
        return "nothing trained"
    return f"{human(finding.cost['flops'])} FLOPs, {finding.cost['path_steps']:,} steps"


def summary(found: Sequence[tuple[Claim, Finding]]) -> str:
    """HTML of the rows of the claims that a run tested, if there are any."""
    return f"<h2>{TITLE}</h2>{table(HEAD, rows(found), 'claims by system')}\n" if found else ""


def section(found: Sequence[tuple[Claim, Finding]]) -> str:
    """HTML of each claim that a run tested: what was claimed, what the source says, what was measured."""
    parts = [
        f"<h3>{escape(claim.system)}: {one.verdict}</h3><p><b>Claimed.</b> {escape(claim.claimed)}</p>"
        f"<p><b>The source.</b> {escape(claim.source)}</p><p><b>Measured in this run.</b> {escape(one.measured)}</p>"
        for claim, one in found
    ]
    return "\n".join(["<h2>What was claimed, and what was measured</h2>", *parts, ""]) if parts else ""
