"""The local engine: slots, failures that leave the others alone, logs, and signals forwarded once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from btx.engines.local import Ended, Job, Local
from btx.errors import BtxError, InterruptedRunError, ResourceError
from btx.events import Event, Note, Warned
from btx.graph.launch import raise_failed


def texts(events: list[Event]) -> list[str]:
    """The texts of notes."""
    return [event.text for event in events if isinstance(event, Note)]


PREAMBLE = """
import os, signal, sys, time
from btx.events import Failed, Note, Trained, Waiting
def say(event): print(event.line(), flush=True)
def note(text): say(Note(label, text))
"""


def job(folder: Path, label: str, code: str) -> Job:
    """A job that runs a piece of Python; `say(event)` and `note(text)` write lines as btx does."""
    return Job(label, [sys.executable, "-c", f"label = {label!r}\n{PREAMBLE}{code}"], folder / f"{label}.log")


def test_a_failed_job_leaves_the_others_running_and_its_word_is_kept(tmp_path: Path) -> None:
    events: list[Event] = []
    bad = job(tmp_path, "bad", "say(Failed(label, 'no luck', 0)); print('ouch', file=sys.stderr); sys.exit(4)")
    good = job(tmp_path, "good", "time.sleep(0.5); note('hello')")
    ended = Local(2).run([bad, good], events.append)
    assert (ended["bad"].code, ended["bad"].error) == (4, "no luck")
    assert ended["good"].code == 0
    assert Note("good", "hello") in events
    assert bad.log.read_text() == "ouch\n"


def test_no_more_jobs_run_at_once_than_there_are_slots(tmp_path: Path) -> None:
    word = "note(f'at {time.time()}')"
    code = f"{word}; time.sleep(0.3); {word}"
    events: list[Event] = []
    Local(1).run([job(tmp_path, n, code) for n in "abc"], events.append)
    times = [float(text.removeprefix("at ")) for text in texts(events) if text.startswith("at ")]
    assert times == sorted(times)
    assert len(times) == 6


def test_what_becomes_ready_is_started_beside_what_still_runs(tmp_path: Path) -> None:
    """The long job ends only when the later one has written a file, so they must run at the same time."""
    sign = tmp_path / "sign"
    long = job(tmp_path, "long", f"import pathlib\nwhile not pathlib.Path({str(sign)!r}).exists(): time.sleep(0.05)")
    later = [job(tmp_path, "later", f"import pathlib; pathlib.Path({str(sign)!r}).touch()")]
    ended = Local(2).run([long, job(tmp_path, "short", "")], lambda _e: None, lambda: [later.pop()] if later else [])
    assert {name: end.code for name, end in ended.items()} == {"long": 0, "short": 0, "later": 0}


def test_nothing_more_is_started_after_a_failure(tmp_path: Path) -> None:
    ended = Local(1).run(
        [job(tmp_path, "bad", "sys.exit(3)"), job(tmp_path, "good", "")], lambda _e: None,
        lambda: [job(tmp_path, "later", "")],
    )  # fmt: skip
    assert {name: end.code for name, end in ended.items()} == {"bad": 3, "good": 0}


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ({}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, ["4", "6"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5ba3, GPU-91c0,-1,7"}, ["GPU-5ba3", "GPU-91c0"]),
    ],
)
def test_gpus_that_one_may_use_are_shared_out_among_the_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: dict[str, str], wanted: list[str]
) -> None:
    """Not the machine's first ones, which may belong to someone else."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in visible.items():
        monkeypatch.setenv(name, value)
    code = "note('gpu ' + str(os.environ.get('CUDA_VISIBLE_DEVICES'))); time.sleep(0.5)"
    events: list[Event] = []
    Local(2, devices=2).run([job(tmp_path, n, code) for n in "ab"], events.append)
    assert sorted(text.removeprefix("gpu ") for text in texts(events) if text.startswith("gpu ")) == wanted


def test_of_amd_devices_those_that_one_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,3")
    code = "note('gpu ' + str(os.environ.get('HIP_VISIBLE_DEVICES'))); time.sleep(0.5)"
    events: list[Event] = []
    Local(2, devices=2).run([job(tmp_path, n, code) for n in "ab"], events.append)
    assert sorted(text.removeprefix("gpu ") for text in texts(events) if text.startswith("gpu ")) == ["2", "3"]


def test_a_signal_is_passed_on_once_and_what_waits_is_not_started(tmp_path: Path) -> None:
    code = (
        "seen = []\nsignal.signal(signal.SIGTERM, lambda *a: seen.append(1))\n"
        "note('ready')\n"
        "time.sleep(1.0); time.sleep(0.5)\nsys.exit(70 + len(seen))"
    )

    def interrupt(event: Event) -> None:
        if isinstance(event, Note) and event.text == "ready":
            threading.Thread(target=lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGUSR1))).start()

    ended = Local(1).run([job(tmp_path, "a", code), job(tmp_path, "b", "sys.exit(0)")], interrupt)
    assert ended["a"].code == 71
    assert ended["b"].code == 75


def test_a_job_that_our_signal_meets_before_it_can_save_counts_as_interrupted(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Note) and event.text == "ready":
            os.kill(os.getpid(), signal.SIGTERM)

    code = "note('ready')\ntime.sleep(60)"
    assert Local(1).run([job(tmp_path, "a", code)], interrupt)["a"].code == 75


def test_the_exit_code_that_a_launcher_hides_is_the_one_that_its_process_told(tmp_path: Path) -> None:
    told = job(tmp_path, "told", "say(Failed(label, 'nan', 4)); sys.exit(1)")
    silent = job(tmp_path, "silent", "sys.exit(1)")
    ended = Local(2).run([Job(j.label, j.argv, j.log, launcher=True) for j in (told, silent)], lambda _e: None)
    assert ended == {"told": Ended(4, "nan"), "silent": Ended(1)}


def test_a_launcher_that_our_signal_meets_before_its_processes_can_save_counts_as_interrupted(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Note) and event.text == "ready":
            os.kill(os.getpid(), signal.SIGTERM)

    code = "signal.signal(15, lambda *a: sys.exit(1))\nnote('ready')\n"
    a = job(tmp_path, "a", code + "time.sleep(60)")
    assert Local(1).run([Job(a.label, a.argv, a.log, launcher=True)], interrupt)["a"].code == 75


def test_a_job_that_is_killed_is_reported_with_its_signal(tmp_path: Path) -> None:
    ended = Local(1).run([job(tmp_path, "a", "import os; os.kill(os.getpid(), 9)")], lambda _e: None)
    assert ended["a"].code == -9


def test_a_killed_job_is_called_a_lack_of_memory_and_an_interrupted_one_is_not_called_failed(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, "") for name in ("big", "late")]
    with pytest.raises(ResourceError, match=r"big was killed \(signal 9\).*memory.*micro_batch"):
        raise_failed({"big": Ended(-9), "late": Ended(0)}, jobs)
    with pytest.raises(InterruptedRunError, match=r"^late: not started") as caught:
        raise_failed({"big": Ended(0), "late": Ended(75, "not started, as the run was asked to stop.")}, jobs)
    assert "failed" not in str(caught.value)
    assert "Log:" not in str(caught.value)


def test_a_job_is_named_once_in_the_sentence_of_its_end(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "train:a", "")]
    for end, said in [
        (Ended(75, "train:a was asked to stop."), "train:a: was asked to stop."),
        (Ended(4, "train:a: 2 steps in a row."), "train:a failed (exit code 4): 2 steps in a row."),
    ]:
        with pytest.raises(BtxError) as caught:
            raise_failed({"train:a": end}, jobs)
        assert str(caught.value) == said


def patient(folder: Path, label: str, code: str) -> Job:
    """A job that may be silent for a second."""
    return replace(job(folder, label, code), patience=1.0)


WORD = "say(Trained(label, {0}, 2, 1.0, 1.0))\n"


def test_a_job_that_hangs_is_started_again_once_and_the_others_go_on(tmp_path: Path) -> None:
    sign, events = tmp_path / "sign", list[Event]()
    once = f"""import pathlib
first = not pathlib.Path({str(sign)!r}).exists(); pathlib.Path({str(sign)!r}).touch()
{WORD.format(1)}
time.sleep(60 if first else 0)"""
    steady = "".join(WORD.format(1) + "time.sleep(0.4)\n" for _ in range(6))
    ended = Local(2).run([patient(tmp_path, "hangs", once), patient(tmp_path, "steady", steady)], events.append)
    assert {name: end.code for name, end in ended.items()} == {"hangs": 0, "steady": 0}
    warnings = [event for event in events if isinstance(event, Warned)]
    assert [(w.label, "started again" in w.text) for w in warnings] == [("hangs", True)]


def test_a_job_that_hangs_twice_has_failed_with_its_children(tmp_path: Path) -> None:
    child = f"""import os, subprocess, pathlib
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path)!r}, str(own.pid)).touch()
time.sleep(60)"""
    ended = Local(1).run([patient(tmp_path, "hangs", child)], lambda _e: None)["hangs"]
    assert (ended.code, ended.error) == (
        ResourceError.exit_code, "sent no event for 0.0166667 minutes, and hung again after a restart."
    )  # fmt: skip
    children = [int(file.name) for file in tmp_path.iterdir() if file.name.isdecimal()]
    assert len(children) == 2
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
                   for pid in children)  # fmt: skip


def test_a_job_that_waits_or_has_done_its_last_step_may_be_silent(tmp_path: Path) -> None:
    waits = "say(Waiting(label, 'waits')); time.sleep(2)"
    saves = WORD.format(2) + "time.sleep(2)"
    ended = Local(2).run([patient(tmp_path, "waits", waits), patient(tmp_path, "saves", saves)], lambda _e: None)
    assert {name: end.code for name, end in ended.items()} == {"waits": 0, "saves": 0}


@pytest.mark.parametrize(("memory", "most"), [(10, 1), (12, 2), (5, 1), (None, 3)])
def test_jobs_at_once_take_no_more_memory_than_there_is_and_one_alone_may(
    tmp_path: Path, memory: int | None, most: int
) -> None:
    events: list[Event] = []
    code = "note('begins'); time.sleep(0.4); note('ends')"
    jobs = [replace(job(tmp_path, name, code), memory=6) for name in "abc"]
    ended = Local(3, memory=memory).run(jobs, events.append)
    assert [ended[name].code for name in "abc"] == [0, 0, 0]
    at_once, seen = 0, []
    for text in texts(events):
        at_once += {"begins": 1, "ends": -1}.get(text, 0)
        seen.append(at_once)
    assert max(seen) <= most


def test_a_small_job_goes_before_a_large_one_that_does_not_fit_yet(tmp_path: Path) -> None:
    events: list[Event] = []
    sizes = {"a": 8, "b": 8, "c": 2}
    jobs = [replace(job(tmp_path, name, "time.sleep(0.5)"), memory=size) for name, size in sizes.items()]
    Local(2, memory=10).run(jobs, events.append)
    assert [event.label for event in events if isinstance(event, Note)] == ["a", "c", "b"]
