"""A merge killed with signal 9 at any tensor resumes to the same bytes, without rewriting a finished shard."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from btx.checkpoints import writer
from btx.checkpoints.reader import one_thread, opened
from btx.checkpoints.writer import Resume
from btx.merge.write import write_moe
from btx.recipe.merge_settings import MergeSettings
from tests.support.models import config_of, save_model

SHARD = 20_000  # bytes: several tensors of the pico models


def merge(folders: list[Path], out: Path, work: Path, kill_at: int | None) -> None:
    """Merge as the step does; die while the tensor of that number is being written."""
    writer.SHARD_BYTES = SHARD
    seen = 0

    def progress(_file: Path, _done: int, _total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    out.mkdir(exist_ok=True)
    with one_thread(), ExitStack() as stack:
        models = {f"m{i}": stack.enter_context(opened(f)) for i, f in enumerate(folders)}
        write_moe(out, models, models["m0"], MergeSettings(), 2, Resume(work, "these parents"), progress)


def in_child(folders: list[Path], out: Path, work: Path, kill_at: int | None) -> int | None:
    """Merge in a process of its own; returns its exit code."""
    child = multiprocessing.get_context("spawn").Process(target=merge, args=(folders, out, work, kill_at))
    child.start()
    child.join()
    return child.exitcode


def written(folder: Path) -> dict[str, int]:
    """When each shard was last written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kill_at", [1, 23, 41])
def test_a_killed_merge_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", SHARD)
    folders = [save_model(tmp_path / str(i), config_of("qwen2"), noise=0.05 * i) for i in range(2)]
    merge(folders, tmp_path / "undisturbed", tmp_path / "other", None)
    assert in_child(folders, tmp_path / "first", tmp_path / "work", kill_at) == -signal.SIGKILL
    before = written(tmp_path / "work")
    assert len(before) < len(written(tmp_path / "undisturbed"))
    merge(folders, tmp_path / "second", tmp_path / "work", None)
    after = written(tmp_path / "second")
    assert {name: after[name] for name in before} == before
    names = sorted(p.name for p in (tmp_path / "undisturbed").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
