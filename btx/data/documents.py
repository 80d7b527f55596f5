"""Parses records into documents: text, a conversation, or a prompt and its completion, by the record's columns.

Nothing in a record is dropped silently: a key is part of the text, or may be read by a chat template, or is known
metadata; any other is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from btx.data.readers import NUL, SHAPES

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end) in characters of a text

FLAGS = ("weight", "train", "ignore")  # of a message: whether its tokens have a loss
SAID = ("role", "content")
EMPTY: tuple[Any, ...] = ("", [], {})  # values that count as absent
ABOUT = {  # columns of metadata, which are not part of the text
    *("id", "_id", "idx", "index", "uid", "uuid", "guid", "hash", "prompt_id", "conversation_id", "message_id"),
    *("url", "source", "dataset", "origin", "file", "path", "meta", "metadata", "split", "version", "license"),
    *(
        "timestamp",
        "date",
        "created",
        "created_at",
        "lang",
        "language",
        "category",
        "topic",
        "tags",
        "score",
        "quality",
    ),
    *("num_tokens", "token_count", "length", "turn", "turns", "num_turns", "model", "author", "title"),
}
WANTED = "; ".join(" and ".join(shape) for shape in SHAPES)


@dataclass(frozen=True)
class Document:
    """One document: its pieces in order, each with whether it is an answer to be learned."""

    pieces: tuple[tuple[str, bool], ...]
    messages: tuple[Message, ...] = ()  # kept for tokenizers with a chat template
    extra: dict[str, Any] = field(default_factory=dict)  # columns beside the messages, such as tools
    source: str = ""  # name of the source document that this is a piece of; empty if it is one itself
    where: str = field(default="", compare=False)  # file and line, for messages

    @cached_property
    def text(self) -> str:
        """All pieces as one text."""
        return "".join(text for text, _ in self.pieces)

    @cached_property
    def rank(self) -> int:
        """Its place in hash order, by its text and, in a conversation, by tool calls and the like."""
        more = [_more(message, (*SAID, *FLAGS)) for message in self.messages]
        beside = _more(self.extra, ABOUT)
        said = json.dumps([more, beside], sort_keys=True, default=str) if any(more) or beside else ""
        return rank_of(self.text + said)

    def shortened(self, limit: int) -> Document:
        """Its first `limit` bytes, less a character that the limit would split; a conversation stays whole, since the
        length of its rendered text is not known here."""
        if self.messages or len(self.text) <= limit // 4:
            return self
        return Document(((cut(self.text, limit), True),), source=self.source)

    @property
    def empty(self) -> bool:
        """Whether it holds no text, nor anything else such as tool calls."""
        if any(value for m in self.messages for key, value in m.items() if key not in (*SAID, "name", *FLAGS)):
            return False
        said = [m["content"] for m in self.messages] or [text for text, _ in self.pieces]
        return not any(text.strip() for text in said)

    def require_plain(self, *, answers: bool) -> None:
        """ValueError for what only a chat template could write: it would be dropped silently."""
        for key, value in self.extra.items():
            if key not in ABOUT and value not in EMPTY:
                raise ValueError(f"the tokenizer has no chat template, so the column {key} cannot be written")
        for message in self.messages:
            for key, value in message.items():
                if key not in (*SAID, *FLAGS) and value not in EMPTY:
                    raise ValueError(f"the tokenizer has no chat template, so {key} of a message cannot be written")
            require_learned(message, answers=answers)


def _more(keys: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in known and value not in EMPTY}


def parse(record: Any, ignore: Sequence[str] = ()) -> Document:
    """A document from a record, by its columns; ValueError naming the columns found.

    Columns beside `text` are metadata. Beside messages, or prompt and completion, a column must be known metadata
    (ABOUT), be one that a chat template may read, be empty, or among `ignore`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object with {WANTED}, found {type(record).__name__}")
    record = {key: value for key, value in record.items() if key not in ignore}
    if "text" in record:
        return Document(((_string(record, "text"), True),))
    more = {k: v for k, v in record.items() if v is not None}
    if "messages" in record:
        return _conversation(record["messages"], {k: v for k, v in more.items() if k != "messages"}, ignore)
    if "prompt" in record and "completion" in record:
        for key, value in more.items():
            if key not in ("prompt", "completion", *ABOUT) and value not in EMPTY:
                raise ValueError(
                    f"the column {key} beside prompt and completion is part of neither; write it into the prompt, or "
                    "name it under data.ignore"
                )
        return Document(((_string(record, "prompt"), False), (_string(record, "completion"), True)))
    raise ValueError(f"no usable columns: found {', '.join(sorted(map(str, record))) or 'none'}; wanted {WANTED}")


def _string(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, found {type(value).__name__}")
    return _usable(value)


def _usable(text: str) -> str:
    if "\0" in text:
        raise ValueError(NUL)
    text.encode()  # raises on a lone surrogate, which is not a character
    return text


def _conversation(messages: Any, extra: dict[str, Any], ignore: Sequence[str]) -> Document:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of objects with role and content")
    for key in ("tools", "documents"):
        if key in extra and not (isinstance(extra[key], list) and all(isinstance(one, dict) for one in extra[key])):
            raise ValueError(f"{key} must be a list of objects, found {type(extra[key]).__name__}")
    spoken = tuple(_message(message, ignore) for message in messages)
    pieces: list[tuple[str, bool]] = []
    for message in spoken:
        said = learned(message)
        answers = message["role"] == "assistant" and said is not False and bool(message["content"].strip())
        pieces += [(f"{message['role'].capitalize()}:", False), (f" {message['content']}\n\n", answers)]
    return Document(tuple(pieces), spoken, extra)


def _message(message: Message, ignore: Sequence[str]) -> Message:
    """A message without nulls (with which Parquet fills columns), the text parts of its content joined."""
    found = {k: v for k, v in message.items() if v is not None and k not in ignore}
    if "content" not in found and len(found.keys() - {"role", "name", *FLAGS}):
        found["content"] = ""  # as in a message that only calls a tool
    for key in SAID:
        if key not in found:
            raise ValueError(f"a message needs {key}, found {', '.join(sorted(map(str, message))) or 'nothing'}")
    if isinstance(found["content"], list) and found["content"]:
        found["content"] = "".join(_part(part) for part in found["content"])
    for key in SAID:
        _string(found, key)
    return found


def _part(part: Any) -> str:
    """The text of a part of a message's content; ValueError for anything but text, such as an image."""
    part = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {"type": type(part).__name__}
    if part.get("type") != "text" or set(part) != {"type", "text"}:
        found = ", ".join(sorted({str(part.get("type")), *map(str, part.keys() - {"type", "text"})}))
        raise ValueError(f"content must be text or parts of type text, found {found}")
    return _string(part, "text")


def learned(message: Message) -> bool | None:
    """Whether a message is to be learned by its flags, None without any; ValueError for invalid or conflicting ones."""
    found: set[bool] = set()
    for key in FLAGS:
        if (value := message.get(key)) is None:
            continue
        if value not in (0, 1):
            raise ValueError(f"{key} of a message must be 0, 1, true or false, found {value!r}")
        found.add(bool(value) != (key == "ignore"))
    if len(found) > 1:
        raise ValueError("the flags of a message say both that it is to be learned and that it is not")
    if True in found and message["role"] != "assistant":
        raise ValueError(f"a message of {message['role']} is to be learned; only the assistant's are")
    return found.pop() if found else None


def require_learned(message: Message, *, answers: bool) -> None:
    """ValueError where a message is flagged as not to be learned, but all tokens are."""
    if not answers and message["role"] == "assistant" and learned(message) is False:
        raise ValueError("a message is flagged as not to be learned; set data.loss_mask: completion")


def rank_of(text: str) -> int:
    """A text's place in hash order: the first 128 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])


def cut(text: str, limit: int) -> str:
    """The first `limit` bytes of a text, less a character that the limit would split."""
    return text[:limit].encode()[:limit].decode(errors="ignore")
