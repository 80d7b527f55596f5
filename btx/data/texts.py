"""Which files each domain of a recipe reads, and which texts of other domains it must leave out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from btx.data import corpus
from btx.errors import RecipeError
from btx.graph.digests import Digests
from btx.recipe.paths import expanded
from btx.recipe.recipe import Recipe


class Texts:
    """The texts of a recipe, looked up once."""

    def __init__(self, recipe: Recipe, base: Path, digests: Digests) -> None:
        self.recipe, self.digests = recipe, digests
        self.base = base / expanded(recipe.data.directory or ".", "data.directory")
        self.files: dict[str, tuple[list[str], list[str]]] = {}
        self.notes: dict[str, list[str]] = {}  # remarks made while looking the files up

    def reads(self, where: str, data: list[str], valid: list[str]) -> dict[str, Any]:
        """What a step records of the text that it reads, and of other domains' text that it must leave out.

        What the seed's data happens to hold out is scored nowhere, so the domains need not leave it out.
        """
        sources, kept = self._resolved(where, data, valid)
        for source in sorted({*sources} & {*kept}):
            raise RecipeError(f"{where}: {source} is in `data` and in `valid`. Leave it out of one of them.")
        others = [(o[0], *self._resolved(*o)) for o in self._data() if o[0] != where]
        apart = sorted({file for _, _, files in others for file in files} - {*kept})
        mine = {*map(self._digest, sources)}
        beside = [
            theirs for other, theirs, files in others
            if other != "seed" and not files and mine & {*map(self._digest, theirs)}
        ]  # fmt: skip
        read = (*sources, *kept, *apart, *itertools.chain(*beside))
        content = [self._digest(s) for s in read]
        notes = [*self.notes[where], *corpus.equal_files(sources, content, where)]
        return {"sources": sources, "valid": kept, "apart": apart, "beside": beside, "content": content,
                "data": self.recipe.data, "notes": notes}  # fmt: skip

    def _resolved(self, where: str, data: list[str], valid: list[str]) -> tuple[list[str], list[str]]:
        """The files of a domain's data and of its held-out data."""
        if where not in self.files:
            notes = self.notes.setdefault(where, [])
            named = {f"{where}.data": data, f"{where}.valid": valid}
            found = [corpus.resolve(paths, self.base, key, notes) for key, paths in named.items()]
            self.files[where] = found[0], found[1]
        return self.files[where]

    def _data(self) -> list[tuple[str, list[str], list[str]]]:
        """The recipe's sections that name data, with their data and held-out files."""
        domains = [(f"domains.{n}", d.data, d.valid) for n, d in self.recipe.domains.items() if d.data]
        return [*domains, ("seed", self.recipe.seed.sources, self.recipe.seed.valid)]

    def _digest(self, source: str) -> str:
        return corpus.digest(source, self.digests)
