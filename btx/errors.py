"""The errors that a user can fix, one class per cause, each with an exit code that scripts can rely on.

Every message is a sentence that names what is wrong, where, and the remedy. The command prints it without a
traceback; any other exception is a bug in btx and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class BtxError(Exception):
    """Base of the errors that a user can fix; the process ends with `exit_code`."""

    exit_code = 1


class RecipeError(BtxError):
    """The recipe, the command line or the data named by it cannot be used."""

    exit_code = 2


class ArtifactError(BtxError):
    """An input artifact (checkpoint, step folder) is damaged, unsafe or does not fit."""

    exit_code = 3


class DivergedError(BtxError):
    """A training, or the model that it made, came to no finite number; `failed` has the labels of those steps."""

    exit_code = 4
    failed: tuple[str, ...] = ()


class ResourceError(BtxError):
    """Disk, memory, permission or a device is missing."""

    exit_code = 5


class InterruptedRunError(BtxError):
    """A signal stopped the run; its state is saved and the same command resumes it."""

    exit_code = 75


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)  # errors of a disk that is full or fails
# An operating system's error number as Rust and Python print it.
_IN_WORDS = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\]")


def disk_error(error: BaseException) -> str:
    """The system's error text if an exception reports a full or failing disk, else an empty string.

    Libraries that write for us (safetensors, tokenizers, pyarrow) raise their own exceptions, with the errno in the
    text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, BtxError):
        found = _IN_WORDS.search(str(error))
        number = int(next(filter(None, found.groups()))) if found else None
    return os.strerror(number) if number in FULL else ""


@contextlib.contextmanager
def full_disks_told() -> Iterator[None]:
    """Turn any library's exception for a full or failing disk into a ResourceError that names the remedy."""
    try:
        yield
    except BtxError:
        raise
    except Exception as error:
        if why := disk_error(error):
            at = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
            said = f"disk error{at}: {why}. Free space or check the disk, then run the same command again."
            raise ResourceError(said) from error
        raise


@contextlib.contextmanager
def told_at(where: str) -> Iterator[None]:
    """Put a place in the recipe before the message of a RecipeError, if there is one to name."""
    try:
        yield
    except RecipeError as error:
        if not where:
            raise
        raise RecipeError(f"{where}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for a message about an unknown name: suggests the closest known one, or lists all."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "choose one of " + ", ".join(known) + "."
