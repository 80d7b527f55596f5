"""Reads files record by record: JSON lines, plain text and Parquet, also compressed.

A record comes with its location; an invalid one comes as the exception that says why, so that the reader may count
it and go on. Nothing here knows what a document is.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from typing import IO, Any

from btx.errors import RecipeError

KINDS = (".jsonl", ".json", ".txt", ".parquet")
PACKINGS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".xz": "xz"}
SUFFIXES = (".parquet", *(kind + packing for kind in KINDS[:-1] for packing in ("", *PACKINGS)))
READ = f"{', '.join(KINDS)}; all but Parquet also as {', '.join(PACKINGS)}"  # for messages
SHAPES = (("text",), ("messages",), ("prompt", "completion"))
TEXT_PIECE = 16_384  # characters: a longer .txt file is cut into records of about this length
NUL = "it holds a NUL character, as binary or UTF-16 files do"

Record = tuple[str, Any]


def kind_of(source: str) -> str:
    """A file's format: its suffix, in lower case, without the compression's; "" for one that btx does not read."""
    name = source.lower()
    return next(("." + suffix.split(".")[1] for suffix in SUFFIXES if name.endswith(suffix)), "")


def packing_of(source: str) -> str | None:
    """How a file is compressed; None if it is not."""
    return next((how for suffix, how in PACKINGS.items() if source.lower().endswith(suffix)), None)


def records(source: str, *, every_column: bool = False) -> Iterator[Record]:
    """(where, record) pairs of a file; RecipeError when it is damaged.

    Of a Parquet file that has a column `text`, that alone is read unless `every_column` is set.
    """
    try:
        if every_column and kind_of(source) == ".parquet":
            yield from _parquet(source, every_column=True)
            return
        how = {".jsonl": _json_lines, ".json": _json, ".txt": _text, ".parquet": _parquet}
        yield from how[kind_of(source)](source)
    except (OSError, EOFError, lzma.LZMAError) as error:
        said = f"{source} cannot be read to its end: {error}."
        raise RecipeError(f"{said} Fetch it again, or leave it out.") from error


def _stream(path: str) -> IO[bytes]:
    how = packing_of(path)
    if how == "xz":
        return lzma.open(path, "rb")
    if how is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression=how))


def _lines(path: str) -> Iterator[tuple[str, str | ValueError]]:
    """(where, line) pairs of a UTF-8 file; a line that is not UTF-8 comes as the exception that says why."""
    with _stream(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except ValueError as error:
                yield f"{path}:{number}", error


def _json_lines(path: str) -> Iterator[Record]:
    for where, line in _lines(path):
        if isinstance(line, ValueError):
            yield where, line
        elif line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, error


def _json(path: str) -> Iterator[Record]:
    """The records of a JSON array or of JSON lines; a file that is one object over several lines is one record."""
    with _stream(path) as file:
        while ((first := file.read(1)) and first.isspace()) or first in (b"\xef", b"\xbb", b"\xbf"):
            pass
    if first != b"[":
        yield from _json_lines(path) if _is_lines(path) else _whole(path)
        return
    for where, rows in _whole(path):
        if isinstance(rows, list):
            yield from ((f"{path}: record {number}", row) for number, row in enumerate(rows, 1))
        else:
            yield where, rows


def _is_lines(path: str) -> bool:
    """Whether the first line that is not blank is a JSON value by itself."""
    for _, line in _lines(path):
        if isinstance(line, ValueError):
            return True
        if line.strip():
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                return False
            return True
    return True


def _whole(path: str) -> Iterator[Record]:
    try:
        with _stream(path) as file:
            yield path, json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield path, error


def _text(path: str) -> Iterator[Record]:
    """Pieces of a text, cut at blank lines, else at line ends, else anywhere; TEXT_PIECE characters at most."""
    rest, pieces = "", 0
    for where, line in _lines(path):
        if isinstance(line, ValueError) or "\0" in line:
            yield where, line if isinstance(line, ValueError) else ValueError(NUL)
            continue
        rest, start = rest + line, 0
        while len(rest) - start > TEXT_PIECE:
            end = _cut(rest, start)
            yield f"{path}#{(pieces := pieces + 1)}", {"text": rest[start:end]}
            start = end
        rest = rest[start:]
    if rest:
        yield f"{path}#{pieces + 1}", {"text": rest}


def _cut(text: str, start: int) -> int:
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, start, start + TEXT_PIECE)
        if at > start:
            return at + len(mark)
    return start + TEXT_PIECE


def _parquet(path: str, *, every_column: bool = False) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        alone = "text" in names and not every_column  # beside messages, other columns may be part of the text
        columns = ["text"] if alone else None
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in _rows(batch):
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        said = f"{path} is not a readable Parquet file after row {number}: {error}."
        raise RecipeError(f"{said} Fetch it again, or leave it out.") from error


def _rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch; one whose text is not UTF-8 comes as the exception."""
    try:
        yield from map(_without_nulls, batch.to_pylist())
    except UnicodeDecodeError:
        for n in range(batch.num_rows):
            try:
                yield _without_nulls(batch.slice(n, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield error


def _without_nulls(row: Any, *, inside: bool = False) -> Any:
    """A row without the nulls in its objects, with which Parquet fills keys that other rows have."""
    if isinstance(row, dict):
        return {k: _without_nulls(v, inside=True) for k, v in row.items() if not (inside and v is None)}
    return [_without_nulls(v, inside=True) for v in row] if isinstance(row, list) else row
