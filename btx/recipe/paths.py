"""The files that a recipe's path names, by one rule for files, folders and globs.

`~` is expanded. A folder stands for all files below it, links to folders are followed once, and names that begin with a
dot are skipped. Glob characters count only from the first path component that does not exist literally, so that a
folder called `v1 [x]` is not a glob.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from btx.errors import RecipeError

ANY = "**"


def expanded(path: str, where: str) -> Path:
    """A path with `~` expanded; RecipeError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{where}: {path:.200} cannot be looked up: {error}. Correct the path.") from error


def files_of(path: Path) -> list[str]:
    """All files that a path names, sorted; empty if there are none."""
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return sorted(below(path))
    start, rest = _literal(path)
    if ANY not in rest:
        matches = map(Path, glob.glob(os.path.join(glob.escape(str(start)), *rest)))
        return sorted({file for match in matches for file in ([str(match)] if match.is_file() else below(match))})
    return sorted(file for file in below(start) if _matches(Path(file).relative_to(start).parts, rest))


def below(folder: Path) -> Iterator[str]:
    """All files below a folder, dangling links among them; each folder once, whatever links lead to it."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in files if not name.startswith("."))


def _literal(path: Path) -> tuple[Path, Sequence[str]]:
    """The longest existing parent of a path, and the components below it."""
    there = next(parent for parent in path.parents if parent.is_dir())
    return there, path.relative_to(there).parts


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a path, or one of its parent folders, matches the components of a glob."""
    if not wanted:
        return True
    if wanted[0] == ANY:
        return any(_matches(parts[n:], wanted[1:]) for n in range(len(parts))) or len(wanted) == 1
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])
