"""A training that diverges is a result, the worst one: the comparison goes on, says so, and remembers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from btx.compare.rounds import Rounds, RunSteps
from btx.errors import ArtifactError, DivergedError
from btx.graph.artifact import publish, write_json
from btx.graph.step import Step
from btx.report.comparison import judged
from btx.report.comparison_console import table
from btx.report.comparison_page import page
from btx.steps.comparison import Comparison
from btx.steps.measure import NUMBERS, ROWS, Measure, not_finite
from btx.steps.train import require_finite
from tests.support.compared import rounds_of
from tests.support.reports import COMPARED


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's folder is relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def rate_of(step: Any) -> float:
    """The learning rate of a training."""
    return float((step.train if "train" in type(step).model_fields else step.settings).learning_rate)


def pretended(diverges: Callable[[Step], bool], ran: list[str]) -> RunSteps:
    """Runs nothing: a measurement is a number by its model's rate, unless a training before it diverges."""

    def rests_on(step: Step, bad: set[str]) -> bool:
        return step.key in bad or any(rests_on(parent, bad) for parent in step.parents.values())

    def produce(step: Measure) -> Callable[[Path], None]:
        def write(out: Path) -> None:
            import pyarrow
            from pyarrow import parquet

            trained = step.model.trains
            loss = abs(rate_of(step.model) - 2e-3) + 1 if trained else 9.0
            write_json(out / NUMBERS, {name: {"bits_per_byte": loss} for name in step.tokens})
            parquet.write_table(pyarrow.Table.from_pylist([]), out / ROWS)

        return write

    def run_steps(title: str, steps: list[Step]) -> None:
        todo = [step for step in steps if step.trains and not step.exists]
        bad = {step.key: step.label for step in todo if diverges(step)}
        ran.extend(step.label for step in todo)
        for step in steps:
            if isinstance(step, Measure) and not step.done and not rests_on(step, set(bad)):
                publish(step.folder, produce(step), {"inputs": {}, "facts": {}})
        if bad:
            error = DivergedError("NaN")
            error.failed = tuple(bad.values())
            raise error

    return run_steps


def carried(rounds: Rounds, diverges: Callable[[Step], bool]) -> tuple[Comparison, list[str], list[str]]:
    """The comparison that comes of it, the trainings that ran and what was said."""
    ran: list[str] = []
    told: list[str] = []
    return rounds.run(pretended(diverges, ran), told.append), ran, told


ARMS: dict[str, Any] = {"upcycle": {}, "btx": {}}
SAID: dict[str, Any] = {"rates": [1e-3, 2e-3, 4e-3], "screen": 1, "extensions": 1, "seeds": [0, 1]}


def test_a_diverged_trial_counts_as_the_worst_and_is_not_tried_again(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, ARMS, **SAID)
    found, ran, told = carried(rounds, lambda step: rate_of(step) > 3e-3)
    assert {run.arm for run in found.runs} == {"dense", "upcycle", "btx"}
    assert not found.lost
    assert all("0.004" in choice.diverged[0] for choice in found.choices)
    assert all("remove" in said for said in told)
    diverged = [label for label in ran if "0.004" in label and "upcycled" in label]
    assert len(diverged) == 1  # not in each round
    again = rounds_of(tmp_path, ARMS, **SAID)
    found_again, ran, _ = carried(again, lambda _step: False)
    assert found_again.key == found.key
    assert not [label for label in ran if "0.004" in label]
    for file in (tmp_path / "runs").rglob("*.diverged"):
        file.unlink()
    rounds = rounds_of(tmp_path, ARMS, **SAID)
    assert rounds.searching()  # whoever removes the files has them tried again


def test_a_damaged_measurement_is_named_with_the_remedy(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, ARMS, **SAID)
    found, _, _ = carried(rounds, lambda _step: False)
    file = next(iter(found.choices[0].screened.values())).folder / NUMBERS
    file.write_text(file.read_text().replace("1", "0"))  # of the same size
    with pytest.raises(ArtifactError, match=rf"{NUMBERS} was changed after it was written.*Remove"):
        carried(rounds_of(tmp_path, ARMS, **SAID), lambda _step: False)


def test_an_arm_that_always_diverges_is_lost_and_the_others_are_compared(tmp_path: Path) -> None:
    found, _, _ = carried(rounds_of(tmp_path, ARMS, **SAID), lambda step: step.kind == "upcycled")
    assert {run.arm for run in found.runs} == {"dense", "btx"}
    assert [(one.arm, one.where) for one in found.lost] == [("upcycle", "at every rate that was tried")]


def test_an_arm_that_diverges_in_a_final_is_lost_there(tmp_path: Path) -> None:
    found, _, _ = carried(
        rounds_of(tmp_path, ARMS, **SAID), lambda step: step.kind == "upcycled" and step.settings.seed == 1  # type: ignore[attr-defined]
    )  # fmt: skip
    assert {run.arm for run in found.runs} == {"dense", "btx"}
    assert [(one.arm, one.where) for one in found.lost] == [("upcycle", "on block 1 at the chosen 0.002")]


def test_without_its_control_there_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the control dense diverged at every rate"):
        carried(rounds_of(tmp_path, ARMS, **SAID), lambda step: step.kind == "dense")


def test_what_was_trained_is_finite_in_the_dtype_that_is_written() -> None:
    state = {"a": torch.ones(3), "b": torch.tensor([1.0, 1e5])}
    require_finite("train:x", 2.0, state, torch.float32)
    with pytest.raises(DivergedError, match=r"after the last step b holds 1 values .* in float16"):
        require_finite("train:x", 2.0, state, torch.float16)
    with pytest.raises(DivergedError, match="none of its steps had a finite loss"):
        require_finite("train:x", float("nan"), state, torch.float32)


def test_the_first_number_that_is_not_finite_is_named() -> None:
    assert not_finite({"math": {"a": 1.0, "n": 3}, "t": [1.0, (2.0,)], "s": "text"}) == ""
    assert not_finite({"math": {"a": 1.0, "b": float("inf")}}) == "math: b"
    assert not_finite({"t": [{"x": [0.0, float("nan")]}]}) == "t: 0: x: 1"


def test_an_arm_that_is_lost_is_named_and_the_page_stands(tmp_path: Path) -> None:
    lost = {"arm": "btm", "conversion": "btm", "budget": 0, "tokens": 1000, "rates": [2e-3], "blocks": [1],
            "where": "on block 1 at the chosen 0.002"}  # fmt: skip
    results = COMPARED | {"lost": [lost]}
    results |= judged(results)
    assert "; btm diverged on block 1 at the chosen 0.002. Mean bits per byte" in results["answer"]
    assert "btm diverged on block 1 at the chosen 0.002, at 1,000 tokens." in page(results)
    _, rows = table(results, 0)
    assert rows[-1] == ["btm", "", "", "", "diverged on block 1 at the chosen 0.002", "", "", "", "0.002"]


def test_with_the_control_alone_left_nothing_is_judged() -> None:
    alone = COMPARED | {"runs": [run for run in COMPARED["runs"] if run["arm"] == "dense"]}
    alone |= judged(alone)
    assert alone["answer"] == "At 1,000 tokens after the seed, there is no other arm left."
    assert "<h2>1,000 tokens after the seed</h2>" in page(alone)
