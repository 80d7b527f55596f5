"""Attempt, manifest, digest, lock, publish: the only way anything reaches its final name.

A folder is written under a private name, every file fsynced, the manifest last, then renamed once. So a folder
that has its final name is complete; whoever reads it trusts the manifest (`btx.json`) and nothing else. Files
under `logs/` are recorded but do not count for the digest: they hold times and speeds, which differ from run to run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from btx.errors import ArtifactError, ResourceError, disk_error

MANIFEST = "btx.json"
LOGS = "logs"
STATES = "states"  # in a step's work folder: what an unfinished training or merge resumes from


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII; TypeError or ValueError for what JSON cannot hold exactly."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative POSIX names of all files below a folder, sorted, without the manifest."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


def describe(folder: Path, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder, by relative name; `known` holds digests computed already."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": known.get(name) or file_digest(folder / name)}
        for name in list_files(folder)
    }


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """One SHA-256 for a described folder; `logs/` is left out."""
    rows = [[n, f["size"], f["sha256"]] for n, f in sorted(files.items()) if not n.startswith(LOGS + "/")]
    return fingerprint(rows)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline; keys keep their order, NaN is refused."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def publish(
    final: Path, produce: Callable[[Path], Mapping[str, str] | None], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Let `produce` fill a private folder, then give it its final name in one rename.

    `produce` may return the SHA-256 of files that it hashed while it wrote them; the others are hashed here.

    Returns the manifest as written: `manifest` plus `files` and `digest`. Nothing is left behind on failure. If
    `final` appeared meanwhile (another machine did the same step), the existing folder wins.
    """
    if final.exists():
        return read_manifest(final)  # a damaged folder must be looked at by a person before it is replaced
    attempt = final.parent / f".{final.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir()
        files = describe(attempt, produce(attempt) or {})
        for name in files:
            sync(attempt / name)
        full = {**manifest, "files": files, "digest": content_digest(files)}
        write_json(attempt / MANIFEST, full)
        sync(attempt / MANIFEST)
        for folder in [p for p in attempt.rglob("*") if p.is_dir()]:
            sync(folder)
        sync(attempt)
        with contextlib.suppress(FileExistsError):
            _rename(attempt, final)
        sync(final.parent)
    except OSError as error:
        raise unwritable(final, error) from error
    except Exception as error:
        if why := disk_error(error):  # an exception of a library that wrote for us
            raise unwritable(final, OSError(0, why)) from error
        raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return read_manifest(final)


def unwritable(path: Path, error: OSError) -> ResourceError:
    """A ResourceError for a path that could not be written, with the system's reason and the remedy."""
    return ResourceError(
        f"{path} could not be written: {error.strerror or error}. "
        "Free space or fix the permissions, then run the same command again."
    )


def _sweep(final: Path) -> None:
    """Remove private folders left at `final` by processes of this host that no longer exist."""
    for left in final.parent.glob(f".{final.name}.{socket.gethostname()}.*"):
        pid = left.name.rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OSError):
            continue


def _rename(attempt: Path, final: Path) -> None:
    try:
        attempt.rename(final)
    except OSError as error:
        if not (final / MANIFEST).is_file():
            raise
        raise FileExistsError(str(final)) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; ArtifactError if it is damaged, or a file is missing or of another size."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["digest"] != content_digest(files):
            raise ValueError("its digest does not match its list of files")
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is not a finished step. Run the step again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Remove {folder} and run the step again.") from error
    for name, entry in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != entry["size"]:
            seen = "is missing" if found is None else f"has {found} bytes"
            raise ArtifactError(
                f"{folder / name} {seen}, the manifest says {entry['size']}. Remove {folder} and run the step again."
            )
    return manifest  # type: ignore[no-any-return]


def is_published(folder: Path) -> bool:
    """Whether a folder is a finished artifact (sizes are checked, digests are not)."""
    try:
        read_manifest(folder)
    except ArtifactError:
        return False
    return True


def verify(folder: Path) -> dict[str, Any]:
    """Like `read_manifest`, but also computes and compares the SHA-256 of every file."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if file_digest(folder / name) != entry["sha256"]:
            raise ArtifactError(
                f"{folder / name} was changed after it was written: its SHA-256 differs from "
                f"the manifest's. Remove {folder} and run the step again."
            )
    return manifest


def verify_once(folder: Path) -> None:
    """Like `verify`, but this process does not read verified files again while their stamps are the same."""
    files = (folder / name for name in read_manifest(folder)["files"])
    _verified(folder, tuple(map(stamp, files)))


def stamp(file: Path) -> tuple[int, ...]:
    """Size, mtime, inode and ctime of a file: tools that preserve the mtime cannot preserve the ctime."""
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino, about.st_ctime_ns


@functools.lru_cache(maxsize=256)
def _verified(folder: Path, _stamps: tuple[tuple[int, ...], ...]) -> None:
    verify(folder)


@contextlib.contextmanager
def lock(path: Path, *, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold a file lock; if another process holds it, call `waiting` once with that owner, and wait.

    The kernel (flock) releases the lock when its process ends, however it ends. A shared file system must support
    flock between hosts (NFSv4, Lustre with -o flock, GPFS).
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(stack.enter_context(path.open("a+", encoding="utf-8")), waiting)
        except OSError as error:
            raise unwritable(path, error) from error
        yield


def _take(stream: IO[str], waiting: Callable[[str], None]) -> None:
    """Wait for the lock of an open file, and write its new owner into it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        waiting(stream.read().strip() or "another process")
        fcntl.flock(stream, fcntl.LOCK_EX)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(stream.fileno(), 0)  # unbuffered: on a full disk, close would flush a buffer again
    os.write(stream.fileno(), f"pid {os.getpid()} on {socket.gethostname()} since {since}{_launch()}".encode())


def _launch() -> str:
    """The identity of this process's distributed launch: its rendezvous address; empty for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f", launch {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def held_by_launch(path: Path) -> bool:
    """Whether a process of this process's own distributed launch holds a file lock."""
    try:
        return path.read_text(encoding="utf-8").endswith(_launch()) and locked(path)
    except OSError:
        return False


def locked(path: Path) -> bool:
    """Whether some process holds a file lock exclusively; the test holds a shared lock for an instant."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
