"""How hard each item is for a model: the share of sampled answers that are right, with Wilson's interval, as a band.

Marks are made offline, on one model (after arXiv 2605.28388), and say which: as a policy learns, bands drift, so that
those of another model are refused unless told otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from btx.errors import RecipeError
from btx.tasks.items import Item
from btx.tasks.statistics import wilson

Band = Literal["impossible", "hard", "medium", "easy", "broken"]
BANDS: tuple[Band, ...] = get_args(Band)
RARE = 0.1  # an item without a right answer is impossible if more than this share of right ones is ruled out
THIRDS = (1 / 3, 2 / 3)
MOSTLY = 0.5  # an item is broken if more than this share of answers agree on another one, by the interval
SUFFIXES = (".jsonl", ".parquet")


def band_of(passes: int, count: int, other: int) -> Band:
    """The band of an item with so many right answers of `count`, `other` of which agree on a wrong one.

    `broken`: surely more than half agree on another answer than the item's, so its answer, or how it is read, is
    suspect. `impossible`: no answer is right, and Wilson's interval ends below a tenth, which takes 35 samples.
    Otherwise thirds of the share of right answers: `hard`, `medium`, `easy`.
    """
    if wilson(other, count)[0] > MOSTLY:
        return "broken"
    if not passes and wilson(0, count)[1] < RARE:
        return "impossible"
    share = passes / count
    return "hard" if share < THIRDS[0] else "medium" if share <= THIRDS[1] else "easy"


def mark(item: Item, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mark of an item by the rows of its judged samples: passes, samples, share, Wilson's interval, band."""
    passes, count = sum(bool(row["right"]) for row in rows), len(rows)
    wrong = Counter(row["answer"] for row in rows if not row["right"] and row["answer"] is not None)
    low, high = wilson(passes, count)
    return {
        "prompt_sha256": item.digest, "prompt": item.prompt, "wanted": item.answer or item.tests, "passes": passes,
        "samples": count, "rate": passes / count, "low": low, "high": high,
        "answered": sum(row["answer"] is not None for row in rows),
        "band": band_of(passes, count, max(wrong.values(), default=0)),
    }  # fmt: skip


def chosen(items: Sequence[Item], marks: Mapping[str, Mapping[str, Any]], bands: Collection[str]) -> list[int]:
    """Which of some items, by number, have a mark in these bands; RecipeError if none has."""
    found = [n for n, item in enumerate(items) if marks.get(item.digest, {}).get("band") in bands]
    if not found:
        counts = Counter(
            str(marks[item.digest]["band"]) if item.digest in marks else "without a mark" for item in items
        )
        raise RecipeError(
            f"grpo.bands: no item to train on is {' or '.join(bands)}; there are "
            f"{', '.join(f'{count} {name}' for name, count in counts.items())}. Choose other bands or items."
        )
    return found


def write_marks(path: Path, marks: Sequence[Mapping[str, Any]]) -> None:
    """Marks as JSON lines or Parquet, by the file's name."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(one) for one in marks]), path, compression="zstd")
    else:
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in marks), encoding="utf-8")


def read_marks(path: Path) -> list[dict[str, Any]]:
    """Marks that `btx passrate` wrote; RecipeError for a file that holds none."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows or any(row["band"] not in BANDS or not row["prompt_sha256"] or not row["model"] for row in rows):
            raise ValueError("a row is no mark")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"grpo.passrate: {path} holds no marks of `btx passrate` ({error}). Make them: btx passrate MODEL ITEMS."
        ) from error
    return rows


def require_same(marks: Sequence[Mapping[str, Any]], model: str, asked: Mapping[str, Any]) -> None:
    """RecipeError if marks were given to another model, or in another way, than the one that is going to be trained."""
    if others := {str(row["model"]) for row in marks} - {model}:
        raise RecipeError(
            f"grpo.passrate: the items were marked by a model of digest {sorted(others)[0][:12]}, and the one to train "
            f"has {model[:12]}. Mark them by it (btx passrate), or set grpo.other_marks: true."
        )
    for name, value in asked.items():
        if found := {str(row.get(name)) for row in marks} - {str(value)}:
            raise RecipeError(
                f"grpo.passrate: the items were marked with {name} {sorted(found)[0]}, and grpo has {value}. Mark them "
                "likewise, or set grpo.other_marks: true."
            )
