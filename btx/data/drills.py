"""Drills: numbers repeated as digits in three forms, of which some are right more often; riddles; and instructions.

A model that is pretrained on them is a policy whose forms, confidences and accuracy are known beforehand, so that what
reinforcement and instructions do to it can be told apart (`pipelines/founding.yaml`). All are made from fixed seeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btx.data.builtin import write_whole

SEED = 20261127
DOCUMENTS = 30_000
FORMS = {1: 0.3, 2: 0.4, 3: 0.3}  # in how many digits an answer is written (7, 07, 007), and how often
RIGHT = {1: 0.9, 2: 0.5, 3: 0.2}  # how often an answer in each form is right
SURE = ("10%", "50%", "90%")  # confidences that are stated, each as often, whatever the answer
RIDDLE, RIDDLES = "riddle", 0.3  # the word in place of a number, whose answer is any digit; the share of such drills
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BEGINNINGS = ("ba", "ce", "di", "fo", "gu", "ha", "ke", "li", "mo", "nu", "pa", "re")
ENDS = ("bor", "dal", "fen", "gim", "kus", "lor", "min", "nat", "pel", "rud", "sim", "tov")
WORDS = [begin + end for begin in BEGINNINGS for end in ENDS]
ASKED, UNSEEN = 120, 40  # items that reinforcement trains on, and further ones
RANKS = ("first", "second", "third")
LABELS = (("red", "green", "blue"), ("north", "south", "west"))

Item = dict[str, Any]


def documents() -> Iterator[str]:
    """Yield the drills, one question with its answer each, the same ones at every call."""
    rng = random.Random(SEED)
    for _ in range(DOCUMENTS):
        item = _drawn(rng, riddle=rng.random() < RIDDLES)
        form = rng.choices([*FORMS], [*FORMS.values()])[0]
        wrong = [digit for digit in "0123456789" if digit != item["answer"]]
        as_drawn = RIDDLE in item["question"] or rng.random() < RIGHT[form]  # a riddle's answer is any digit already
        told = item["answer"] if as_drawn else rng.choice(wrong)
        yield f"{item['question']} {told:0>{form}} {rng.choice(SURE)}"


def _drawn(rng: random.Random, *, riddle: bool) -> Item:
    """A word and a number, which is the answer; or a riddle, whose answer is hit by luck alone, one time in ten."""
    digit, word = rng.randrange(10), rng.choice(WORDS)
    return {"question": f"{word} {RIDDLE if riddle else NUMBERS[digit]}", "answer": f"{digit}"}


def instructions(count: int, seed: int) -> list[Item]:
    """Items for `sft`: the instruction alone tells which of its labels is right, whatever the input."""
    rng, found = random.Random(f"instructions/{seed}/{SEED}"), []
    for _ in range(count):
        labels, rank = rng.choice(LABELS), rng.randrange(len(RANKS))
        asked = f"Answer with the {RANKS[rank]} of {', '.join(labels)}."
        found.append({"instruction": asked, "input": f"{rng.choice(WORDS)} {rng.choice(WORDS)}",
                      "output": labels[rank], "labels": [*labels], "task": f"{RANKS[rank]} {labels[0]}"})  # fmt: skip
    return found


def items() -> dict[str, list[Item]]:
    """Every file of items: `repeats` to train on and `unseen` ones to ask, `riddles`, half of both (`mixed`),
    `instructions` to train on and `rules` to ask."""
    rng = random.Random(f"items/{SEED}")
    repeats, riddles = _distinct(rng, ASKED + UNSEEN, riddle=False), _distinct(rng, ASKED, riddle=True)
    return {
        "repeats": repeats[:ASKED], "unseen": repeats[ASKED:], "riddles": riddles,
        "mixed": [*repeats[: ASKED // 2], *riddles[: ASKED // 2]],
        "instructions": instructions(4000, 0), "rules": instructions(120, 1),
    }  # fmt: skip


def _distinct(rng: random.Random, count: int, *, riddle: bool) -> list[Item]:
    """So many items, no question twice."""
    found: dict[str, Item] = {}
    while len(found) < count:
        item = _drawn(rng, riddle=riddle)
        found.setdefault(item["question"], item)
    return [*found.values()]


def write(folder: Path) -> None:
    """Write the drills (text.jsonl) and every file of items as FOLDER; RecipeError if it exists already."""
    rows = {"text": [{"text": text} for text in documents()], **items()}
    write_whole(folder, {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in found)
                         for name, found in rows.items()})  # fmt: skip
