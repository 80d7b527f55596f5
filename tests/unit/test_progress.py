"""What is printed where no terminal is attached: every kind of event in words."""

from __future__ import annotations

from typing import Any

import pytest

from btx.report.progress import Lines

EVENTS: list[tuple[dict[str, Any], str]] = [
    ({"label": "train:a", "done": 1, "total": 2, "loss": 1.5, "tokens_per_second": 1234.5}, "step 1/2  loss 1.500"),
    ({"label": "merge", "done": 1200, "total": 3300, "unit": "MB"}, "1,200 of 3,300 MB"),
    ({"label": "evaluate", "done": 1, "total": 6, "note": "scores seed"}, "scores seed"),
    ({"label": "train:a", "ended": 5}, "exit code 5"),
    ({"label": "finetune", "warning": "layer 0: dead"}, "warning: layer 0: dead"),
]


@pytest.mark.parametrize(("event", "words"), EVENTS, ids=lambda x: str(x)[:30])
def test_events_are_told_in_words(event: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Lines().tell(event)
    said = capsys.readouterr().err
    assert words in said
    assert event["label"] in said


def test_one_line_in_ten_seconds_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for done in (1, 2, 3, 4):
        lines.tell({"label": "merge", "done": done, "total": 4, "unit": "MB"})
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["1", "4"]
