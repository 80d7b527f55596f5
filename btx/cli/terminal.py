"""Plain replacements for characters that the output's encoding lacks, instead of a traceback."""

from __future__ import annotations

import codecs
import sys
from typing import cast

PLAIN = {
    "·": "*", "×": "x", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "≈": "~", "Σ": "sum",
    "‘": "\'", "’": "\'", "“": '"', "”": '"', "ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss",
}  # fmt: skip
HANDLER = "btx-plain"


def plain_where_needed() -> None:
    """Make stdout and stderr replace characters that their encoding (ASCII, Latin-1, ...) lacks."""
    codecs.register_error(HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors=HANDLER)


def _plain(error: UnicodeError) -> tuple[str, int]:
    lost = cast(UnicodeEncodeError, error)
    signs = lost.object[lost.start : lost.end]
    return "".join(PLAIN.get(sign, "?") for sign in signs), lost.end
