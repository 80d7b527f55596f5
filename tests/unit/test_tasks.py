"""Tasks: how items become prompts, how answers are read, intervals, and contamination."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from btx.errors import RecipeError
from btx.recipe.task_settings import TaskSettings
from btx.report.figures import contamination, task_tables
from btx.report.page import page
from btx.tasks.answers import line, number, program, require_answers
from btx.tasks.items import read_items
from btx.tasks.overlap import EDGE, WINDOW, found_in, inner
from btx.tasks.statistics import Z, paired, wilson
from tests.support.reports import REPORTED
from tests.support.world import write_jsonl

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared task files are not beside the project")


def task(**more: Any) -> TaskSettings:
    """Settings of an exact-match task."""
    return TaskSettings.model_validate({"file": "x", "kind": "exact_match", **more})


# ---- reading answers ----


@pytest.mark.parametrize(("text", "wanted"), [
    ("#### 18", 18), ("so 5 + 13\n#### 18\n", 18), ("#### 1,234", 1234), ("#### $1,234.50", "1234.5"), ("#### -7", -7),
    ("#### −7", -7), ("#### $-7", -7), ("#### -$7", -7), ("####18.", 18), ("#### 12 apples, not 13", 12),
    ("#### 3\nQuestion: 4\n#### 5", 3), ("it is 3, then 4", 4), ("10-5", 5), ("x=-5", -5), ("(-5)", -5), ("a - 5", 5),
    ("5%", 5), (".5", "0.5"), ("0.50", "0.5"), ("18.00", 18), ("1,2,3", 3), ("1,000,000", 1000000), ("12,34", 34),
    ("€ 40", 40), ("#### none, so 6", 6), ("7 ####", 7),
])  # fmt: skip
def test_the_number_that_is_meant(text: str, wanted: Any) -> None:
    assert number(text) == Decimal(wanted)


@pytest.mark.parametrize("text", ["", "####", "no number", "#### ?", "١٢"])
def test_no_number(text: str) -> None:
    assert number(text) is None


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.00", "${}"]), st.text("abc \n", max_size=9))
def test_a_number_is_read_as_it_was_written(value: int, how: str, before: str) -> None:
    assert number(f"{before} #### {how.format(value)}") == value
    assert number(f"12 {before} {how.format(value)} {before}") == value


def test_text_and_programs() -> None:
    assert line("\n  Paris   is\tit \nnot") == "Paris is it"
    assert line(" \n") is None
    assert program("x = 1\n") == "x = 1\n"
    assert program("Sure:\n```python\nx = 1\n```\nand") == "x = 1\n"
    assert program("```\nx = 1") == "x = 1"


# ---- items ----


def test_prompts_are_those_of_lm_eval(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}?", "answer": f"a #### {n}"} for n in range(4)]
    write_jsonl(tmp_path / "i.jsonl", rows[2:])
    write_jsonl(tmp_path / "e.jsonl", rows[:2])
    found = read_items(task(few_shot=2, examples="e"), str(tmp_path / "i.jsonl"), str(tmp_path / "e.jsonl"))
    shots = "Question: q0?\nAnswer: a #### 0\n\nQuestion: q1?\nAnswer: a #### 1\n\n"
    assert [one.prompt for one in found] == [f"{shots}Question: q{n}?\nAnswer:" for n in (2, 3)]
    assert [one.question for one in found] == ["q2?", "q3?"]
    code = TaskSettings.model_validate({"file": "x", "kind": "code"})
    write_jsonl(tmp_path / "c.jsonl", [{"text": "Add.", "test_list": ["assert 1", "assert 2"], "code": "pass"}])
    (made,) = read_items(code, str(tmp_path / "c.jsonl"), None)
    assert made.prompt == (
        "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\n"
        "assert 1\nassert 2\n[BEGIN]\n"
    )
    assert (made.setup, made.tests) == ("", "assert 1\nassert 2")


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".jsonl.gz"])
def test_the_same_items_from_other_files(tmp_path: Path, suffix: str) -> None:
    """Of a Parquet file, whose column `text` alone is read as text, all columns count."""
    import gzip

    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"t{n}", "test_list": [f"assert {n}"]} for n in range(3)]
    file = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        data = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        file.write_bytes(data.encode() if suffix == ".json" else gzip.compress(data.encode()))
    write_jsonl(tmp_path / "plain.jsonl", rows)
    code = TaskSettings.model_validate({"file": "x", "kind": "code", "limit": 2})
    found, wanted = (read_items(code, str(path), None) for path in (file, tmp_path / "plain.jsonl"))
    assert [one.prompt for one in found] == [one.prompt for one in wanted]
    assert len(found) == 2


@pytest.mark.parametrize(("rows", "settings", "words"), [
    ([], {}, "no items"),
    ([{"quest": "q", "answer": "1"}], {}, "did you mean 'quest'"),
    (["text"], {}, "must be an object"),
    ([{"question": "q", "answer": "none"}], {}, "holds no number"),
    ([{"question": "q", "answer": "1"}], {"prompt": "{question"}, "cannot be filled"),
    ([{"question": "q", "answer": "1"}], {"prompt": "{}"}, "cannot be filled"),
    ([{"question": ["q"], "answer": "1"}], {"prompt": "{question[3]}"}, "cannot be filled"),
    ([{"question": "q", "answer": "1"}], {"few_shot": 2, "examples": "e"}, "Lower it"),
    ([{"question": "e?", "answer": "#### 1"}], {"few_shot": 1, "examples": "e"}, "also an item"),
])  # fmt: skip
def test_items_that_are_refused(tmp_path: Path, rows: list[Any], settings: dict[str, Any], words: str) -> None:
    write_jsonl(tmp_path / "i.jsonl", rows)
    write_jsonl(tmp_path / "e.jsonl", [{"question": "e?", "answer": "#### 1"}])
    said = task(**settings)
    with pytest.raises(RecipeError, match=words):
        require_answers(said, read_items(said, str(tmp_path / "i.jsonl"), str(tmp_path / "e.jsonl") if said.few_shot
                                         else None))  # fmt: skip


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text('{"question": 1\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"i\.jsonl:1"):
        read_items(task(), str(tmp_path / "i.jsonl"), None)
    with pytest.raises(RecipeError, match="Name such a file"):
        read_items(task(), str(tmp_path / "i.txt"), None)


@pytest.mark.parametrize(("settings", "words"), [
    ({"few_shot": 1}, "examples"), ({"examples": "e"}, "few_shot"), ({"tests": "x"}, "does not belong"),
    ({"kind": "code", "read": "text"}, "does not belong"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"stop": [""]}, "stop"),
])  # fmt: skip
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        task(**settings)


@shared
def test_the_shared_items_can_be_read_and_their_own_answers_are_right() -> None:
    said = task()
    items = read_items(said, str(SHARED / "gsm8k_valid_from_train.jsonl"), None)
    require_answers(said, items)
    assert len(items) == 153
    assert all(number(f" {item.answer}") == number(item.answer.rpartition("#### ")[2]) for item in items)


# ---- intervals ----


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (3, 7), (81, 263)])
def test_wilson_solves_its_equation(right: int, count: int) -> None:
    """At its ends the share is Z standard errors away, and the error is that of the end: Wilson's definition."""
    for end in wilson(right, count):
        if 0 < end < 1:
            assert abs(right / count - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count))
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe, Stat. Med. 17 (1998), table I


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_differences(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (list(side) for side in zip(*pairs, strict=True))
    found, back = paired(before, after), paired(after, before)
    assert found["difference"] == pytest.approx(np.mean(after) - np.mean(before))
    assert (found["right_to_wrong"], found["wrong_to_right"]) == (back["wrong_to_right"], back["right_to_wrong"])
    low, high = found["interval_95"]
    assert [-high, -low] == pytest.approx(back["interval_95"])
    assert -1 <= low <= found["difference"] + 1e-12
    assert found["difference"] - 1e-12 <= high <= 1
    assert low < high


def test_the_report_has_every_model_and_says_what_was_seen_in_training() -> None:
    (head, rows), *_ = task_tables(REPORTED).values()
    assert rows[0] == ["seed", "4 of 20", "20.0 (10.0 to 55.0)"]
    assert rows[2] == ["last", "5 of 20", "25.0 (10.0 to 55.0)", "+10.0 (-10.0 to 30.0)", "1", "3"]
    assert len(head) == len(rows[2])
    assert contamination(REPORTED) == ["sums <b>: 2 of 20 questions stand word for word in the training text of math."]
    html = page("t", REPORTED, {})
    assert "Task sums &lt;b&gt;" in html
    assert "sums <b>" not in html
    assert contamination({}) == []
    assert task_tables({}) == {}


# ---- contamination ----


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(2, 50))
def test_questions_in_a_text_are_found_and_no_others(seed: int, length: int, ids: int) -> None:
    chance = np.random.default_rng(seed)
    text = chance.integers(0, ids, 400).astype(np.uint16)
    at = int(chance.integers(0, 360))
    questions = [text[at : at + length].tolist(), chance.integers(0, ids, 30).tolist(), []]
    wanted = [inner(question) for question in questions]
    plain = {
        n for n, one in enumerate(wanted)
        if one and any(text[k : k + len(one)].tolist() == one for k in range(len(text) - len(one) + 1))
    }  # fmt: skip
    assert found_in(text, wanted) == plain
    assert (0 in plain) == (length >= WINDOW + 2 * EDGE)


def test_a_question_across_pieces_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx.tasks.overlap.PIECE", 16)
    text = np.random.default_rng(0).integers(0, 9, 200).astype(np.uint16)
    for at in range(170):
        assert found_in(text, [text[at : at + 30].tolist()]) == {0}
    assert found_in(text[:3], [text[:30].tolist()]) == set()
