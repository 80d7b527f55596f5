"""The rule that holds out documents, as test or as select.

The side of a document is a function of the SHA-256 of its *source document*: a record, or a whole .txt file, whose
pieces are not independent of each other. So equal texts are always on one side, and the order of files does not matter.

Held out are the hashes below the recipe's share and, where these are few, the next smallest ones: up to LEAST per side,
but at most a fifth of the source documents per side, so that at least three fifths are trained on (the recipe's share
may take more). What the share holds out stays held out when documents are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from btx.data.documents import Document
from btx.recipe.settings import DataSettings

Side = Literal["test", "select"]
SIDES: tuple[Side, ...] = get_args(Side)
LEAST = 30  # documents per side, where enough can be spared
FIFTH = 5
FEW = 10  # source documents per side: with fewer, their pieces are split instead
_WHOLE = 2**128  # ranks lie below


def _bound(share: float) -> int:
    return int(share * _WHOLE)


@dataclass
class _Smallest:
    """The `size` smallest distinct numbers of a stream."""

    size: int
    numbers: set[int] = field(default_factory=set)

    def add(self, number: int) -> None:
        self.numbers.add(number)
        if len(self.numbers) > 4 * self.size:
            self.numbers = set(self.sorted())

    def sorted(self) -> list[int]:
        return sorted(self.numbers)[: self.size]


class _Ranks:
    """What sets the bounds: the smallest ranks on both sides of the share, and the number of distinct ones, capped at
    what matters."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.below, self.above = _Smallest(LEAST), _Smallest(2 * LEAST)
        self.distinct: set[int] = set()

    def add(self, number: int) -> None:
        (self.below if number < self.share else self.above).add(number)
        if len(self.distinct) < FIFTH * LEAST:
            self.distinct.add(number)

    def bounds(self, select: int) -> tuple[int, int]:
        """Ranks below the first are test, those from there to below the second select; `select` ends its share."""
        count = len(self.distinct)
        lacking = min(LEAST, max(count // FIFTH, 1)) - len(self.below.sorted())
        rest = self.above.sorted()
        test = self.share
        if 0 < lacking <= len(rest):
            test, rest = rest[lacking - 1] + 1, rest[lacking:]
        end = max(select, test)
        if select > self.share:
            wanted = min(LEAST, max(count // FIFTH, int(count >= 3)))
            if sum(r < end for r in rest) < wanted <= len(rest):
                end = rest[wanted - 1] + 1
        return test, end


class _Survey:
    """One pass over a domain: ranks of its source documents, and of the pieces of those that have several."""

    def __init__(self, share: int) -> None:
        self.sources, self.texts = _Ranks(share), _Ranks(share)
        self.hashes: dict[str, Any] = {}  # of source documents in pieces, by their name
        self.pieces: dict[str, list[int]] = {}

    def add(self, document: Document) -> int:
        number = document.rank
        self.texts.add(number)
        if document.source:
            self.pieces.setdefault(document.source, []).append(number)
            self.hashes.setdefault(document.source, hashlib.sha256()).update(document.text.encode())
        else:
            self.sources.add(number)
        return number

    def close(self) -> dict[str, int]:
        """Ranks of the source documents in pieces, by name."""
        ranks = {name: int.from_bytes(done.digest()[:16]) for name, done in self.hashes.items()}
        for number in ranks.values():
            self.sources.add(number)
        return ranks


@dataclass(frozen=True)
class Plan:
    """Which documents are held out: by bounds of their rank, and by the rank of the pieces of held-out sources."""

    share: int  # ranks below it are held out in every domain
    test: int
    select: int
    pieces: dict[int, Side]
    topped: frozenset[int]  # held out beyond the share
    by_piece: bool  # too few sources to split: pieces of one file are on several sides
    sources: int  # distinct source documents, capped at what matters
    names: dict[str, int] = field(default_factory=dict)  # source document in pieces -> rank of its content

    def side(self, document: Document) -> Side | None:
        """The side on which a document of this domain is held out."""
        number = document.rank
        if number in self.pieces:
            return self.pieces[number]
        return None if document.source and not self.by_piece else self.side_of(number)

    def side_of(self, number: int) -> Side | None:
        """The side of a source document."""
        return "test" if number < self.test else "select" if number < self.select else None

    def keeps(self, document: Document) -> bool:
        """Whether this plan holds out a document of another domain that shares files with this one."""
        number = document.rank
        whole = not document.source or self.by_piece
        return number in self.pieces or number in self.topped or (whole and number < self.share)


def plan(documents: Iterable[Document], settings: DataSettings, *, pieced: bool) -> Plan:
    """The rule for a domain, from one pass over its documents; nothing is held out under `holdout: 0`.

    `pieced` says whether some sources come in pieces: the ranks of all whole documents that may be held out are kept
    then, since a piece may be equal to one.
    """
    share, end = _bound(settings.holdout), _bound(settings.holdout + settings.select)
    survey, whole = _Survey(share), set[int]()
    for document in documents:
        number = survey.add(document)
        if pieced and not document.source and number < end:
            whole.add(number)
    names = survey.close()
    count, texts = len(survey.sources.distinct), len(survey.texts.distinct)
    by_piece = count // FIFTH < FEW and texts > count
    if not settings.holdout:
        return Plan(0, 0, 0, {}, frozenset(), by_piece, count)
    ranks = survey.texts if by_piece else survey.sources
    test, select = ranks.bounds(end)
    topped = frozenset(r for r in ranks.above.sorted() if end <= r < select)
    made = Plan(end, test, select, {}, topped, by_piece, count, names)
    if names and not by_piece:
        made.pieces.update(_held_pieces(made, names, survey, whole))
    return made


def halves(documents: Iterable[Document], settings: DataSettings) -> Plan:
    """The rule for a domain's own held-out files: the half with the smaller hashes is test; all under `select: 0`."""
    survey, whole = _Survey(0), set[int]()
    for document in documents:
        number = survey.add(document)
        if not document.source:
            whole.add(number)
    names = survey.close()
    count, texts = len(survey.sources.distinct), len(survey.texts.distinct)
    by_piece = bool(settings.select) and count // 2 < FEW and texts > count
    ranks = sorted((survey.texts if by_piece else survey.sources).distinct)
    middle = _WHOLE // 2 if len(ranks) >= FIFTH * LEAST else ranks[(len(ranks) - 1) // 2] + 1 if ranks else 0
    made = Plan(0, middle if settings.select else _WHOLE, _WHOLE, {}, frozenset(), by_piece, count, names)
    if names and not by_piece:
        made.pieces.update(_held_pieces(made, names, survey, whole))
    return made


def _held_pieces(made: Plan, names: dict[str, int], survey: _Survey, whole: set[int]) -> dict[int, Side]:
    """Ranks of all held-out documents of a domain with source documents in pieces; test wins over select."""
    found: dict[int, Side] = {}
    for side in reversed(SIDES):
        for name, number in names.items():
            if made.side_of(number) == side:
                found |= dict.fromkeys(survey.pieces[name], side)
        found |= {n: side for n in {*whole, *made.topped} if made.side_of(n) == side}
    return found
