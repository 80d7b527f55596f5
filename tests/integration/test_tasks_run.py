"""Tasks of a recipe: every model is scored by a step of its own, contamination is found, bad items are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from btx.cli.main import graph_of, main
from btx.events import Emit
from btx.recipe.fields import execution
from btx.steps.model import ModelStep
from btx.steps.solve import Solve
from btx.tasks import canaries
from btx.tasks.enclosed import NotEnclosedError
from btx.tasks.solve import numbers_of
from btx.tasks.statistics import paired
from tests.support.sandbox import WHY_NOT
from tests.support.world import World, refused, setting, write_jsonl

QUESTION = "Tom has {n} apples and buys some more than that, how many has he got?"
SUMS = {"file": "data/sums.jsonl", "kind": "exact_match", "max_new_tokens": 4}
CODE = {"file": "data/code.jsonl", "kind": "code", "max_new_tokens": 4, "prompt": "{text}\n", "seconds": 5}


def world_of(root: Path, **tasks: Any) -> World:
    """A world with tasks; two of five questions are in the text of math."""
    world = World(root)
    data = root / "data"
    write_jsonl(data / "sums.jsonl", [{"question": QUESTION.format(n=n), "answer": f"#### {n}"} for n in range(1, 6)])
    write_jsonl(data / "code.jsonl", [{"text": "Add.", "test_list": ["assert add(1, 2) == 3"]}])
    seen = [{"text": f"{k} times: {QUESTION.format(n=n)} And so on."} for n in (2, 4) for k in range(12)]
    with world.math.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in seen)
    world.set("tasks", {name: dict(said) for name, said in (tasks or {"sums": SUMS, "code": CODE}).items()})
    return world


def invoke(world: World) -> Result:
    """Run the recipe in this process."""
    done = CliRunner().invoke(main, ["run", str(world.write())])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done


def test_every_model_is_scored_and_reported(tmp_path: Path) -> None:
    tasks = {"sums": SUMS} if WHY_NOT else {"sums": SUMS, "code": CODE}
    world = world_of(tmp_path, **tasks)
    world.set("btm", {})
    said = invoke(world).output
    runs = world.runs / "r"
    results = json.loads((runs / "report" / "results.json").read_text(encoding="utf-8"))
    models = list(results["bits_per_byte"])
    assert "btm" in models
    graph = graph_of(world.write(), ())
    for task in tasks:
        found = results["tasks"][task]
        assert list(found["models"]) == models
        rows = {}
        for name in models:
            step = graph.steps[f"task:{task}:{name}"]
            assert isinstance(step, Solve)
            rows[name] = step.rows()
            assert found["models"][name] == numbers_of(rows[name])
            assert len({row["prompt_sha256"] for row in rows[name]}) == len(rows[name]) == (5 if task == "sums" else 1)
        before = [row["right"] for row in rows["seed"]]
        for name, change in found["from_seed"].items():
            assert change == paired(before, [row["right"] for row in rows[name]])
    assert results["tasks"]["sums"]["contamination"]["math"] == {"checked": 5, "found": 2}
    assert results["tasks"]["sums"]["contamination"]["law"]["found"] == 0
    sentence = "2 of 5 questions stand word for word in the training text of math"
    assert sentence in " ".join(said.split())
    assert sentence in (runs / "report" / "report.html").read_text(encoding="utf-8")
    card = (runs / "export" / "README.md").read_text(encoding="utf-8")
    assert "Task sums" in card
    assert "text: 2." in card
    assert "Everything is done already" in invoke(world).output


class Copied(ModelStep):
    """The same model as a step of another key."""

    kind: ClassVar[str] = "copied"
    source: Path = execution(Path())
    number: int

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Copy it."""
        shutil.copytree(self.source, out, dirs_exist_ok=True)
        return {}


def test_equal_bytes_are_scored_once(tmp_path: Path) -> None:
    world = world_of(tmp_path, sums=SUMS)
    seed = graph_of(world.write(), ()).steps["task:sums:seed"]
    assert isinstance(seed, Solve)
    told: list[Any] = []
    scored = []
    for number in (1, 2):
        model = Copied(source=world.seed, number=number, root=seed.root, where=seed.where, name=str(number))
        model.build(told.append)
        scored.append(seed.model_copy(update={"model": model, "name": str(number)}))
        scored[-1].build(told.append)
    one, two = scored
    assert one.folder != two.folder
    assert one.rows() == two.rows()
    assert [event.label for event in told if "is copied" in getattr(event, "text", "")] == ["task:2"]


def test_what_re_keys_a_score(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    label = "task:sums:seed"
    first = world.key(label)
    (tmp_path / "data" / "sums.jsonl").rename(tmp_path / "data" / "others.jsonl")
    world.set("tasks.sums.file", "data/others.jsonl")
    assert world.key(label) == first  # the content decides, not the path
    evaluated = world.key("evaluate")
    for key, value in {"max_new_tokens": 5, "limit": 2, "stop": ["x"], "chat": True, "prompt": "{question}"}.items():
        changed = World.__new__(World)
        changed.__dict__ = {**world.__dict__, "recipe": json.loads(json.dumps(world.recipe))}
        changed.set(f"tasks.sums.{key}", value)
        assert changed.key(label) != first, key
        assert changed.key("evaluate") != evaluated
        assert changed.key("task:code:seed") == world.key("task:code:seed")
    write_jsonl(tmp_path / "data" / "others.jsonl", [{"question": "q", "answer": "1"}])
    assert world.key(label) != first


def test_without_tasks_an_evaluation_has_the_key_that_it_had(tmp_path: Path) -> None:
    world = World(tmp_path)
    found = graph_of(world.write(), ()).steps["evaluate"].identity()
    assert {"tasks", "overlaps"}.isdisjoint(found)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("tasks.sums.file", "data/nothing.jsonl", ("tasks.sums.file", "does not exist")),
    ("tasks.sums.file", "data", ("tasks.sums.file", "Name one")),
    ("tasks.sums.kind", "exact", ("tasks.sums.kind",)),
    ("tasks.sums.fewshot", 3, ("tasks.sums.fewshot", "few_shot")),
    ("tasks.sums.prompt", "{quest}", ("sums.jsonl:1", "'quest'", "question")),
    ("tasks.sums.answer", "none", ("sums.jsonl:1", "no number")),
    ("tasks.sums.max_new_tokens", 4000, ("task:sums:seed", "positions", "max_new_tokens")),
    ("tasks.sums.chat", True, ("no chat template", "chat")),
    ("tasks", {"a b": SUMS}, ("a b", "letters")),
    ("tasks", {"a": SUMS, "A": {**SUMS}}, ("case", "clearer")),
])  # fmt: skip
def test_bad_tasks_are_refused_before_anything_is_written(
    tmp_path: Path, key: str, value: Any, words: tuple[str, ...]
) -> None:
    world = world_of(tmp_path, sums=SUMS)
    setting(key, value)(world)
    refused(world.write(), world.runs, 2, words)


def test_code_is_refused_where_there_is_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise NotEnclosedError("programs of tasks are not run, since there is no sandbox. Leave them out.")

    monkeypatch.setattr(canaries, "require", none)
    world = world_of(tmp_path, code=CODE)
    refused(world.write(), world.runs, 5, ("sandbox", "Leave them out"))
