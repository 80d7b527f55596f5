"""Instructions with inputs and outputs, and the controls that change what an instruction says (arXiv 2305.11383).

A control is one transform of the data: `simplified` leaves of the instruction the output space alone; `delusive` keeps
the spaces of inputs and outputs and breaks the mapping between them; `empty` leaves nothing of the instruction;
`shuffled` gives each item the instruction of another task. What a model gains from `original` over these is what it
learned from the instruction itself. Every draw is a function of a seed and of the item alone, whatever its order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from btx.data.corpus import Counts, read
from btx.data.documents import ABOUT, EMPTY, Document, rank_of
from btx.data.readers import NUL
from btx.data.split import Split
from btx.errors import RecipeError
from btx.recipe.settings import DataSettings
from btx.recipe.task_settings import Control

COLUMNS = ("instruction", "input", "output", "labels", "task", "examples")
Example = tuple[str, str]  # input, output


@dataclass(frozen=True)
class Instruction:
    """One item; `labels` is its label space, where known, and `task` the name of what is asked."""

    instruction: str
    input: str
    output: str
    labels: tuple[str, ...] = ()
    task: str = ""
    examples: tuple[Example, ...] = ()  # demonstrations, part of the instruction

    @property
    def prompt(self) -> str:
        """The text before the answer, which a model continues with a space and the answer."""
        shown = [f"{_asked(given)} {found}" for given, found in self.examples]
        return "\n\n".join(part for part in (self.instruction, *shown, _asked(self.input)) if part)

    @property
    def completion(self) -> str:
        """The answer as it follows the prompt."""
        return f" {self.output}"


def _asked(given: str) -> str:
    return f"Input: {given}\nOutput:" if given else "Output:"


# ---- reading ----


def instruction_of(record: Any, ignore: Collection[str] | None = ()) -> Instruction:
    """An item from a record; ValueError for a bad one, or a column that would be dropped (None: all may be)."""
    if not isinstance(record, Mapping):
        raise ValueError(f"an item must be an object with instruction and output, found {type(record).__name__}")
    row = {key: value for key, value in record.items() if value is not None and key not in (ignore or ())}
    for key, value in row.items():
        if ignore is not None and key not in (*COLUMNS, *ABOUT) and value not in EMPTY:
            raise ValueError(f"the column {key} is no part of an item ({', '.join(COLUMNS)}); see data.ignore")
    said = {key: _text(row.get(key, ""), key) for key in ("instruction", "input", "task")}
    if "output" not in row:
        raise ValueError(f"there is no column output: found {', '.join(sorted(map(str, record))) or 'none'}")
    labels, output = _labels(row.get("labels", [])), _text(row["output"], "output")
    if not output.strip():
        raise ValueError("output is empty, so there is nothing to learn or to judge")
    examples = tuple(_example(one, labels) for one in _list(row.get("examples", []), "examples"))
    if labels and output not in labels:
        raise ValueError(f"output is {output[:60]!r}, which is not among the labels ({', '.join(labels)[:200]})")
    if not (said["instruction"].strip() or said["input"].strip() or examples):
        raise ValueError("there is neither an instruction nor an input, so nothing is asked")
    return Instruction(
        said["instruction"], said["input"], output, labels, said["task"] or said["instruction"], examples
    )


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, found {type(value).__name__}")
    if "\0" in value:
        raise ValueError(NUL)
    value.encode()  # raises on a lone surrogate, which is not a character
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, found {type(value).__name__}")
    return value


def _labels(value: Any) -> tuple[str, ...]:
    labels = tuple(_text(one, "a label") for one in _list(value, "labels"))
    for label in labels:
        if not label or " ".join(label.split()) != label:
            raise ValueError(f"the label {label!r} must be one line, without spaces around it or two in a row")
    if labels and len(set(labels)) < max(2, len(labels)):
        raise ValueError("labels must be two or more, each once")
    return labels


def _example(value: Any, labels: Sequence[str]) -> Example:
    if not isinstance(value, Mapping) or "output" not in value:
        raise ValueError("an example must be an object with input and output")
    given, found = _text(value.get("input", ""), "input"), _text(value["output"], "output")
    if labels and found not in labels:
        raise ValueError(f"an example's output is {found[:60]!r}, which is not among the labels")
    return given, found


# ---- controls ----


class Controlled:
    """A control as a function of items; `shuffled` draws instructions from those of `items`."""

    def __init__(self, control: Control, seed: int, items: Iterable[Instruction] = ()) -> None:
        self.control, self.seed = control, seed
        others = {(one.task, one.instruction, one.examples) for one in items} if control == "shuffled" else set()
        self.others = sorted(others)
        if control == "shuffled" and len({task for task, *_ in self.others}) < 2:
            raise RecipeError(
                "control: shuffled gives items the instruction of another task, and there is only one. Give items of "
                "two tasks, told apart by their column `task` or by their instruction, or choose another control."
            )

    def __call__(self, item: Instruction) -> Instruction:
        """The item with its instruction changed; ValueError for one whose label space is needed and not given."""
        if self.control in ("simplified", "delusive") and not item.labels:
            raise ValueError(f"control: {self.control} needs the label space; give the item `labels`")
        if self.control == "simplified":
            return replace(item, instruction=f"Labels: {', '.join(item.labels)}", examples=())
        if self.control == "empty":
            return replace(item, instruction="", examples=())
        if self.control == "shuffled":
            _, instruction, examples = self._other(item)
            return replace(item, instruction=instruction, examples=examples)
        return self._deluded(item) if self.control == "delusive" else item

    def _other(self, item: Instruction) -> tuple[str, str, tuple[Example, ...]]:
        start = self._drawn(item, "other", len(self.others))
        order = (self.others[(start + n) % len(self.others)] for n in range(len(self.others)))
        return next(one for one in order if one[0] != item.task)

    def _deluded(self, item: Instruction) -> Instruction:
        """With wrong labels in its examples, as in the paper; in its own output if it has no examples."""
        if not item.examples:
            return replace(item, output=self._wrong(item, "output", item.output))
        shown = ((given, self._wrong(item, n, found)) for n, (given, found) in enumerate(item.examples))
        return replace(item, examples=tuple(shown))

    def _wrong(self, item: Instruction, place: object, right: str) -> str:
        wrong = [label for label in item.labels if label != right]
        return wrong[self._drawn(item, place, len(wrong))]

    def _drawn(self, item: Instruction, place: object, count: int) -> int:
        return rank_of(f"{self.seed}/{place}/{item.task}/{item.prompt}{item.completion}") % count


# ---- documents ----


@dataclass(frozen=True)
class InstructionDocument(Document):
    """An item as a document, whose completion alone is an answer."""

    item: Instruction = Instruction("", "", "")

    @cached_property
    def rank(self) -> int:
        """Its place in hash order, by its prompt alone, so that what is asked of it elsewhere is the same."""
        return rank_of(self.item.prompt)


def document_of(item: Instruction, *, chat: bool) -> InstructionDocument:
    """A prompt and its completion, or with `chat` the same as a user's message and the assistant's."""
    said = ({"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.output}) if chat else ()
    return InstructionDocument(((item.prompt, False), (item.completion, True)), said, item=item)


class InstructionSplit(Split):
    """Files of items, those to train on changed by a control; which they are is the same under every control.

    Items of `apart`, files of tasks of kind `label`, are not trained on.
    """

    def __init__(
        self, sources: list[str], settings: DataSettings, *, apart: Sequence[str], control: Control, seed: int,
        chat: bool,
    ) -> None:  # fmt: skip
        self.chat, self.apart = chat, {*apart}
        super().__init__(sources, [], settings, apart=apart)
        self.change = Controlled(control, seed, self._items())

    def train(self) -> Iterator[Document]:
        """The documents to train on, in order; RecipeError, with file and line, for an item that cannot be changed."""
        for document in super().train():
            assert isinstance(document, InstructionDocument)
            try:
                changed = document_of(self.change(document.item), chat=self.chat)
            except ValueError as error:
                raise RecipeError(f"{document.where}: {error}.") from error
            yield replace(changed, where=document.where)

    def _items(self) -> Iterator[Instruction]:
        for document in self._read(self.sources):
            assert isinstance(document, InstructionDocument)
            yield document.item

    def _read(self, sources: Sequence[str], counts: Counts | None = None) -> Iterator[Document]:
        skip = self.settings.on_bad_line == "skip"
        counts = Counts() if counts is None else counts
        asked = bool(self.apart) and self.apart >= {*sources}  # a task's file may have further columns

        def parse(record: Any, ignore: Sequence[str]) -> Document:
            return document_of(instruction_of(record, None if asked else ignore), chat=self.chat)

        return read(list(sources), skip_bad=skip, counts=counts, ignore=self.settings.ignore, parse=parse)
