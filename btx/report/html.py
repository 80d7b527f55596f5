"""What the pages share: one self-contained file, light and dark, for phones and for paper; no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from btx.report.charts import FAINT, INK, PAPER

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #5f5f5f; --paper: #ffffff; --line: #d9d9d9; --tint: #f4f4f2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --faint: #a3a3a0; --paper: #161616; --line: #3a3a3a; --tint: #222221 }
}
@media print {
  :root { --ink: #000; --faint: #444; --paper: #fff; --line: #bbb; --tint: #fff }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, Helvetica, Arial, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem }
p { max-width: 46rem; margin: .5rem 0 }
.answer { font-size: 1.15rem; background: var(--tint); border-left: .3rem solid #4477aa; padding: .75rem 1rem }
.note { color: var(--faint); font-size: .92rem }
.wide { overflow-x: auto; margin: .5rem 0 1rem }
.wide:focus-visible, figure:focus-visible { outline: 2px solid #4477aa; outline-offset: 2px }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
th { font-weight: 600; color: var(--faint) }
tr:last-child td { border-bottom: 0 }
figure { margin: .75rem 0 1.25rem; overflow-x: auto }
svg { max-width: 100%; min-width: min(34rem, 150vw); height: auto; display: block }
.tokens { max-width: 60rem; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1rem 0 0 }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .25rem }
code { font-size: .9em; overflow-wrap: anywhere }
"""


def document(title: str, body: str) -> str:
    """A whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<main>
{body}
</main>
</body></html>
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table of text that scrolls by itself where the page is narrow, also by keyboard."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">{inner}</div>'


def figure(svg: str) -> str:
    """A chart whose ink and paper are the page's."""
    for colour, name in ((INK, "ink"), (FAINT, "faint"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    return f'<figure tabindex="0">{svg}</figure>'
