"""Whether a model's own text collapses: continuations of held-out documents, greedy or sampled, and how they repeat.

distinct-n is the share of different n-grams of ids among all, over the continuations of a domain (arXiv 1510.03055);
`repeated` is the share of continuations whose second half has no 4-gram that is not in its first. The real text has the
same numbers beside it (`held_out`), since a small domain repeats itself too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from btx.models.generation import generate
from btx.models.opened import Opened
from btx.probes.contract import Data, Found, Probe
from btx.recipe.fields import Count, Weight
from btx.recipe.settings import Settings

GRAM = 4


class DegeneracySettings(Settings):
    """Repetition in a model's own continuations of held-out documents."""

    prompts: Count = Field(16, description="documents of each domain that are continued, at most")
    prompt_tokens: Count = Field(32, description="of a document's beginning")
    new_tokens: Count = Field(48, description="that are generated")
    temperature: Weight = Field(0.0, description="0: the likeliest token each time")


def measure(model: Opened, _reference: None, data: Data, settings: DegeneracySettings) -> Found:
    """Numbers by domain, and a row per continuation with its ids; documents that are too short are left out."""
    rows: list[dict[str, Any]] = []
    numbers = {}
    needed = settings.prompt_tokens + settings.new_tokens
    for domain, documents in data.documents.items():
        chosen = [(n, ids) for n, (ids, _) in enumerate(documents) if len(ids) >= needed][: settings.prompts]
        if not chosen:
            continue
        prompts = torch.stack([torch.from_numpy(ids[: settings.prompt_tokens]) for _, ids in chosen])
        chance = torch.Generator(device=model.device).manual_seed(0)
        made = generate(model, prompts.to(model.device), most=settings.new_tokens, temperature=settings.temperature,
                        random=chance).tolist()  # fmt: skip
        real = [ids[settings.prompt_tokens : needed].tolist() for _, ids in chosen]
        numbers[domain] = {
            **{f"distinct_{n}": distinct(made, n) for n in (1, 2, 3)}, "repeated": _share(made),
            "held_out_distinct_2": distinct(real, 2), "held_out_repeated": _share(real),
        }  # fmt: skip
        rows += [
            {"domain": domain, "document": n, "ids": ids, "repeated": repeated(ids)}
            for (n, _), ids in zip(chosen, made, strict=True)
        ]
    if not numbers:
        return Found({}, missing=f"no held-out document has {needed} tokens")
    return Found(numbers, rows)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of some texts."""
    grams = [tuple(ids[at : at + n]) for ids in texts for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(ids: Sequence[int]) -> bool:
    """Whether the second half of a text says nothing new: each of its 4-grams is in the first half too."""
    half = len(ids) // 2
    grams = [{tuple(part[at : at + GRAM]) for at in range(len(part) - GRAM + 1)} for part in (ids[:half], ids[half:])]
    return bool(grams[1]) and grams[1] <= grams[0]


def _share(texts: Sequence[Sequence[int]]) -> float:
    return sum(map(repeated, texts)) / len(texts)


PROBE = Probe(measure, settings=DegeneracySettings)
