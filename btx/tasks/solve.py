"""A model's completions of a task's items, judged: a row per item, and numbers."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btx.data.encoder import Encoder
from btx.errors import RecipeError
from btx.models.generation import generate
from btx.models.opened import Opened
from btx.recipe.task_settings import TaskSettings
from btx.tasks.answers import judge_for
from btx.tasks.items import Item
from btx.tasks.statistics import wilson


@dataclass(frozen=True)
class Completion:
    """A completion: its text up to a stop, the tokens that were generated for it, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...] = ()  # of those tokens


def end_ids(folder: Path, tokenizer: Any) -> set[int]:
    """The ids that end a text: the tokenizer's, and those of generation_config.json, which chat models have."""
    file = folder / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    named = said if isinstance(said, list) else [said]
    return {int(n) for n in (*named, tokenizer.eos_token_id) if n is not None}


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of some stops, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text, bool(found)


def require_room(prompts: Sequence[Sequence[int]], most: int, positions: int | None, where: str) -> None:
    """RecipeError if a prompt and its completion are longer than the model's positions."""
    longest = max(map(len, prompts))
    if positions is not None and longest + most > positions:
        raise RecipeError(
            f"{where}: the longest prompt has {longest} tokens, and with max_new_tokens ({most}) that is more than the "
            f"model's {positions} positions. Lower max_new_tokens or few_shot, or leave long items out."
        )


def complete(
    model: Opened, tokenizer: Any, prompts: Sequence[Sequence[int]], *, most: int, stops: Sequence[str],
    end: set[int], batch_tokens: int, done: Callable[[int], None] = lambda _count: None, temperature: float = 0.0,
    random: torch.Generator | None = None,
) -> list[Completion]:  # fmt: skip
    """Completions of prompts (ids), in their order: greedy, or sampled at a temperature.

    Prompts of equal length are generated together, since nothing is padded then: `batch_tokens` of prompts and
    completions at most, and one prompt at least.
    """
    found: dict[int, Completion] = {}
    for length in sorted({len(ids) for ids in prompts}):
        same = [n for n, ids in enumerate(prompts) if len(ids) == length]
        rows = max(1, batch_tokens // (length + most))
        for batch in (same[at : at + rows] for at in range(0, len(same), rows)):
            ids_BS = torch.tensor([list(prompts[n]) for n in batch], device=model.device)
            made = generate(
                model, ids_BS, most=most, end=end, temperature=temperature, random=random,
                stopped=lambda ids: cut(text_of(tokenizer, ids, end), stops)[1] if stops else False,
            ).tolist()  # fmt: skip
            found |= {n: _completion(tokenizer, ids, end, stops) for n, ids in zip(batch, made, strict=True)}
            done(len(found))
    return [found[n] for n in range(len(prompts))]


def text_of(tokenizer: Any, ids: Sequence[int], end: set[int]) -> str:
    """The text of new ids up to an end token, without special tokens."""
    until = next((n for n, one in enumerate(ids) if one in end), len(ids))
    return str(tokenizer.decode(ids[:until], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _completion(tokenizer: Any, ids: Sequence[int], end: set[int], stops: Sequence[str]) -> Completion:
    """The completion alone, though others of its batch may have taken longer."""
    text, stopped = cut(text_of(tokenizer, ids, end), stops)
    if stopped:  # by the first token with which the text holds a stop
        lengths = range(1, len(ids) + 1)
        most = lengths[bisect_left(lengths, True, key=lambda n: cut(text_of(tokenizer, ids[:n], end), stops)[1])]
        return Completion(text, most, True, tuple(ids[:most]))
    until = next((n + 1 for n, one in enumerate(ids) if one in end), None)
    return Completion(text, until or len(ids), until is not None, tuple(ids[:until]))


def rows_of(
    items: Sequence[Item], completions: Sequence[Completion], settings: TaskSettings,
    done: Callable[[int], None] = lambda _count: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per item: prompt and its digest, completion, the answer as it was read, and whether it is right."""
    judge = judge_for(settings)
    rows = []
    for n, (item, made) in enumerate(zip(items, completions, strict=True)):
        judged = judge(item, made.text)
        rows.append({
            "item": n, "prompt_sha256": item.digest, "prompt": item.prompt, "completion": made.text,
            "tokens": made.tokens, "ended": made.ended, "answer": judged.answer, "wanted": item.answer or item.tests,
            "right": judged.right, "how": judged.how,
            **({"task": item.task, "compliant": judged.answer in item.labels, "chance": 1 / len(item.labels)}
               if settings.kind == "label" else {}),
        })  # fmt: skip
        done(len(rows))
    return rows


def numbers_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson's interval, items, how many completions ended by themselves, how many held an answer.

    Of items with label spaces also compliance, and what `compliance` says.
    """
    right, count = sum(row["right"] for row in rows), len(rows)
    by_task = sorted({row["task"] for row in rows if "task" in row})
    labelled = (
        compliance(rows)
        | {"by_task": {task: compliance([row for row in rows if row["task"] == task]) for task in by_task}}
        if by_task
        else {}
    )
    return {
        "accuracy": right / count, "interval_95": list(wilson(right, count)), "right": right, "items": count,
        "ended": sum(row["ended"] for row in rows), "answered": sum(row["answer"] is not None for row in rows),
        **labelled,
    }  # fmt: skip


def compliance(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of answers to items with label spaces (arXiv 2305.11383): how many are labels, and how many of those are right.

    Accuracy is the product of `compliance` and `accuracy_of_compliant` (None where no answer is a label). `chance` is
    what a random guess in the label spaces has right, the mean of 1 / k; `chance_of_compliant` is what the model would
    have right if it guessed wherever it complies.
    """
    labels, count = [row for row in rows if row["compliant"]], len(rows)
    right = sum(row["right"] for row in labels)
    return {
        "compliance": len(labels) / count, "compliance_interval_95": list(wilson(len(labels), count)),
        "compliant": len(labels), "accuracy_of_compliant": right / len(labels) if labels else None,
        "accuracy_of_compliant_interval_95": list(wilson(right, len(labels))) if labels else None,
        "chance": sum(row["chance"] for row in rows) / count,
        "chance_of_compliant": sum(row["chance"] for row in labels) / count,
    }  # fmt: skip


def prompts_of(encoder: Encoder, items: Sequence[Item], settings: TaskSettings) -> list[list[int]]:
    """The ids of each item's prompt, in the chat template if the task says so."""
    if settings.chat and not encoder.tokenizer.chat_template:
        raise RecipeError("a task has `chat: true`, and the tokenizer has no chat template. Leave `chat` out.")
    found = [encoder.prompt(item.prompt, chat=settings.chat) for item in items]
    for item, ids in zip(items, found, strict=True):
        if not ids:
            raise RecipeError(f"{item.where}: the tokenizer gives its prompt no token. Give the task another `prompt`.")
    return found
