"""Instructions: how items are read, what each control changes of them and what it keeps, how answers are counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from btx.data.instructions import Controlled, Instruction, InstructionSplit, document_of, instruction_of
from btx.errors import RecipeError
from btx.recipe.settings import DataSettings
from btx.recipe.task_settings import Control, TaskSettings
from btx.report.figures import task_tables
from btx.tasks.items import read_items
from btx.tasks.solve import Completion, numbers_of, rows_of
from tests.support.world import write_jsonl

CONTROLS: tuple[Control, ...] = get_args(Control)
WORDS = st.text("ab \n:", max_size=6)
LABELS = st.lists(st.text("xyz", min_size=1, max_size=2), min_size=2, max_size=4, unique=True)


@st.composite
def instructions(draw: Any) -> Instruction:
    """Any item with a label space; some have examples."""
    labels = tuple(draw(LABELS))
    pick = st.sampled_from(labels)
    examples = tuple(draw(st.lists(st.tuples(WORDS, pick), max_size=2)))
    return Instruction(draw(WORDS), draw(WORDS), draw(pick), labels, draw(st.text("tu", min_size=1)), examples)


def three(control: Control, seed: int = 0, items: list[Instruction] | None = None) -> list[Instruction]:
    """What a control makes of three items of two tasks."""
    items = items or [
        Instruction("Say how it feels.", "fine", "good", ("good", "bad"), "mood"),
        Instruction("Say how it feels.", "ill", "bad", ("good", "bad"), "mood"),
        Instruction("Is it so?", "2 > 1", "yes", ("yes", "no", "maybe"), "truth", (("1 > 2", "no"),)),
    ]
    change = Controlled(control, seed, items)
    return [change(item) for item in items]


@given(instructions(), st.sampled_from(CONTROLS), st.integers(0, 3))
def test_what_a_control_keeps(item: Instruction, control: Control, seed: int) -> None:
    other = replace(item, task=item.task + "'", instruction="Do otherwise.", examples=())
    found = Controlled(control, seed, [item, other])(item)
    assert (found.input, found.labels, found.task) == (item.input, item.labels, item.task)
    assert found.output in item.labels
    assert len(found.examples) in (0, len(item.examples))
    if control == "original":
        assert found == item
    if control == "delusive":
        assert found.instruction == item.instruction
        shown = list(zip(found.examples, item.examples, strict=True)) if item.examples else []
        assert all(one[0] == was[0] and one[1] != was[1] and one[1] in item.labels for one, was in shown)
        assert (found.output == item.output) == bool(item.examples)
    else:
        assert found.output == item.output
    if control == "empty":
        assert found.prompt == (f"Input: {item.input}\nOutput:" if item.input else "Output:")
    if control == "simplified":
        assert found == Controlled(control, seed + 1)(replace(item, instruction="Anything else.", examples=()))
    if control == "shuffled":
        assert (found.instruction, found.examples) == (other.instruction, other.examples)


@given(st.lists(instructions(), min_size=2, max_size=6), st.randoms(), st.sampled_from(CONTROLS))
def test_the_order_of_items_does_not_matter(items: list[Instruction], chance: Any, control: Control) -> None:
    items = [*items, replace(items[0], task="another")]
    mixed = chance.sample(items, len(items))
    one, other = (Controlled(control, 0, order) for order in (items, mixed))
    assert [one(item) for item in items] == [other(item) for item in items]


def test_what_each_control_asks() -> None:
    prompts = {control: [one.prompt for one in three(control)] for control in CONTROLS}
    assert prompts["original"][2] == "Is it so?\n\nInput: 1 > 2\nOutput: no\n\nInput: 2 > 1\nOutput:"
    assert prompts["simplified"][2] == "Labels: yes, no, maybe\n\nInput: 2 > 1\nOutput:"
    assert prompts["empty"][2] == "Input: 2 > 1\nOutput:"
    assert prompts["shuffled"][2] == "Say how it feels.\n\nInput: 2 > 1\nOutput:"
    assert prompts["delusive"][2] in {
        f"Is it so?\n\nInput: 1 > 2\nOutput: {wrong}\n\nInput: 2 > 1\nOutput:" for wrong in ("yes", "maybe")
    }
    assert [one.output for one in three("delusive")] == ["bad", "good", "yes"]


def test_wrong_labels_are_drawn_evenly_and_by_the_seed() -> None:
    items = [Instruction("Which?", str(n), "a", ("a", "b", "c"), "t") for n in range(300)]
    counts = {seed: [one.output for one in three("delusive", seed, items)] for seed in (0, 1)}
    assert counts[0] != counts[1]
    for found in counts.values():
        assert 100 < found.count("b") < 200
        assert found.count("b") + found.count("c") == 300


@pytest.mark.parametrize(("record", "words"), [
    ([], "object"), ({"instruction": "x"}, "output"), ({"instruction": "x", "output": " "}, "empty"),
    ({"output": "y"}, "nothing is asked"), ({"instruction": 5, "output": "y"}, "instruction must be text"),
    ({"instruction": "x", "output": "y", "labels": ["a", "b"]}, "not among the labels"),
    ({"instruction": "x", "output": "y", "labels": ["y"]}, "two or more"),
    ({"instruction": "x", "output": "y", "labels": ["y", "y"]}, "each once"),
    ({"instruction": "x", "output": "y", "labels": ["y", " z"]}, "one line"),
    ({"instruction": "x", "output": "y", "labels": ["y", "z\nz"]}, "one line"),
    ({"instruction": "x", "output": "y", "labels": "yz"}, "list"),
    ({"instruction": "x", "output": "y", "examples": [{"input": "x"}]}, "example"),
    ({"instruction": "x", "output": "y", "labels": ["y", "z"], "examples": [{"output": "w"}]}, "example's output"),
    ({"instruction": "x", "output": "y", "context": "more"}, "context"),
    ({"instruction": "x\0", "output": "y"}, "NUL"),
])  # fmt: skip
def test_bad_items_are_refused(record: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        instruction_of(record)


def test_a_column_may_be_ignored_and_known_metadata_may_stand_there() -> None:
    row = {"instruction": "x", "output": "y", "context": "more", "url": "z", "labels": None}
    assert instruction_of(row, ["context"]) == Instruction("x", "", "y", task="x")


@pytest.mark.parametrize("control", ["simplified", "delusive"])
def test_a_control_that_needs_the_label_space_says_so(control: Control) -> None:
    with pytest.raises(ValueError, match="labels"):
        Controlled(control, 0)(Instruction("x", "", "y"))


def test_one_task_alone_cannot_be_shuffled() -> None:
    with pytest.raises(RecipeError, match="two tasks"):
        Controlled("shuffled", 0, [Instruction("x", str(n), "y", task="t") for n in range(3)])


# ---- the split ----


def _split(file: Path, control: Control, *, apart: list[str], chat: bool = False) -> InstructionSplit:
    return InstructionSplit([str(file)], DataSettings(loss_mask="completion"), apart=apart, control=control, seed=0,
                            chat=chat)  # fmt: skip


def test_the_same_items_are_trained_on_under_every_control_and_none_that_is_asked(tmp_path: Path) -> None:
    rows = [{"instruction": f"Rule {n % 2}.", "input": f"{n}", "output": "ab"[n % 2], "labels": ["a", "b"]}
            for n in range(200)]  # fmt: skip
    write_jsonl(tmp_path / "all.jsonl", rows)
    asked = [{**row, "output": "b", "note": "of a task"} for row in rows[:40]]
    write_jsonl(tmp_path / "asked.jsonl", asked)
    inputs, held = {}, {}
    for control in CONTROLS:
        for chat in (False, True):
            split = _split(tmp_path / "all.jsonl", control, apart=[str(tmp_path / "asked.jsonl")], chat=chat)
            documents = list(split.train())
            inputs[control, chat] = [one.item.input for one in documents]  # type: ignore[attr-defined]
            held[control, chat] = [one.document.text for one in (*split.test, *split.select)]
            assert split.left_out == 40
            assert all(bool(one.messages) == chat for one in documents)
    assert len({tuple(found) for found in inputs.values()}) == len({tuple(found) for found in held.values()}) == 1
    trained = {*inputs["original", False]}
    assert not trained & {row["input"] for row in asked}
    assert len(trained) + len(held["original", False]) == 160


def test_an_item_that_a_control_cannot_change_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": f"Say {n}.", "output": "x"} for n in range(9)])
    with pytest.raises(RecipeError, match=r"a\.jsonl:\d.*labels"):
        list(_split(tmp_path / "a.jsonl", "simplified", apart=[]).train())


def test_the_answer_alone_is_learned() -> None:
    item = Instruction("Say x.", "1", "x")
    assert document_of(item, chat=False).pieces == (("Say x.\n\nInput: 1\nOutput:", False), (" x", True))
    said = document_of(item, chat=True).messages
    assert [(one["role"], one["content"]) for one in said] == [
        ("user", "Say x.\n\nInput: 1\nOutput:"), ("assistant", "x")
    ]  # fmt: skip


# ---- the task ----


def _task(**more: Any) -> TaskSettings:
    return TaskSettings.model_validate({"file": "x", "kind": "label", **more})


def _file(root: Path, **more: Any) -> str:
    rows = [{"instruction": f"Task {n % 2}.", "input": f"{n}", "output": "a", "labels": [*"abcd"][: 2 + n % 3], **more}
            for n in range(4)]  # fmt: skip
    write_jsonl(root / "items.jsonl", rows)
    return str(root / "items.jsonl")


@hypothesis_settings(deadline=None)  # scipy is imported by the first
@given(st.lists(st.sampled_from([" a", "b\n", "c", "", "\n a", "d e", "A", "a b"]), min_size=4, max_size=4))
def test_accuracy_is_compliance_times_accuracy_among_the_compliant(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        items = read_items(_task(), _file(Path(folder)), None)
    rows = rows_of(items, [Completion(text, 1, True) for text in texts], _task())
    found = numbers_of(rows)
    assert found["accuracy"] == pytest.approx(found["compliance"] * (found["accuracy_of_compliant"] or 0))
    assert (found["accuracy_of_compliant"] is None) == (found["compliant"] == 0)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 2) / 4)
    assert found["chance_of_compliant"] <= found["chance"]
    assert sum(one["compliant"] for one in found["by_task"].values()) == found["compliant"]
    assert found["compliant"] == sum(" ".join(text.split()) in item.labels for text, item in
                                     zip(texts, items, strict=True))  # fmt: skip
    tables = task_tables({"tasks": {"t": {"models": {"seed": found}, "from_seed": {}, "contamination": {}}}})
    head, table = tables["t"]
    assert head[3:6] == ["% labels", "% right of those", "% right by chance"]
    assert table[0][3] == f"{100 * found['compliance']:.1f}"


def test_a_random_guess_is_right_as_often_as_chance_says(tmp_path: Path) -> None:
    import random

    items = read_items(_task(), _file(tmp_path), None) * 500
    rng = random.Random(0)
    rows = rows_of(items, [Completion(rng.choice(item.labels), 1, True) for item in items], _task())
    found = numbers_of(rows)
    assert found["compliance"] == 1
    assert math.isclose(found["accuracy"], found["chance"], abs_tol=0.05)


@pytest.mark.parametrize(("more", "words"), [
    ({"labels": None}, "label space"), ({"output": "z"}, "not among the labels"), ({"output": None}, "output"),
])  # fmt: skip
def test_items_of_a_task_that_cannot_be_judged_are_refused(tmp_path: Path, more: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"items\.jsonl:1.*{words}"):
        read_items(_task(), _file(tmp_path, **more), None)


def test_a_control_asks_otherwise_and_judges_alike(tmp_path: Path) -> None:
    file = _file(tmp_path, task=None)
    plain, empty = (read_items(_task(control=control), file, None) for control in ("original", "empty"))
    assert [one.answer for one in plain] == [one.answer for one in empty]
    assert plain[0].prompt == "Task 0.\n\nInput: 0\nOutput:"
    assert empty[0].prompt == "Input: 0\nOutput:"
    with pytest.raises(RecipeError, match="delusive"):
        read_items(_task(control="delusive"), file, None)
    shown = _file(tmp_path, examples=[{"input": "9", "output": "a"}])
    assert [one.answer for one in read_items(_task(control="delusive"), shown, None)] == ["a"] * 4


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("label", "prompt", "{input}"), ("label", "read", "text"), ("label", "seconds", 5), ("label", "answer", "{output}"),
    ("exact_match", "control", "empty"), ("code", "control", "empty"),
])  # fmt: skip
def test_settings_of_another_kind_are_refused(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"`{name}` does not belong to kind {kind}"):
        TaskSettings.model_validate({"file": "x", "kind": kind, name: value})


def test_a_task_without_a_control_has_the_identity_that_it_had() -> None:
    settings = TaskSettings.model_validate({"file": "x", "kind": "exact_match"})
    assert "control" not in settings.identity()
    assert _task(control="empty").identity()["control"] == "empty"
