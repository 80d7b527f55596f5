"""How the answer to an item is read from a completion, and judged."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from btx.errors import RecipeError
from btx.recipe.task_settings import TaskSettings
from btx.tasks.enclosed import Limits
from btx.tasks.items import MARK, Item
from btx.tasks.sandbox import run

# A sign counts where no term precedes it (10-5 is no -5), before or after a currency's; commas group by three.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?(?:[$€£¥] ?(?P<inner>[-−])?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
FENCE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.S)


@dataclass(frozen=True)
class Judged:
    """The answer as it was read (None: there is none), whether it is right, and for code how the program ended."""

    answer: str | None
    right: bool
    how: str = ""


def number(text: str) -> Decimal | None:
    """The number after the first `####`, as GSM8K's answers end; without one, the last number of the text."""
    after = NUMBER.search(text.partition(MARK)[2])
    found = after or next(reversed([*NUMBER.finditer(text)]), None)
    if not found:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] or found["inner"] else value


def line(text: str) -> str | None:
    """The first line with text, its space made single."""
    return next((" ".join(found.split()) for found in text.splitlines() if found.strip()), None)


def program(completion: str) -> str:
    """The code of a completion: what its first fenced block holds, or all of it."""
    fenced = FENCE.search(completion)
    return fenced[1] if fenced else completion


def judge_for(settings: TaskSettings) -> Callable[[Item, str], Judged]:
    """The judge of a task's completions."""
    if settings.kind == "code":
        limits = Limits(seconds=settings.seconds)
        return lambda item, completion: _run(item, completion, limits)
    read = reader_of(settings)

    def judge(item: Item, completion: str) -> Judged:
        found, wanted = read(completion), read(item.answer)
        return Judged(None if found is None else str(found), found is not None and found == wanted)

    return judge


def reader_of(settings: TaskSettings) -> Callable[[str], Decimal | str | None]:
    """What reads an answer from a text: a number, or the first line, which alone can be a label."""
    return number if settings.read == "number" and settings.kind != "label" else line


def require_answers(settings: TaskSettings, items: list[Item]) -> None:
    """RecipeError for an item whose right answer cannot be read."""
    if settings.kind == "code":
        return
    for item in items:
        if reader_of(settings)(item.answer) is None:
            raise RecipeError(
                f"{item.where}: its answer {item.answer[:60]!r} holds no {settings.read}. Correct the item, or the "
                "task's `answer` or `read`."
            )


def _run(item: Item, completion: str, limits: Limits) -> Judged:
    code = program(completion)
    ran = run([item.setup, code, item.tests], limits)
    last = (ran.said.strip().splitlines() or [""])[-1]
    return Judged(code, ran.passed, ran.how if ran.how != "failed" or not last else f"failed: {last[:200]}")
