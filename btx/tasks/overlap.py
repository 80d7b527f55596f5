"""Contamination: whether the questions of a task's items stand, word for word, in training text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 8  # tokens of a question that are looked for first; shorter questions are not looked for
EDGE = 2  # tokens at either end that the text around a question may change
PIECE = 2**22  # tokens of the text that are looked at together
PRIME = np.uint64(0x9E3779B97F4A7C15)


def inner(ids: Sequence[int]) -> list[int]:
    """A question's ids without those that its surroundings may change; empty if it is too short to be told."""
    kept = list(ids[EDGE:-EDGE])
    return kept if len(kept) >= WINDOW else []


def found_in(text: NDArray[Any], questions: Sequence[Sequence[int]]) -> set[int]:
    """The numbers of the questions (inner ids) that stand in a text of ids, whole.

    The first `WINDOW` ids of each are looked for by a rolling hash, and whatever has the hash is compared.
    """
    firsts: dict[int, list[int]] = {}
    for n, ids in enumerate(questions):
        if ids:
            firsts.setdefault(int(_hashes(np.asarray(ids[:WINDOW]))[0]), []).append(n)
    wanted = np.fromiter(firsts, np.uint64, len(firsts))
    found: set[int] = set()
    for start in range(0, max(0, len(text) - WINDOW + 1), PIECE):
        hashes = _hashes(np.asarray(text[start : start + PIECE + WINDOW - 1]))
        for at in np.flatnonzero(np.isin(hashes, wanted)):
            for n in firsts[int(hashes[at])]:
                ids, place = questions[n], start + int(at)
                if n not in found and np.array_equal(text[place : place + len(ids)], ids):
                    found.add(n)
    return found


def _hashes(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """A hash of every window of ids, modulo 2**64."""
    count = len(ids) - WINDOW + 1
    total = np.zeros(count, np.uint64)
    for n in range(WINDOW):
        total = total * PRIME + ids[n : n + count].astype(np.uint64) + np.uint64(1)
    return total
