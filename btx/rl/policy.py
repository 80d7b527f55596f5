"""A run of GRPO as seen by its data: which item is asked when, how answers are rewarded, and what is seen on the way.

Everything here is a function of the settings, the step and the policy's weights, so that a run which goes on from a
saved state ends as one that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from btx.data.sampler import key_of, permuted
from btx.errors import RecipeError
from btx.graph.artifact import write_json
from btx.models.opened import Opened
from btx.rl.passrate import BANDS, chosen, mark
from btx.rl.rewards import binary, calibrated, optimum
from btx.rl.sampling import Asker, seed_of, summary
from btx.rl.settings import PolicySettings
from btx.tasks.items import Item

STATE, SEEN, MARKED = "policy.json", "policy.parquet", "marks.parquet"  # the last two are published too
FIFTH = 5


def held_out(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Items to train on, and those with the smallest digests, at most a fifth; equal prompts are on one side.

    RecipeError where that leaves none of either.
    """
    ranked = sorted({item.digest for item in items})
    aside = {*ranked[: min(count, len(ranked) // FIFTH)]}
    if not aside:
        raise RecipeError(f"grpo.task: {len(ranked)} items are too few to hold one in five out. Give it more of them.")
    firsts = {item.digest: item for item in reversed(items)}
    return [item for item in items if item.digest not in aside], [firsts[one] for one in ranked if one in aside]


@dataclass
class Policy:
    """The items, and what was seen so far. `pool` are the numbers of the items that are asked."""

    settings: PolicySettings
    asker: Asker
    items: list[Item]
    held: list[Item]
    prompts: dict[str, list[int]]  # ids by the item's digest
    pool: list[int]
    since: int = 0  # the step from which on this pool is asked
    rewards: list[float] = field(default_factory=list)  # of the latest rollout
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)  # of the held-out items, by step
    rows: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)

    # ---- training ----

    def item(self, slot: int) -> Item:
        """The item of a slot: every item of the pool once, in an order of its own, then all again in another."""
        count = slot - self.since * self.settings.prompts
        epoch, place = divmod(count, len(self.pool))
        key = key_of(self.settings.seed, "items", self.since, epoch)
        return self.items[self.pool[int(permuted(np.array([place]), len(self.pool), key)[0])]]

    def rollout(self, model: Opened, slots: Sequence[int], step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of prompts and of sampled completions for each slot; their rewards wait in `rewards`."""
        asked = [self.item(slot) for slot in slots]
        prompts = [self.prompts[item.digest] for item in asked]
        made = self.asker.sample(model, prompts, seed_of(self.settings.seed, "rollout", step))
        self.rewards = [self.reward(row) for row in self.asker.rows(asked, made)]
        return prompts, [list(one.ids) for one in made]

    def reward(self, row: dict[str, Any]) -> float:
        """The reward of a judged answer."""
        if self.settings.reward == "binary":
            return binary(row["right"])
        return calibrated(row["right"], row["confidence"], self.settings.unstated)

    # ---- what is seen on the way ----

    def due(self, step: int, every: int | None) -> bool:
        """Whether something happens before a step, or at the end; without `every`, at the start and the end."""
        return step in (0, self.settings.steps) or bool(every and step % every == 0)

    def look(self, model: Opened, step: int) -> dict[str, float]:
        """Ask the held-out items, and keep the rows and their numbers.

        At the start, with a KL term and the binary reward, also where the shares of formats would end (`optimum_`).
        """
        rows = self._asked(model, self.held, self.settings.probe_samples, "probe", step)
        self.rows += [{"step": step, **row} for row in rows]
        found = self.numbers[str(step)] = summary(rows, list(self.settings.formats))
        if not step and self.settings.kl and self.settings.reward == "binary":
            given = {row["format"]: [one["right"] for one in rows if one["format"] == row["format"]] for row in rows}
            start = {name: len(right) / len(rows) for name, right in given.items()}
            accuracy = {name: sum(right) / len(right) for name, right in given.items()}
            found |= {f"optimum_{name}": one for name, one in optimum(start, accuracy, self.settings.kl).items()}
        return found

    def mark(self, model: Opened, step: int) -> dict[str, int]:
        """Mark all items to train on by the policy as it is, and choose again; the items by band."""
        count = self.settings.mark_samples
        rows = self._asked(model, self.items, count, "mark", step)
        marks = [mark(item, rows[n * count : (n + 1) * count]) for n, item in enumerate(self.items)]
        self.marks += [{"step": step, **one} for one in marks]
        self.pool = chosen(self.items, {one["prompt_sha256"]: one for one in marks}, self.settings.bands)
        self.since = step
        return {band: sum(one["band"] == band for one in marks) for band in BANDS}

    def _asked(self, model: Opened, items: Sequence[Item], count: int, why: str, step: int) -> list[dict[str, Any]]:
        several = [item for item in items for _ in range(count)]
        prompts = [self.prompts[item.digest] for item in several]
        made = self.asker.sample(model, prompts, seed_of(self.settings.seed, why, step))
        return self.asker.rows(several, made)

    # ---- files ----

    def save(self, out: Path) -> None:
        """Write the state of the run."""
        write_json(out / STATE, {"pool": self.pool, "since": self.since, "numbers": self.numbers})
        self.write(out)

    def write(self, out: Path) -> None:
        """Write the rows that were seen, and the marks if there are any."""
        parquet.write_table(pyarrow.Table.from_pylist(self.rows), out / SEEN, compression="zstd")
        if self.marks:
            parquet.write_table(pyarrow.Table.from_pylist(self.marks), out / MARKED, compression="zstd")

    def load(self, folder: Path) -> None:
        """Go on from a saved state."""
        said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self.pool, self.since, self.numbers = said["pool"], said["since"], said["numbers"]
        self.rows = parquet.read_table(folder / SEEN).to_pylist()
        if (folder / MARKED).is_file():
            self.marks = parquet.read_table(folder / MARKED).to_pylist()
