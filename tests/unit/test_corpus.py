"""Documents from files: three record shapes, three file kinds, all compressions, and what is counted or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from btx.data.corpus import Counts, digest, read, resolve
from btx.data.documents import Document, parse
from btx.data.readers import SUFFIXES, TEXT_PIECE, kind_of
from btx.errors import RecipeError

RECORDS: list[dict[str, Any]] = [
    {"text": "plain words"},
    {"text": "Umlaute: äöü, 語, 🜁\n"},
    {"text": "x", "id": 7},
]


def pack(path: Path, data: bytes) -> Path:
    """Write bytes, compressed as the suffix says."""
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix in packed:
        path.write_bytes(packed[path.suffix](data))
    elif path.suffix in (".zst", ".zstd", ".lz4"):
        with pyarrow.output_stream(path, compression=path.suffix[1:].replace("zst", "zstd")[:4]) as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


def texts(*paths: Path, skip: bool = False) -> tuple[list[str], Counts]:
    """All texts of files, and the counts."""
    counts = Counts()
    return [d.text for d in read([str(p) for p in paths], skip_bad=skip, counts=counts)], counts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_and_packing_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.txt.parquet{suffix}"  # only the end of a name decides its kind
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif ".txt" in suffix:
        pack(path, "".join(r["text"] for r in RECORDS).encode())
    else:
        pack(path, "".join(json.dumps(r) + "\n" for r in RECORDS).encode())
    found, counts = texts(path)
    assert "".join(found) == "".join(r["text"] for r in RECORDS)
    assert len(found) == (1 if ".txt" in suffix else len(RECORDS))
    assert counts.bytes == len("".join(found).encode())


def test_the_shape_is_told_by_the_columns() -> None:
    assert parse({"text": "a", "prompt": "b"}) == Document((("a", True),))
    assert parse({"prompt": "a", "completion": "b"}).pieces == (("a", False), ("b", True))
    talk = parse({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "x": 1}]})
    assert [text for text, learned in talk.pieces if learned] == [" b\n\n"]
    assert talk.messages[1] == {"role": "assistant", "content": "b", "x": 1}  # for the template to read
    with pytest.raises(ValueError, match="found body, id; wanted text; messages; prompt and completion"):
        parse({"id": 1, "body": "x"})
    with pytest.raises(ValueError, match="found prompt; wanted"):
        parse({"prompt": "x"})


def test_parquet_has_conversations_and_names_the_row_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    talk = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"messages": [talk, None], "id": [1, 2]}), path)
    with pytest.raises(RecipeError, match=r"a\.parquet: row 2: messages must be a list"):
        texts(path)
    assert texts(path, skip=True)[0] == ["User: hi\n\n"]


def test_keys_that_parquet_fills_up_are_not_there_and_columns_beside_the_messages_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    calls = [{"name": "add", "arguments": {"a": 1, "city": None}}]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    tools = [{"name": "add"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk, "tools": tools}]), path)
    (document,) = read([str(path)], skip_bad=False, counts=Counts())
    assert document.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]
    }  # fmt: skip
    assert document.extra == {"tools": tools}
    assert [*document.messages[0]] == ["content", "role"] or [*document.messages[0]] == ["role", "content"]


def test_parquet_text_that_is_no_utf8_is_refused_by_row_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"good", b"caf\xe9", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(RecipeError, match=r"row 2: .*utf-8"):
        texts(path)
    assert texts(path, skip=True)[0] == ["good", "fine"]


def test_bad_and_empty_lines_are_counted_and_the_first_bad_one_is_kept(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b"", b"  ", b"{", b'{"text": ""}', b'{"text": " "}', b"\xff", b'{"text": "b"}']
    path = pack(tmp_path / "a.jsonl", b"\n".join(lines))
    found, counts = texts(path, skip=True)
    assert found == ["a", "b"]
    assert (counts.documents, counts.empty, counts.bad) == (2, 2, 2)
    assert counts.first_bad.startswith(f"{path}:4: ")


def test_a_conversation_in_which_nobody_says_anything_is_empty(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]}
    assert texts(pack(tmp_path / "a.jsonl", json.dumps(record).encode()))[1].empty == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    body = b'{"text": "a"}' if name == "a.jsonl" else b"a"
    assert texts(pack(tmp_path / name, b"\xef\xbb\xbf" + body))[0] == ["a"]


@given(st.lists(st.sampled_from(["a" * 5000, "b c ", "\n", "\n\n", "é" * 3000, "\r\n", "🜁" * 20_000])))
def test_pieces_of_a_plain_text_join_to_the_text_and_none_is_too_long(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    from btx.data.readers import records

    text = "".join(parts)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    pieces = [record["text"] for _, record in records(str(path))]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= TEXT_PIECE for piece in pieces)


def test_a_line_of_twenty_million_characters_is_read(tmp_path: Path) -> None:
    line = "word " * 4_000_000
    assert texts(pack(tmp_path / "a.jsonl", json.dumps({"text": line}).encode()))[0] == [line]
    assert "".join(texts(pack(tmp_path / "a.txt", line.encode()))[0]) == line


def test_paths_are_relative_to_the_base_and_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "sub/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    whole = [str(tmp_path / n) for n in ("a.txt", "b.jsonl", "sub/c.parquet")]
    assert resolve(["."], tmp_path, "x") == resolve(["**/*"], tmp_path, "x") == whole
    assert resolve([str(tmp_path / "b.jsonl"), "builtin:math"], Path("/"), "x") == [whole[1], "builtin:math"]


def test_a_digest_tells_content_and_kind_apart_but_not_places(tmp_path: Path) -> None:
    def of(source: object) -> str:
        return digest(str(source), lambda path: path.read_text())

    for name in ("a.jsonl", "b.jsonl", "a.txt"):
        (tmp_path / name).write_text("same")
    assert of(tmp_path / "a.jsonl") == of(tmp_path / "b.jsonl") != of(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_text("other")
    assert of(tmp_path / "a.jsonl") != of(tmp_path / "b.jsonl")
    assert len({of(f"builtin:{n}") for n in ("math", "code", "prose")}) == 3


def test_a_file_that_may_not_be_read_is_told_by_name() -> None:
    def closed(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(RecipeError, match=r"/x/a\.txt cannot be read: Permission denied"):
        digest("/x/a.txt", closed)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt", ".txt"), ("a.jsonl.gz", ".jsonl"), ("a.txt.jsonl", ".jsonl"), ("x.gz.txt", ".txt")]
)
def test_the_kind_of_a_file_is_its_last_suffix_but_the_packing(name: str, kind: str) -> None:
    assert kind_of(f"/some.parquet/{name}") == kind
