"""The scheduler: parents first, trainings in parallel, and steps that become ready meanwhile handed to the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from btx.errors import ArtifactError
from btx.events import Event, Note
from btx.graph.scheduler import link, run_steps
from btx.graph.step import Step


class Plain(Step):
    """A step that writes its name."""

    kind: ClassVar[str] = "plain"
    after: dict[str, Step] = Field(default_factory=dict)
    number: int = 0

    def run(self, out: Path, work: Path, emit: Any) -> dict[str, Any]:
        """Write."""
        (out / "name").write_text(self.label)
        emit(Event(self.label))
        return {}


class Training(Plain):
    """A step that runs as a job."""

    kind: ClassVar[str] = "training"
    trains: ClassVar[bool] = True


def graph(root: Path) -> list[Step]:
    """Two trainings after one step, one of them slow; a step after each, and one after all."""
    first = Plain(root=root, name="first")
    a, b = (Training(root=root, name=n, number=i, after={"first": first}) for i, n in enumerate("ab"))
    after = [Plain(root=root, name=f"after-{s.name}", after={"it": s}) for s in (a, b)]
    return [first, a, b, *after, Plain(root=root, name="last", number=1, after={s.label: s for s in after})]


def test_what_becomes_ready_is_handed_over_while_jobs_run_and_the_rest_runs_here(tmp_path: Path) -> None:
    steps = graph(tmp_path)
    order: list[str] = []
    told = lambda event: None if isinstance(event, Note) else order.append(event.label)  # noqa: E731

    def launch(ready: list[Step], more: Callable[[], list[Step]]) -> None:
        assert [s.label for s in ready] == ["training:a", "training:b"]
        ready[0].build(told)
        found = more()
        assert [s.label for s in found] == ["plain:after-a"]
        assert more() == []  # each is handed over once
        found[0].build(told)
        ready[1].build(told)

    assert run_steps(steps, launch=launch, emit=told) == len(steps)
    assert order == ["plain:first", "training:a", "plain:after-a", "training:b", "plain:after-b", "plain:last"]
    assert run_steps(steps, launch=launch, emit=told) == 0


def test_a_step_that_is_undone_again_ends_the_run(tmp_path: Path) -> None:
    steps = graph(tmp_path)[:2]
    with pytest.raises(ArtifactError, match="done, and undone again"):
        run_steps(steps, launch=lambda _ready, _more: None, emit=lambda _event: None)


def test_what_two_labels_need_runs_once_and_both_are_links_to_it(tmp_path: Path) -> None:
    """Even if both train, and an engine could start them at once."""
    ran: list[str] = []
    for kind in (Plain, Training):
        twins = [kind(root=tmp_path, name=name) for name in "ab"]
        assert twins[0].folder == twins[1].folder

        def launch(ready: list[Step], _more: Any) -> None:
            ran.extend(step.label for step in ready)
            ready[0].build(lambda _event: None)

        count = run_steps(twins, launch=launch, emit=lambda _event: None)
        assert count == 1
        for step in twins:
            link(step)
            assert step.short.resolve() == step.folder.resolve()
            assert step.short.name == f"{kind.kind}-{step.name}"
    assert ran == ["training:a"]
    link(twins[0])  # again, and over an older one
    twins[0].short.unlink()
    twins[0].short.symlink_to("steps/older")
    link(twins[0])
    assert (twins[0].short / "name").read_text() == "training:a"


@pytest.mark.parametrize("several", [False, True])
def test_with_room_for_several_what_is_ready_beside_a_training_starts_with_it(tmp_path: Path, several: bool) -> None:
    steps = [Plain(root=tmp_path, name="plain"), Training(root=tmp_path, name="train", number=1)]
    launched: list[list[str]] = []

    def launch(ready: list[Step], _more: Any) -> None:
        launched.append([step.label for step in ready])
        for step in ready:
            step.build(lambda _event: None)

    assert run_steps(steps, launch=launch, emit=lambda _event: None, several=several) == 2
    assert launched == [["training:train", "plain:plain"] if several else ["training:train"]]


def test_a_step_on_a_twin_of_its_parent_is_done_where_the_other_is(tmp_path: Path) -> None:
    """Parents count by key, not by label: two experts may be the same checkpoint under two names."""
    one, other = (Plain(root=tmp_path, name=f"on-{n}", after={"it": Plain(root=tmp_path, name=n)}) for n in "ab")
    steps = [*one.after.values(), *other.after.values(), one, other]
    assert run_steps(steps, launch=lambda _ready, _more: None, emit=lambda _event: None) == 2
    assert all(step.done for step in steps)
