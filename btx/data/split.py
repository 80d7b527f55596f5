"""Splits a domain's documents: those to train on, those to choose settings on (select), those to report on (test).

`btx.data.heldout` makes the rule in one pass over all files; a second pass here applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

from btx.data.corpus import BUILTIN, Counts, in_pieces, read
from btx.data.documents import Document, rank_of
from btx.data.heldout import SIDES, Plan, halves, plan
from btx.recipe.settings import DataSettings

KEPT = (
    10_000  # held-out documents stored per side, those with the smallest hashes; the others are not trained on either
)


@dataclass(frozen=True)
class Held:
    """A held-out document, cut to the part that is scored, and the rank of its source document."""

    document: Document
    source: int


class _Kept:
    """The held-out documents of one side with the smallest hashes, each text once."""

    def __init__(self, limit: int) -> None:
        self.limit, self.found = limit, dict[int, Held]()

    def add(self, document: Document, source: int) -> None:
        number = document.rank
        if number not in self.found:
            self.found[number] = Held(document.shortened(self.limit), source)
        if len(self.found) > 2 * KEPT:
            self.found = {n: self.found[n] for n in sorted(self.found)[:KEPT]}

    def sorted(self) -> list[Held]:
        """One piece of every source document in hash order, then a second piece of those that have one, and so on."""
        order: list[tuple[int, int, Held]] = []
        seen: dict[int, int] = {}
        for number in sorted(self.found)[:KEPT]:
            held = self.found[number]
            seen[held.source] = seen.get(held.source, 0) + 1
            order.append((seen[held.source], held.source, held))
        return [held for *_, held in sorted(order, key=lambda one: one[:2])]


class Split:
    """A domain's documents: those that `train` yields, and `test` and `select`, complete once `train` is exhausted.

    `valid` are its own held-out files, half of which (by hash) go to select; without them the documents of `sources`
    are split by a `Plan`. Held-out text is not trained on, also where it appears in `sources` again, nor are the
    documents of `apart`, other domains' held-out files, and those that a domain of `beside`, which shares files with
    this one, holds out of them.
    """

    def __init__(
        self, sources: list[str], valid: list[str], settings: DataSettings, *, apart: Sequence[str] = (),
        beside: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        self.counts, self.valid_counts = Counts(), Counts()
        self.left_out = 0  # documents of `sources` that are held out by a file or elsewhere
        self.sources, self.valid, self.settings = sources, valid, settings
        self.known = {d.rank for d in self._read([*valid, *apart])}
        self.beside = [self._plan(other) for other in beside]
        if valid:
            self.plan = halves(self._read(valid), settings)
        else:
            self.plan = self._plan(sources, self.known)
        self.kept = {side: _Kept(settings.valid_bytes) for side in SIDES}

    def _read(self, sources: Sequence[str], counts: Counts | None = None) -> Iterator[Document]:
        skip = self.settings.on_bad_line == "skip"
        counts = Counts() if counts is None else counts
        return read(list(sources), skip_bad=skip, counts=counts, ignore=self.settings.ignore)

    def _plan(self, sources: Sequence[str], known: Set[int] = frozenset()) -> Plan:
        documents = (d for d in self._read(sources) if d.rank not in known)
        return plan(documents, self.settings, pieced=any(map(in_pieces, sources)))

    def train(self) -> Iterator[Document]:
        """The documents to train on, in order."""
        for document in self._read(self.valid, self.valid_counts):
            self._hold(document)
        for document in self._read(self.sources, self.counts):
            if document.rank in self.known:
                self.left_out += 1
            elif self.valid or not self._hold(document):
                if any(other.keeps(document) for other in self.beside):
                    self.left_out += 1
                else:
                    yield document

    def _hold(self, document: Document) -> bool:
        side = self.plan.side(document)
        if side:
            self.kept[side].add(document, self._source(document))
        return side is not None

    def _source(self, document: Document) -> int:
        """Its source document's place in hash order: a file by its content, since its path may change; a piece of the
        builtin texts by the name of its topic."""
        if not document.source or self.plan.by_piece:
            return document.rank
        return rank_of(document.source) if document.source.startswith(BUILTIN) else self.plan.names[document.source]

    @property
    def warnings(self) -> list[str]:
        """Caveats for scores on these documents."""
        if not (self.plan.by_piece and self.test):
            return []
        return [
            f"{self.plan.sources} source documents are too few to hold whole ones out, so pieces of them are: the "
            "scored text comes from the same files as the text to train or select on. Give the domain more files, or a "
            "record for each text"
        ]

    @property
    def test(self) -> list[Held]:
        """The documents for reports, in hash order."""
        return self.kept["test"].sorted()

    @property
    def select(self) -> list[Held]:
        """The documents for choosing settings, in hash order."""
        return self.kept["select"].sorted()

    def survey(
        self, size: Callable[[Document], int], *, enough: int, look: Callable[[Document], object] | None = None
    ) -> int:
        """Read everything, and sum the sizes of the documents to train on up to `enough`; `look` is called on all
        others, held-out ones among them, to raise their errors."""
        total = 0
        for document in self.train():
            if total < enough:
                total += size(document)
            elif look:
                look(document)
        if look:
            for held in (*self.test, *self.select):
                look(held.document)
        return total

    def summary(self, files: int, valid_files: int) -> str:
        """A sentence on what was read."""
        seen, kept = self.counts, self.valid_counts
        said = f"{seen.documents} documents, {seen.empty} empty, {seen.bad} bad lines in {files} files"
        if seen.first_bad:
            said += f" (first {seen.first_bad.rstrip('.')})"
        if valid_files:
            said += (
                f"; {kept.documents} documents, {kept.empty} empty, {kept.bad} bad lines in {valid_files} valid files"
            )
        return f"{said}; {len(self.test) + len(self.select)} held out"
