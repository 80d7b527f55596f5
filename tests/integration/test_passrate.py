"""Marks of difficulty: what the command writes, how bands are told, and how a run chooses by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from btx.checkpoints.reader import Checkpoint
from btx.cli.main import graph_of, main
from btx.conversions.grpo import Grpo
from btx.errors import RecipeError
from btx.rl.passrate import BANDS, band_of, chosen, mark, read_marks, write_marks
from btx.tasks.items import Item
from btx.tasks.statistics import wilson
from tests.support.policies import ASKED, STATED, policy, world_of
from tests.support.world import refused

TASK = ["--set", "prompt='{question}'", "--set", "answer='{answer}'", "--set", "max_new_tokens=6", "--set", "stop=[]"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on a busy machine take many times as long."""
    monkeypatch.setattr("btx.models.model.set_threads", lambda _where: torch.set_num_threads(1))


def passrate(world: Path, *more: str, output: str = "marks.jsonl", code: int = 0) -> Result:
    """Run the command on the world's seed and items."""
    options = [*TASK, "--confidence", STATED, "--device", "cpu", "--output", str(world / output), *more]
    done = CliRunner().invoke(main, ["passrate", str(world / "seed"), str(world / "data" / "asked.jsonl"), *options])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


# ---- bands ----


@settings(deadline=None)  # scipy is imported by the first
@given(st.integers(1, 300), st.data())
def test_every_item_has_one_band_and_a_better_one_no_harder_band(count: int, data: Any) -> None:
    order = ["impossible", "hard", "medium", "easy"]
    passes = data.draw(st.integers(0, count - 1))
    found = [order.index(band_of(n, count, 0)) for n in (passes, passes + 1)]
    assert found == sorted(found)


@pytest.mark.parametrize(("passes", "count", "other", "band"), [
    (0, 64, 0, "impossible"), (0, 34, 0, "hard"), (0, 35, 0, "impossible"), (1, 64, 0, "hard"), (21, 64, 0, "hard"),
    (22, 64, 0, "medium"), (42, 64, 0, "medium"), (43, 64, 0, "easy"), (64, 64, 0, "easy"), (0, 64, 40, "broken"),
    (0, 64, 32, "impossible"), (10, 64, 50, "broken"), (0, 1, 1, "hard"), (20, 64, 40, "broken"),
])  # fmt: skip
def test_the_bands(passes: int, count: int, other: int, band: str) -> None:
    assert band_of(passes, count, other) == band
    if band == "impossible":
        assert wilson(0, count)[1] < 0.1
    if band == "broken":
        assert wilson(other, count)[0] > 0.5


def test_a_mark_counts_the_answers() -> None:
    item = Item("f:1", "p", "q", "7")
    rows = [{"right": one == "7", "answer": one} for one in ["7", "7", "8", "8", "8", "9", None, "7"]]
    found = mark(item, rows)
    assert (found["passes"], found["samples"], found["rate"], found["answered"]) == (3, 8, 3 / 8, 7)
    assert (found["low"], found["high"]) == wilson(3, 8)
    assert (found["band"], found["prompt_sha256"]) == ("medium", item.digest)


# ---- the command ----


@pytest.mark.parametrize("output", ["marks.jsonl", "marks.parquet"])
def test_what_the_command_writes(tmp_path: Path, output: str) -> None:
    world_of(tmp_path)
    said = passrate(tmp_path, "--samples", "40", output=output).output
    rows = read_marks(tmp_path / output)
    assert len(rows) == len(ASKED)
    assert {row["model"] for row in rows} == {Checkpoint(tmp_path / "seed").digest()}
    counts = {band: sum(row["band"] == band for row in rows) for band in BANDS}
    assert ", ".join(f"{count} {band}" for band, count in counts.items()) in said
    mean = sum(row["rate"] for row in rows) / len(rows)
    assert 0.4 < mean < 0.65  # what the policy was taught, over its formats: 0.53
    for row in rows:
        assert row["passes"] == round(row["rate"] * 40)
        assert row["low"] <= row["rate"] <= row["high"]
        assert row["wanted"] in "789"


def test_a_mark_depends_on_its_item_and_the_seed_alone(tmp_path: Path) -> None:
    world_of(tmp_path)
    passrate(tmp_path, "--samples", "6")
    first = {row["prompt"]: row for row in read_marks(tmp_path / "marks.jsonl")}
    lines = (tmp_path / "data" / "asked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "asked.jsonl").write_text("".join(lines[20:0:-1]))
    passrate(tmp_path, "--samples", "6")
    again = read_marks(tmp_path / "marks.jsonl")
    assert len(again) == 20
    assert all(row == first[row["prompt"]] for row in again)
    passrate(tmp_path, "--samples", "6", "--seed", "1")
    assert read_marks(tmp_path / "marks.jsonl") != again


@pytest.mark.parametrize(("more", "words", "code"), [
    (["--output", "marks.csv"], ".jsonl", 2), (["--set", "prompt"], "name=value", 2),
    (["--set", "kind=odd"], "kind", 2), (["--set", "max_new_tokens=4000"], "positions", 2),
    (["--set", "read=words"], "read", 2), (["--set", "prompt='{quest}'"], "asked.jsonl:1", 2),
])  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, more: list[str], words: str, code: int) -> None:
    world_of(tmp_path)
    said = passrate(tmp_path, *more, code=code).output
    assert said.startswith("btx: ")
    assert words in said
    assert not (tmp_path / "marks.jsonl").exists()


def test_a_missing_model_or_file_is_named(tmp_path: Path) -> None:
    for model, items, words, code in (
        (tmp_path, "builtin:arithmetic", "no checkpoint", 3), (policy(), str(tmp_path / "x.jsonl"), "x.jsonl", 2)
    ):  # fmt: skip
        done = CliRunner().invoke(main, ["passrate", str(model), items, "--output", str(tmp_path / "m.jsonl")])
        assert (done.exit_code, words in done.output) == (code, True)


# ---- a run that chooses by marks ----


def test_a_run_asks_the_items_of_its_bands(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    world = world_of(tmp_path, passrate="marks.jsonl", bands=["medium"])
    passrate(tmp_path, "--samples", "16")
    bands = {row["prompt_sha256"]: row["band"] for row in read_marks(tmp_path / "marks.jsonl")}
    step = graph_of(world.write(), ()).steps["grpo"]
    assert isinstance(step, Grpo)
    made = step._made(step.items())
    asked = {made.item(slot).digest for slot in range(200)}
    assert {bands[one] for one in asked} == {"medium"}
    assert len(asked) == sum(bands[item.digest] == "medium" for item in made.items) < len(made.items)
    passrate(tmp_path, "--samples", "2")
    assert world.key("grpo") != step.key  # the marks decide


@pytest.mark.parametrize(("key", "value", "words"), [
    ("grpo.bands", ["impossible"], ("grpo.bands", "impossible", "medium")),
    ("grpo.temperature", 0.7, ("temperature 1.0", "0.7", "other_marks")),
    ("grpo.task.max_new_tokens", 5, ("max_new_tokens 6", "5")),
])  # fmt: skip
def test_marks_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: Any, words: tuple[str, ...]) -> None:
    pytest.importorskip("trl")
    world = world_of(tmp_path, passrate="marks.jsonl", bands=["medium"])
    passrate(tmp_path, "--samples", "4")
    world.set(key, value)
    refused(world.write(), world.runs, 2, words)


def test_marks_of_another_model_are_refused_unless_that_is_said(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    world = world_of(tmp_path, passrate="marks.jsonl", bands=["medium"])
    passrate(tmp_path, "--samples", "4")
    rows = read_marks(tmp_path / "marks.jsonl")
    write_marks(tmp_path / "marks.jsonl", [{**row, "model": "f" * 64} for row in rows])
    refused(world.write(), world.runs, 2, ("digest ffffffffffff", "btx passrate", "other_marks"))
    world.set("grpo.other_marks", True)
    world.examine()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"band": "odd", "prompt_sha256": "x", "model": "y"}', "no json"])
def test_a_file_without_marks_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(RecipeError, match="holds no marks"):
        read_marks(tmp_path / "m.jsonl")


def test_an_item_without_a_mark_is_not_chosen() -> None:
    items = [Item("f:1", text, text, "7") for text in "abc"]
    marks = {items[0].digest: {"band": "hard"}, items[2].digest: {"band": "easy"}}
    assert chosen(items, marks, ["hard", "easy"]) == [0, 2]
    with pytest.raises(RecipeError, match="1 without a mark"):
        chosen(items, marks, ["medium"])
