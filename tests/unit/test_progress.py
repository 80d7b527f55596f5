"""Output without a terminal: every kind of event in words."""

from __future__ import annotations

import pytest

from btx.events import KINDS, Event, Exited, Failed, Note, Progress, Trained, Waiting, Warned, parse
from btx.report.progress import Lines

EVENTS: list[tuple[Event, str]] = [
    (Trained("train:a", 1, 2, 1.5, 1234.5), "step 1/2  loss 1.500  1,234 tokens/s"),
    (Progress("merge", 1200, 3300, "MB"), "1,200 of 3,300 MB"),
    (Note("evaluate", "scores seed"), "scores seed"),
    (Waiting("merge", "waits for pid 1"), "waits for pid 1"),
    (Exited("train:a", 5), "exit code 5"),
    (Warned("finetune", "layer 0: dead"), "warning: layer 0: dead"),
]


@pytest.mark.parametrize(("event", "words"), EVENTS, ids=lambda x: str(x)[:30])
def test_events_are_told_in_words(event: Event, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Lines().emit(event)
    said = capsys.readouterr().err
    assert words in said
    assert event.label in said


def test_one_line_in_ten_seconds_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for done in (1, 2, 3, 4):
        lines.emit(Progress("merge", done, 4, "MB"))
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["1", "4"]


def test_an_event_is_the_same_behind_a_line_and_what_is_none_is_left_out() -> None:
    events = [*(event for event, _ in EVENTS), Failed("merge", "no\nluck", 3)]
    assert [parse(event.line()) for event in events] == events
    assert {type(event) for event in events} == {*KINDS.values()}
    assert all("\n" not in event.line() for event in events)
    for line in (
        "",
        "loading...",
        "[1]",
        "3",
        '{"label": "a"}',
        '{"event": "Note"}',
        '{"event": "None", "label": "a"}',
        b"\xff",
    ):
        assert parse(line) is None
