"""Weights written shard by shard: the bytes of safetensors itself, hashed while written, finished shards reused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from btx.checkpoints.layouts import INDEX, SINGLE
from btx.checkpoints.reader import opened
from btx.checkpoints.writer import Resume, TensorSpec, whole, write_weights
from btx.errors import ArtifactError
from btx.graph.artifact import file_digest

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6), shard=st.integers(1, 400))
def test_what_is_written_in_shards_is_read_back_by_us_and_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[tuple[int, ...], torch.dtype]], shard: int
) -> None:
    out = tmp_path_factory.mktemp("out")
    tensors = {f"t{n}": torch.arange(math.prod(s)).reshape(s).to(d) for n, (s, d) in enumerate(rows)}
    write_weights(out, [whole(name, t, t.dtype) for name, t in tensors.items()], shard_bytes=shard)
    (out / "config.json").write_text('{"model_type": "x"}')
    with opened(out) as found:
        assert list(found.entries) == list(tensors)
        assert all(torch.equal(found.read(n), t) and found.read(n).dtype is t.dtype for n, t in tensors.items())
    theirs = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    if len(sizes) > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    else:
        assert [p.name for p in out.glob("*.safetensors")] == [SINGLE]


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, [whole("t", tensor, torch.float32)])
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


def test_a_view_is_written_as_it_is_seen(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    write_weights(tmp_path, [whole("t", tensor.T, torch.float32)])
    assert torch.equal(load_file(tmp_path / SINGLE)["t"], tensor.T)


@pytest.mark.parametrize("pieces", [[], [torch.zeros(2)] * 2, [torch.zeros(3)], [torch.zeros(2).half()]])
def test_pieces_that_are_not_as_planned_are_a_bug_of_ours(tmp_path: Path, pieces: list[torch.Tensor]) -> None:
    with pytest.raises(AssertionError):
        write_weights(tmp_path, [TensorSpec("t", torch.float32, (2,), lambda: pieces)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nothing_that_is_no_number_is_ever_written(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ArtifactError, match="t would hold NaN or infinite values"):
        write_weights(tmp_path, [whole("t", torch.tensor([1.0, bad]), torch.float32)])


def test_pieces_of_any_cut_are_the_same_bytes_and_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    tensor = torch.arange(30.0).reshape(5, 6)
    for name, size in (("a", 30), ("b", 7), ("c", 1)):
        (tmp_path / name).mkdir()
        found = write_weights(
            tmp_path / name, [TensorSpec("t", torch.float32, (5, 6), lambda size=size: tensor.flatten().split(size))]
        )
        assert found == {SINGLE: file_digest(tmp_path / name / SINGLE)}
    assert len({file_digest(tmp_path / name / SINGLE) for name in "abc"}) == 1


class Crashing:
    """Tensors of four shards that count how often each is made, and fail at one of them."""

    def __init__(self, fails: int | None) -> None:
        self.fails, self.made = fails, [0] * 4

    def rows(self) -> list[TensorSpec]:
        """One tensor per shard."""
        return [TensorSpec(f"t{n}", torch.float32, (8,), lambda n=n: self._make(n)) for n in range(4)]

    def _make(self, n: int) -> list[torch.Tensor]:
        self.made[n] += 1
        if n == self.fails:
            raise KeyboardInterrupt
        return [torch.full((8,), float(n))]


def write(out: Path, crashing: Crashing, resume: Resume | None) -> dict[str, str]:
    """Write four shards."""
    out.mkdir(exist_ok=True)
    return write_weights(out, crashing.rows(), shard_bytes=32, resume=resume)


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_finished_shards_are_not_written_again(tmp_path: Path, fails: int) -> None:
    undisturbed = write(tmp_path / "undisturbed", Crashing(None), None)
    resume = Resume(tmp_path / "work", "seed 1")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "first", Crashing(fails), resume)
    again = Crashing(None)
    assert write(tmp_path / "second", again, resume) == undisturbed
    assert again.made == [0] * fails + [1] * (4 - fails)
    for file in (*undisturbed, INDEX):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


@pytest.mark.parametrize("what", ["other parents", "a changed byte", "half of it", "no record", "a torn record"])
def test_a_shard_that_is_not_surely_the_same_is_written_again(tmp_path: Path, what: str) -> None:
    work, file = tmp_path / "work", "model-00002-of-00004.safetensors"
    wanted = write(tmp_path / "first", Crashing(None), Resume(work, "seed 1"))
    for left in (tmp_path / "first").iterdir():
        left.unlink()  # the shards in `work` are the same files as these
    data, record = (work / file).read_bytes(), work / f"{file}.json"
    if what == "a changed byte":
        (work / file).write_bytes(data[:-1] + b"x")
    elif what == "half of it":
        (work / file).write_bytes(data[: len(data) // 2])
    elif what == "no record":
        record.unlink()
    elif what == "a torn record":
        record.write_text(record.read_text()[:20])
    again = Crashing(None)
    said = "seed 2" if what == "other parents" else "seed 1"
    assert write(tmp_path / "second", again, Resume(work, said)) == wanted
    assert again.made == ([1] * 4 if what == "other parents" else [0, 1, 0, 0])
    assert (tmp_path / "second" / file).read_bytes() == data


def test_a_full_disk_is_an_error_and_leaves_no_finished_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int, _block: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("btx.checkpoints.writer.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", Crashing(None), Resume(tmp_path / "work", "seed 1"))
    assert not list((tmp_path / "work").glob("*.json"))
