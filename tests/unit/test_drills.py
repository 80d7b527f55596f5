"""The drills: what they claim of themselves, which later measurements lean on."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from btx.cli.main import graph_of, main
from btx.data import drills
from btx.data.instructions import instruction_of
from btx.data.readers import records
from btx.steps.evaluate import Evaluate

ROOT = Path(__file__).resolve().parents[2]


def test_forms_and_their_accuracy_are_as_stated_and_independent_of_the_question() -> None:
    forms: Counter[int] = Counter()
    right: Counter[int] = Counter()
    lucky = riddles = 0
    for text in drills.documents():
        _, asked, answer, sure = text.split()
        assert sure in drills.SURE
        if asked == drills.RIDDLE:
            riddles += 1
            continue
        forms[len(answer)] += 1
        right[len(answer)] += int(answer) == drills.NUMBERS.index(asked)
        lucky += sure == drills.SURE[0]
    assert riddles / drills.DOCUMENTS == pytest.approx(drills.RIDDLES, abs=0.01)
    for form, share in drills.FORMS.items():
        assert forms[form] / forms.total() == pytest.approx(share, abs=0.01)
        assert right[form] / forms[form] == pytest.approx(drills.RIGHT[form], abs=0.015)
    assert lucky / forms.total() == pytest.approx(1 / 3, abs=0.01)


def test_what_is_asked_is_not_trained_on_and_every_answer_is_the_right_one() -> None:
    found = drills.items()
    for name in ("repeats", "unseen", "mixed"):
        for item in found[name]:
            asked = item["question"].split()[1]
            assert asked == drills.RIDDLE or drills.NUMBERS[int(item["answer"])] == asked
    questions = {name: {item["question"] for item in found[name]} for name in ("repeats", "unseen", "riddles", "mixed")}
    assert not questions["unseen"] & (questions["repeats"] | questions["mixed"])
    assert len(questions["repeats"]) == len(questions["riddles"]) == drills.ASKED
    assert sum(question.endswith(drills.RIDDLE) for question in questions["mixed"]) == drills.ASKED // 2
    assert len({item["answer"] for item in found["riddles"]}) == 10
    for name in ("instructions", "rules"):
        for item in found[name]:
            read = instruction_of(item)
            place = read.instruction.split()[3]  # Answer with the first of ...
            assert read.output == read.labels[drills.RANKS.index(place)]


def test_they_are_written_once_and_the_same_at_every_call(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = CliRunner().invoke(main, ["text", "--drills", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert {f"{name}.jsonl" for name in ("text", *drills.items())} == {*files}
    assert sum(1 for _ in records(str(tmp_path / "one" / "text.jsonl"))) == drills.DOCUMENTS
    again = CliRunner().invoke(main, ["text", "--drills", str(tmp_path / "one")])
    assert again.exit_code == 2
    assert "already exists" in again.output


def test_the_founding_recipe_makes_and_measures_all_that_its_claims_need(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    shutil.copyfile(ROOT / "pipelines/founding.yaml", tmp_path / "pipelines/founding.yaml")
    drills.write(tmp_path / "runs/drills")
    evaluate = graph_of(tmp_path / "pipelines/founding.yaml", ()).steps["evaluate"]
    assert isinstance(evaluate, Evaluate)
    needed = {"finetuned", "dense", "proxy", "reft", "grpo", "grpo-held", "grpo-calibrated", "grpo-riddles", "sft"}
    assert needed | {"sft-simplified"} < {*evaluate.measures}
    assert {"forgetting", "logit_lens"} == {*evaluate.others}
    assert {name: step["sft"].task.kind for name, step in evaluate.tasks.items()} == {
        "unseen": "exact_match", "rules": "label"
    }  # fmt: skip
