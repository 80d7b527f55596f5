"""The items of a task, from a local file: prompts, right answers, tests."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from btx.data.arithmetic import problems
from btx.data.instructions import Controlled, Instruction, instruction_of
from btx.data.readers import kind_of, records
from btx.errors import RecipeError, nearest
from btx.recipe.task_settings import TaskSettings

BETWEEN = "\n\n"  # examples and the item; lm-eval's fewshot_delimiter
MARK = "####"  # before an answer, as GSM8K has it
ARITHMETIC, GENERATED = "builtin:arithmetic", 2400  # items that are made and not read
READ = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Item:
    """One item: the whole prompt, the question alone, the right answer, and the parts of the program around code."""

    where: str
    prompt: str
    question: str  # the first column that the prompt names, which a contaminated text would hold
    answer: str
    setup: str = ""
    tests: str = ""
    labels: tuple[str, ...] = ()  # the label space
    task: str = ""  # of an instruction

    @property
    def digest(self) -> str:
        """SHA-256 of the prompt, by which rows of different models are paired."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


class _Lines(list[Any]):
    """A list whose text in a template is its lines."""

    def __format__(self, how: str) -> str:
        return "\n".join(map(str, self))


def read_items(settings: TaskSettings, file: str, examples: str | None) -> list[Item]:
    """The items of a task, at most `limit`; RecipeError, with file and line, for one that cannot be used."""
    if settings.kind == "label":
        return _labelled(settings, file)
    shots = []
    if examples is not None:
        for where, row in islice(_rows(examples), settings.few_shot):
            shots.append(_filled(settings.prompt_template, row, where) + settings.joint
                         + _filled(settings.answer_template, row, where))  # fmt: skip
        if len(shots) < settings.few_shot:
            raise RecipeError(f"{examples} has {len(shots)} examples, and few_shot is {settings.few_shot}. Lower it.")
    found = [_item(settings, shots, where, row) for where, row in islice(_rows(file), settings.limit)]
    if not found:
        raise RecipeError(f"{file} has no items. Name a file that has some.")
    if examples is not None and (known := {*shots} & {_shot(settings, item) for item in found}):
        raise RecipeError(
            f"{examples}: an example is also an item that is scored ({known.pop()[:60]!r}...). Take it out of one file."
        )
    return found


def _labelled(settings: TaskSettings, file: str) -> list[Item]:
    """Instructions with label spaces, as the control has them; the right answer is always the original one."""
    read = [(where, _instruction(where, row)) for where, row in islice(_rows(file), settings.limit)]
    if not read:
        raise RecipeError(f"{file} has no items. Name a file that has some.")
    change = Controlled(settings.control, 0, (one for _, one in read))
    found = []
    for where, one in read:
        asked = change(one)
        if asked.output != one.output:
            raise RecipeError(
                f"{where}: control: delusive changes an item's examples, and this one has none, so nothing would be "
                "asked otherwise. Give it `examples`, or leave `control` out."
            )
        found.append(Item(where, asked.prompt, one.input or one.instruction, one.output, labels=one.labels,
                          task=one.task))  # fmt: skip
    return found


def _instruction(where: str, row: dict[str, Any]) -> Instruction:
    try:
        found = instruction_of(row, None)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}. Fix the line.") from error
    if not found.labels:
        raise RecipeError(f"{where}: an item of a task of kind label needs its label space. Give it `labels`.")
    return found


def _shot(settings: TaskSettings, item: Item) -> str:
    """An item as it would be written as an example."""
    return item.prompt.rpartition(BETWEEN)[2] + settings.joint + item.answer


def _item(settings: TaskSettings, shots: list[str], where: str, row: dict[str, Any]) -> Item:
    prompt = _filled(settings.prompt_template, row, where)
    first = next((name for _, name, _, _ in string.Formatter().parse(settings.prompt_template) if name), None)
    code = settings.kind == "code"
    needs_answer = not code  # the tests judge code, so its items need no solution
    return Item(
        where, BETWEEN.join([*shots, prompt]),
        _filled(f"{{{first}}}", row, where) if first else prompt,
        _filled(settings.answer_template, row, where) if needs_answer else "",
        _filled(settings.setup, row, where, optional="test_setup_code") if code else "",
        _filled(settings.tests, row, where) if code else "",
    )  # fmt: skip


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if file == ARITHMETIC:
        for n, (question, answer) in enumerate(problems(GENERATED), 1):
            yield f"{file}#{n}", {"question": question, "answer": f"{MARK} {answer}"}
        return
    if kind_of(file) not in READ:
        raise RecipeError(f"{file}: items are read from {', '.join(READ)}. Name such a file.")
    for where, row in records(file, every_column=True):
        if isinstance(row, Exception):
            raise RecipeError(f"{where}: {row}. Fix the line.") from row
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: an item must be an object, found {type(row).__name__}. Fix the line.")
        yield where, row


def _filled(template: str, row: dict[str, Any], where: str, optional: str = "") -> str:
    """A template with an item's columns in it; RecipeError for a column that the item lacks."""
    columns = {name: _Lines(value) if isinstance(value, list) else value for name, value in row.items()}
    if optional:
        columns = {optional: "", **columns}
    try:
        return template.format_map(columns)
    except KeyError as error:
        name = str(error.args[0])
        raise RecipeError(
            f"{where}: there is no column {name!r} for {template[:60]!r}; {nearest(name, row)}"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(f"{where}: {template[:60]!r} cannot be filled: {error}. Correct the template.") from error
