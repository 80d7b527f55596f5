"""Documents in the three shapes that users have, from the files that a recipe names.

A document is `{"text"}`, `{"messages"}` or `{"prompt", "completion"}`, told by its columns. What cannot be read
is refused with file and line. Nothing here tokenises; no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from btx.checkpoints import hub
from btx.data import builtin
from btx.data.documents import Document, parse
from btx.data.readers import KINDS, READ, kind_of, records
from btx.errors import RecipeError, nearest
from btx.recipe.paths import expanded, files_of

BUILTIN = "builtin:"


@dataclass
class Counts:
    """Counts taken while reading."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    bytes: int = 0
    first_bad: str = field(default="")


def resolve(patterns: list[str], base: Path, where: str, notes: list[str] | None = None) -> list[str]:
    """Files (absolute) and `builtin:` names that the patterns of a recipe match; relative ones lie below `base`.

    A pattern is a file, a folder (all files below it) or a glob. RecipeError for one without a file that btx reads, and
    for a file that two patterns match: it would be read twice, which is hardly meant. Remarks, such as on skipped
    files, are added to `notes`.
    """
    sources: list[str] = []
    found: dict[str, str] = {}
    for pattern in patterns:
        for source in _meant(pattern, base, where, notes if notes is not None else []):
            same = source if source.startswith(BUILTIN) else os.path.normpath(source)
            if same in found:
                raise RecipeError(
                    f"{where} names {source} twice (by {found[same]!r} and {pattern!r}). "
                    "Name it once; how much a domain counts is set by finetune.mix."
                )
            found[same] = pattern
            sources.append(source)
    return sources


def _meant(pattern: str, base: Path, where: str, notes: list[str]) -> list[str]:
    if pattern.startswith(BUILTIN):
        name = pattern.removeprefix(BUILTIN)
        if name not in builtin.NAMES:
            raise RecipeError(f"{where}: there is no {pattern}; {nearest(name, builtin.NAMES)}")
        return [pattern]
    path = hub.dataset(pattern, where) if hub.is_hub(pattern) else base / expanded(pattern, where)
    try:
        found = files_of(path)
    except OSError as error:  # a name that is too long, a folder without permission
        raise RecipeError(f"{where}: {pattern:.200} cannot be looked up: {error}. Correct the path.") from error
    read = [file for file in found if kind_of(file) in KINDS and Path(file).is_file()]
    others = [file for file in found if file not in {*read}]
    if not read and path.is_dir():
        there = f"; there are {_some(others, path)}" if others else ""
        raise RecipeError(f"{where}: the folder {path} holds no file that btx reads ({READ}){there}.")
    if not read and others:
        raise RecipeError(f"{where}: {path} is in no format that btx reads ({READ}): {_some(others, path)}.")
    if not read:
        raise RecipeError(f"{where}: {path} does not exist{hint(path)}. Relative paths start at {base}.")
    if others:
        notes.append(f"{where}: {pattern} matches {len(others)} files that btx does not read: {_some(others, path)}")
    return read


def _some(files: list[str], path: Path) -> str:
    """A few of the files' names, one of each extension first."""
    below = [os.path.relpath(file, path) if path.is_dir() else file for file in files]
    first = {os.path.splitext(name)[1]: name for name in reversed(below)}
    named = [*dict.fromkeys([*sorted(first.values()), *below])][:5]
    return ", ".join(named) + (f" and {len(below) - len(named)} more" if len(below) > len(named) else "")


def hint(path: Path) -> str:
    """A clause that says what was probably meant by a path that does not exist."""
    if path.is_file():
        return " (it is a file)"
    if any(sign in str(path) for sign in "*?["):
        return " (no file matches)"
    if not path.parent.is_dir():
        return f", nor does {path.parent}"
    siblings = sorted(p.name for p in path.parent.iterdir())
    close = get_close_matches(path.name, siblings, n=1, cutoff=0.5) or siblings[:8]
    return "; " + nearest(path.name, close).rstrip("?.") if siblings else f"; {path.parent} is empty"


def digest(source: str, file_digest: Callable[[Path], str]) -> str:
    """The content key of a source: format and SHA-256 of a file; version of a builtin corpus and of Python."""
    if source.startswith(BUILTIN):
        version = ".".join(map(str, sys.version_info[:3]))
        return f"{source}/{builtin.VERSION}/python-{version}"
    try:
        return f"{kind_of(source)}/{file_digest(Path(source))}"
    except OSError as error:
        raise RecipeError(f"{source} cannot be read: {error.strerror or error}. Fix its permissions.") from error


def equal_files(sources: list[str], content: list[str], where: str) -> list[str]:
    """A sentence for each file with the same content as another one of its domain; `content` are their digests."""
    first: dict[str, str] = {}
    said = []
    for source, digest_ in zip(sources, content, strict=False):
        if (other := first.setdefault(digest_, source)) != source:
            said.append(f"{where}: {source} holds the same as {other}; its documents count twice")
    return said


def read(
    sources: list[str], *, skip_bad: bool, counts: Counts, ignore: Sequence[str] = (),
    parse: Callable[[Any, Sequence[str]], Document] = parse,
) -> Iterator[Document]:  # fmt: skip
    """All non-empty documents of the sources in order; `counts` is filled on the way, keys of `ignore` are left out.

    `parse` makes a document of a record, and raises a ValueError for a bad one.

    RecipeError with file and line for what cannot be read, unless `skip_bad`.
    """
    for source in sources:
        for where, record, origin in _records(source):
            try:
                document = parse(record, ignore) if not isinstance(record, Exception) else _raise(record)
            except (ValueError, RecursionError) as error:
                counts.bad += 1
                counts.first_bad = counts.first_bad or f"{where}: {error}"
                if not skip_bad:
                    said = f"{where}: {error}. Fix the line, or set data.on_bad_line: skip."
                    raise RecipeError(said) from error
                continue
            if document.empty:
                counts.empty += 1
                continue
            counts.documents += 1
            counts.bytes += len(document.text.encode())
            yield replace(document, source=origin, where=where)


def _raise(error: Exception) -> Document:
    raise error


@cache
def _builtin(name: str) -> tuple[tuple[str, str], ...]:
    """An embedded corpus, made once per process: a run reads it several times, and it is a few MB."""
    return tuple(builtin.sources(name))


def in_pieces(source: str) -> bool:
    """Whether a source document may come as several records: a plain text, or a topic of the builtin prose."""
    return source.startswith(BUILTIN) or kind_of(source) == ".txt"


def _records(source: str) -> Iterator[tuple[str, Any, str]]:
    """(where, record, name of the source document that it is a piece of, or none)."""
    if source.startswith(BUILTIN):
        for number, (origin, text) in enumerate(_builtin(source.removeprefix(BUILTIN)), 1):
            yield f"{source}#{number}", {"text": text}, origin and f"{source}/{origin}"
        return
    origin = source if in_pieces(source) else ""
    for where, record in records(source):
        yield where, record, origin
