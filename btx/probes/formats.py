"""Which forms a model's own answers take, and whether they collapse into one (format collapse, arXiv 2504.07912).

Held-out documents are continued from their beginning, sampled, and each continuation counts as the first format whose
regular expression is found in it, or as `other`. Reported are the shares, their entropy over ln of the number of
formats (1: all alike, 0: one alone), and the mean length. The real text has its entropy beside it (`held_out`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field, field_validator

from btx.models.generation import generate
from btx.models.opened import Opened
from btx.probes.contract import Data, Found, Probe
from btx.recipe.fields import Count, Text, Weight
from btx.recipe.settings import Settings

OTHER = "other"
OF_ARITHMETIC = {
    "hashes": r"####\s*[-+$]?\d",
    "boxed": r"\\boxed\s*\{",
    "code": r"```|^\s*(def |import |print\()",
    "number": r"\A\s*[-+$]?\d[\d,]*(\.\d+)?\s*\.?\s*\Z",
}


class FormatsSettings(Settings):
    """Shares of output formats among a model's own continuations of held-out documents."""

    formats: dict[Text, Text] = Field(
        default_factory=lambda: dict(OF_ARITHMETIC), min_length=1,
        description="regular expressions of Python by name, tried in this order, with ^ and $ at every line; what none "
        "finds is `other`; default: those of answers to sums",
    )  # fmt: skip
    prompts: Count = Field(16, description="documents of each domain that are continued, at most")
    samples: Count = Field(4, description="continuations of each")
    prompt_tokens: Count = Field(32, description="of a document's beginning")
    new_tokens: Count = Field(48, description="that are generated, at most")
    temperature: Weight = Field(1.0, description="0: the likeliest token each time, so one sample is enough")

    @field_validator("formats")
    @classmethod
    def _expressions(cls, formats: dict[str, str]) -> dict[str, str]:
        return check_formats(formats)


def check_formats(formats: dict[str, str]) -> dict[str, str]:
    """The formats; ValueError for one that is no regular expression, or has the name of what none finds."""
    if OTHER in formats:
        raise ValueError(f"{OTHER!r} stands for what no format finds; choose another name")
    for name, pattern in formats.items():
        try:
            re.compile(pattern, re.MULTILINE)
        except re.error as error:
            raise ValueError(f"{name} is no regular expression of Python: {error}") from error
    return formats


def measure(model: Opened, _reference: None, data: Data, settings: FormatsSettings) -> Found:
    """Numbers by domain, and a row per continuation with its text; documents without a prompt's tokens are left out."""
    if data.tokenizer is None:
        return Found({}, missing="there is no tokenizer to write its text with")
    tokenizer = data.tokenizer()
    end = tokenizer.eos_token_id
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        chosen = [(n, ids) for n, (ids, _) in enumerate(documents) if len(ids) > settings.prompt_tokens]
        chosen = chosen[: settings.prompts]
        if not chosen:
            continue
        prompts = torch.stack([torch.from_numpy(ids[: settings.prompt_tokens]) for _, ids in chosen])
        chance = torch.Generator(device=model.device).manual_seed(0)
        made = [
            {"domain": domain, "document": n, "sample": sample, "tokens": len(ids),
             "text": tokenizer.decode(ids, skip_special_tokens=True)}
            for sample in range(settings.samples)
            for (n, _), ids in zip(chosen, (until(row, end) for row in generate(
                model, prompts.to(model.device), most=settings.new_tokens, end=[] if end is None else [end],
                temperature=settings.temperature, random=chance,
            ).tolist()), strict=True)
        ]  # fmt: skip
        rows += [row | {"format": format_of(row["text"], settings.formats)} for row in made]
        stop = settings.prompt_tokens + settings.new_tokens
        real = [
            tokenizer.decode(ids[settings.prompt_tokens : stop].tolist(), skip_special_tokens=True) for _, ids in chosen
        ]
        names = [*settings.formats, OTHER]
        found = shares((row["format"] for row in rows if row["domain"] == domain), names)
        held_out = shares((format_of(text, settings.formats) for text in real), names)
        numbers[domain] = {
            **{f"share_{name}": share for name, share in found.items()}, "entropy": entropy(found),
            "tokens": sum(row["tokens"] for row in made) / len(made), "held_out_entropy": entropy(held_out),
        }  # fmt: skip
    if not numbers:
        return Found({}, missing=f"no held-out document has more than {settings.prompt_tokens} tokens")
    return Found(numbers, rows)


def until(ids: list[int], end: int | None) -> list[int]:
    """Generated ids up to the first end of text, itself left out."""
    return ids[: ids.index(end)] if end is not None and end in ids else ids


def format_of(text: str, formats: Mapping[str, str]) -> str:
    """The first format whose expression is found in a text."""
    return next((name for name, pattern in formats.items() if re.search(pattern, text, re.MULTILINE)), OTHER)


def shares(found: Iterable[str], names: list[str]) -> dict[str, float]:
    """The share of each name."""
    counts = Counter(found)
    return {name: counts[name] / counts.total() for name in names}


def entropy(shares: Mapping[str, float]) -> float:
    """−Σ p ln p / ln K of K shares, from 0 to 1."""
    return sum(-share * math.log(share) for share in shares.values() if share) / math.log(len(shares))


PROBE = Probe(measure, settings=FormatsSettings)
