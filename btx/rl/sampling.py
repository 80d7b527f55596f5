"""Sampled answers to items, judged: a row for each, and what the rows say of formats, degeneracy and calibration."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btx.data.encoder import Encoder, load_tokenizer
from btx.data.sampler import key_of
from btx.errors import DivergedError
from btx.models.opened import Opened
from btx.probes.calibration import scores
from btx.probes.degeneracy import distinct, repeated
from btx.probes.formats import OTHER, entropy, format_of, shares
from btx.recipe.task_settings import TaskSettings
from btx.rl.rewards import confidence
from btx.tasks.answers import judge_for
from btx.tasks.items import Item
from btx.tasks.solve import Completion, complete, end_ids, prompts_of, require_room


@dataclass(frozen=True)
class Asker:
    """Asks any opened model with one tokenizer; `pattern` reads the confidence, `formats` name the forms of answers."""

    folder: Path  # with the tokenizer
    task: TaskSettings
    pattern: str
    formats: dict[str, str]
    temperature: float
    batch_tokens: int = 8192
    date: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once."""
        return load_tokenizer(self.folder)

    def prompts(self, items: Sequence[Item], positions: int | None, where: str) -> list[list[int]]:
        """The ids of the items' prompts; RecipeError for one that leaves no room for an answer."""
        found = prompts_of(Encoder(self.tokenizer, "all", date=self.date), items, self.task)
        require_room(found, self.task.max_new_tokens, positions, where)
        return found

    def sample(
        self, model: Opened, prompts: Sequence[Sequence[int]], seed: int, done: Callable[[int], None] = lambda _n: None
    ) -> list[Completion]:
        """One sampled completion of each prompt, a function of the model, the prompts and the seed."""
        chance = torch.Generator(device=model.device).manual_seed(seed)
        try:
            return complete(
                model, self.tokenizer, prompts, most=self.task.max_new_tokens, stops=self.task.stops,
                end=end_ids(self.folder, self.tokenizer), batch_tokens=self.batch_tokens, temperature=self.temperature,
                random=chance, done=done,
            )  # fmt: skip
        except RuntimeError as error:
            if "probability tensor" in str(error):  # torch.multinomial's words for NaN
                raise DivergedError(
                    "the policy gives no finite probabilities, so its training diverged. Lower grpo.learning_rate."
                ) from error
            raise

    def rows(self, items: Sequence[Item], made: Sequence[Completion]) -> list[dict[str, Any]]:
        """A row per completion: its item, text, ids, format, the answer as it was read, the confidence it states."""
        judge = judge_for(self.task)
        found = []
        for item, one in zip(items, made, strict=True):
            judged = judge(item, re.sub(self.pattern, "", one.text))  # else the confidence is the last number
            found.append({
                "prompt_sha256": item.digest, "completion": one.text, "ids": list(one.ids), "tokens": one.tokens,
                "ended": one.ended, "answer": judged.answer, "right": judged.right,
                "confidence": confidence(one.text, self.pattern), "format": format_of(one.text, self.formats),
            })  # fmt: skip
        return found


def seed_of(*parts: object) -> int:
    """A seed for torch that depends on all parts."""
    return key_of(*parts) % 2**63


def summary(rows: Sequence[dict[str, Any]], formats: Sequence[str]) -> dict[str, float]:
    """What judged samples say: accuracy, pass@k (one right among an item's), shares of formats and their entropy,
    distinct-2, repetition, length, and of the answers that state a confidence how well it is calibrated."""
    by_item: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_item[row["prompt_sha256"]].append(row["right"])
    found = shares((row["format"] for row in rows), [*formats, OTHER])
    ids = [row["ids"] for row in rows]
    numbers = {
        "accuracy": _mean([row["right"] for row in rows]), "pass_at_k": _mean([any(one) for one in by_item.values()]),
        "answered": _mean([row["answer"] is not None for row in rows]), "ended": _mean([row["ended"] for row in rows]),
        "tokens": _mean([row["tokens"] for row in rows]), "entropy": entropy(found), "distinct_2": distinct(ids, 2),
        "repeated": _mean([repeated(one) for one in ids]), **{f"share_{name}": one for name, one in found.items()},
        "stated": _mean([row["confidence"] is not None for row in rows]),
    }  # fmt: skip
    if said := [row for row in rows if row["confidence"] is not None]:
        right = np.array([row["right"] for row in said], dtype=bool)
        sure = np.array([row["confidence"] for row in said], dtype=float)
        numbers |= {f"stated_{name}": value for name, value in scores(sure, right).items()}
    return numbers


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
