"""Publishing: all or nothing, one rename, and a reader that trusts the manifest and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx.errors import ArtifactError, ResourceError
from btx.graph.artifact import (
    MANIFEST,
    canonical,
    content_digest,
    describe,
    fingerprint,
    is_published,
    lock,
    locked,
    publish,
    read_manifest,
    verify,
    verify_once,
    write_json,
)
from btx.graph.scheduler import link

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_canonical_json_is_read_back_exactly(value: Any) -> None:
    assert repr(json.loads(canonical(value))) == repr(json.loads(json.dumps(value, sort_keys=True)))
    assert canonical(json.loads(canonical(value))) == canonical(value)


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_the_order_of_keys_does_not_matter_but_every_value_does(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))
    assert fingerprint(turned) == fingerprint(value)
    for key in value:
        assert fingerprint({**value, key: value[key] + 1}) != fingerprint(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", Path("x")])
def test_what_json_cannot_hold_exactly_has_no_fingerprint(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint(value)


def fill(out: Path) -> None:
    """Files of a made-up step."""
    (out / "sub").mkdir()
    (out / "sub" / "a.bin").write_bytes(b"abc")
    (out / "b.txt").write_text("b")
    (out / "logs").mkdir()
    (out / "logs" / "times").write_text(str(os.times()))


def test_what_is_published_is_there_whole_and_verifies(tmp_path: Path) -> None:
    final = tmp_path / "steps" / "x"
    manifest = publish(final, fill, {"step": "x"})
    assert manifest == read_manifest(final) == verify(final)
    assert manifest["step"] == "x"
    assert set(manifest["files"]) == {"b.txt", "logs/times", "sub/a.bin"}
    assert [p.name for p in final.parent.iterdir()] == ["x"]


def test_logs_do_not_count_for_the_digest_and_everything_else_does(tmp_path: Path) -> None:
    digest = publish(tmp_path / "x", fill, {})["digest"]
    assert publish(tmp_path / "y", fill, {"more": 1})["digest"] == digest
    files = describe(tmp_path / "x", {})
    assert content_digest({**files, "logs/times": {"size": 0, "sha256": ""}}) == digest
    for name in ("b.txt", "sub/a.bin"):
        assert content_digest({**files, name: {"size": 1, "sha256": "0"}}) != digest
        assert content_digest({n: f for n, f in files.items() if n != name}) != digest


def test_a_failed_attempt_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        fill(out)
        raise KeyError("no")

    with pytest.raises(KeyError):
        publish(tmp_path / "x", fail, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_resource_error_that_names_the_folder(tmp_path: Path) -> None:
    def full(out: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"x could not be written: No space left on device\. Free space"):
        publish(tmp_path / "x", full, {})
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="could not be written"):
        publish(tmp_path / "file" / "x", fill, {})


def test_a_published_folder_is_never_written_again(tmp_path: Path) -> None:
    first = publish(tmp_path / "x", fill, {"first": True})
    assert publish(tmp_path / "x", fill, {"first": False}) == first


def test_when_two_publish_at_once_the_first_one_wins(tmp_path: Path) -> None:
    def late(out: Path) -> None:
        publish(tmp_path / "y", fill, {"first": True})
        (tmp_path / "y").rename(tmp_path / "x")
        (out / "b.txt").write_text("late")

    assert publish(tmp_path / "x", late, {"first": False})["first"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_damaged_folder_in_the_way_is_told_before_the_work_is_done(tmp_path: Path) -> None:
    publish(tmp_path / "x", fill, {})
    (tmp_path / "x" / "b.txt").unlink()

    def never(out: Path) -> None:
        raise AssertionError("the work was done")

    with pytest.raises(ArtifactError, match=r"b\.txt is missing.*Remove .*x and run"):
        publish(tmp_path / "x", never, {})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": {}}', '{"files": [], "digest": ""}', '{"files": {"a": {}}, "digest": 1}',
             "[" * 100_000]
)  # fmt: skip
def test_a_damaged_manifest_is_refused_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"is damaged .* Remove"):
        read_manifest(tmp_path)
    assert not is_published(tmp_path)


def test_a_manifest_that_was_changed_by_hand_does_not_match_its_digest(tmp_path: Path) -> None:
    publish(tmp_path / "x", fill, {})
    path = tmp_path / "x" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["b.txt"]["sha256"] = "0" * 64
    write_json(path, manifest)
    with pytest.raises(ArtifactError, match="digest does not match"):
        read_manifest(tmp_path / "x")


def test_files_that_are_missing_cut_or_changed_are_found(tmp_path: Path) -> None:
    publish(tmp_path / "x", fill, {})
    file = tmp_path / "x" / "sub" / "a.bin"
    file.write_bytes(b"abd")
    assert is_published(tmp_path / "x")  # sizes alone do not show it
    with pytest.raises(ArtifactError, match=r"a\.bin was changed"):
        verify(tmp_path / "x")
    file.write_bytes(b"ab")
    with pytest.raises(ArtifactError, match=r"a\.bin has 2 bytes, the manifest says 3"):
        read_manifest(tmp_path / "x")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        read_manifest(tmp_path / "x")


def test_a_folder_that_is_not_there_is_no_finished_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "x", tmp_path / "file" / "x"):
        assert not is_published(folder)
        with pytest.raises(ArtifactError, match="not a finished step"):
            read_manifest(folder)


def _add(path: Path) -> None:
    for _ in range(20):
        with lock(path.with_suffix(".lock"), waiting=lambda owner: None):
            path.write_text(str(int(path.read_text()) + 1))


def test_only_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text() == "60"


def test_what_a_killed_attempt_left_is_removed_by_the_next_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead, alive, other = (tmp_path / f".x.{who}" for who in (f"{host}.{2**22 + 1}", f"{host}.1", "elsewhere.1"))
    for folder in (dead, alive, other):
        fill_into(folder)
    publish(tmp_path / "x", fill, {})
    assert {p.name for p in tmp_path.iterdir()} == {"x", alive.name, other.name}


def fill_into(folder: Path) -> None:
    """Leave a half-written attempt's folder."""
    folder.mkdir()
    (folder / "b.txt").write_text("half")


def test_a_verified_folder_is_read_again_only_when_a_file_changed(tmp_path: Path) -> None:
    publish(tmp_path / "x", fill, {})
    verify_once(tmp_path / "x")
    (tmp_path / "x" / "b.txt").write_text("c")
    with pytest.raises(ArtifactError, match=r"b\.txt was changed after it was written"):
        verify_once(tmp_path / "x")


def test_a_lock_is_seen_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert not locked(path)
    with lock(path, waiting=lambda _owner: None):
        assert locked(path)
    assert not locked(path)


def test_a_lock_that_cannot_be_written_is_a_resource_error_and_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int, _text: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("btx.graph.artifact.os.write", full)
    with (
        pytest.raises(ResourceError, match=r"a\.lock could not be written: No space left on device\. Free space"),
        lock(tmp_path / "a.lock", waiting=lambda _owner: None),
    ):
        pytest.fail("the lock was taken")
    assert not locked(tmp_path / "a.lock")


def test_a_folder_in_the_place_of_a_short_name_is_left_alone_and_told(tmp_path: Path) -> None:
    step = SimpleNamespace(short=tmp_path / "export", folder=tmp_path / "steps" / "export-1")
    link(step)
    assert (tmp_path / "export").readlink() == Path("steps/export-1")
    (tmp_path / "export").unlink()
    (tmp_path / "export").mkdir()
    with pytest.raises(ResourceError, match=r"export cannot be made a link .*: Is a directory\. Move away"):
        link(step)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
