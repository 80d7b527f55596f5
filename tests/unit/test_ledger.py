"""The ledger of compute: the sum of all trainings after the seed, each once, and the longest chain of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from btx.graph.step import Step
from btx.report.ledger import Spent, spent


class Plain(Step):
    """A step that trains nothing."""

    kind: ClassVar[str] = "plain"
    after: list[Step] = Field(default_factory=list)

    def run(self, out: Path, work: Path, emit: Any) -> dict[str, Any]:
        """Write."""
        (out / "name").write_text(self.label)
        return {}


class Training(Plain):
    """One that does."""

    kind: ClassVar[str] = "training"
    trains: ClassVar[bool] = True
    tokens: int

    def run(self, out: Path, work: Path, emit: Any) -> dict[str, Any]:
        """Say what it took: ten tokens a step, six FLOPs a token."""
        (out / "name").write_text(self.label)
        return {"tokens": self.tokens, "steps": self.tokens // 10, "training_flops": 6 * self.tokens}


@pytest.fixture
def steps(tmp_path: Path) -> dict[str, Step]:
    """A seed, two experts of other lengths that share it, their merge and its finetuning; all published."""
    made: dict[str, Step] = {}

    def add(name: str, tokens: int | None, *after: str) -> None:
        fields = {"root": tmp_path, "name": name, "after": [made[one] for one in after]}
        made[name] = Training(tokens=tokens, **fields) if tokens else Plain(**fields)
        made[name].build(lambda _event: None)

    add("seed", 5000)
    add("checked", None, "seed")
    add("short", 100, "checked")
    add("long", 300, "checked", "seed")
    add("merge", None, "short", "long", "seed")
    add("finetune", 50, "merge", "short")
    return made


def test_trainings_behind_the_seed_count_once_and_the_longest_chain_is_the_path(steps: dict[str, Step]) -> None:
    seed = steps["seed"]
    assert spent(steps["finetune"], seed) == Spent(450, 45, 2700.0, 350, 35, 2100.0)
    assert spent(steps["merge"], seed) == Spent(400, 40, 2400.0, 300, 30, 1800.0)
    assert spent(steps["long"], seed) == Spent(300, 30, 1800.0, 300, 30, 1800.0)
    assert spent(seed, seed) == Spent()
    assert spent(steps["checked"], seed) == Spent()


def test_parents_in_lists_are_parents(steps: dict[str, Step]) -> None:
    assert set(steps["merge"].parents) == {"training:short", "training:long", "training:seed"}
    assert steps["merge"].done
