"""What may go wrong for a user, one class a cause, each with the exit code that scripts can rely on.

Every message is a sentence that names what is wrong, where, and the remedy. The command prints it without a
traceback; anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class BtxError(Exception):
    """Base of the errors that are a user's to mend; `exit_code` is what the process ends with."""

    exit_code = 1


class RecipeError(BtxError):
    """The recipe, the command line or the data named by it cannot be used."""

    exit_code = 2


class ArtifactError(BtxError):
    """An input artifact (checkpoint, step folder) is damaged, unsafe or does not fit."""

    exit_code = 3


class DivergedError(BtxError):
    """Training met non-finite losses or gradients again and again."""

    exit_code = 4


class ResourceError(BtxError):
    """Disk, memory, permission or a device is missing."""

    exit_code = 5


class InterruptedRunError(BtxError):
    """A signal asked the run to stop; its state is saved and the same command goes on from there."""

    exit_code = 75


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)  # what a disk answers that takes no more
# A system's error as Rust and Python print it.
_IN_WORDS = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\]")


def disk_error(error: BaseException) -> str:
    """What a disk answered, in the system's words, where an exception says that it took no more; else nothing.

    Libraries that write for us (safetensors, tokenizers, pyarrow) raise exceptions of their own, with the number of the
    system's error in their text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, BtxError):
        found = _IN_WORDS.search(str(error))
        number = int(next(filter(None, found.groups()))) if found else None
    return os.strerror(number) if number in FULL else ""


@contextlib.contextmanager
def full_disks_told() -> Iterator[None]:
    """Raise what a full disk makes any library raise as a ResourceError, a sentence with the remedy."""
    try:
        yield
    except BtxError:
        raise
    except Exception as error:
        if why := disk_error(error):
            at = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
            said = f"the disk answered{at}: {why}. Free space or see to the disk, then run the same command again."
            raise ResourceError(said) from error
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers what was probably meant: the closest known name, or all of them."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known are " + ", ".join(known) + "."
