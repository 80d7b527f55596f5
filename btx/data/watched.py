"""Detects what a chat template would drop from a conversation, by watching it render.

A key of a message counts as read where the template accesses it; a content as written where marks around it appear in
the output. Templates are programs, so neither can be told from their source: a key may be read from another object, or
in a branch that this message does not reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from btx.data.documents import EMPTY, SAID, Message

MARKS = re.compile("[\ufdd0-\ufdef]")  # noncharacters, which no text may hold, so that they can mark positions
OPEN, CLOSE = "\ufdd0", "\ufdd1"
DIGIT = 0xFDE0  # the first of the sixteen marks that write a number
NUMBER = re.compile(f"{OPEN}([\ufde0-\ufdef]+){CLOSE}")
REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms, which transformers passes as the first
Render = Callable[[Sequence[Message]], str]  # raises TemplateError, TypeError or ValueError where the template refuses


class Watched(dict[str, Any]):
    """A message that records which of its keys a template reads."""

    def __init__(self, message: Message) -> None:
        super().__init__(aliased(message))
        self._seen = set[str]()

    def unread(self, message: Message) -> list[str]:
        """The non-empty keys of the message, as it was before it got aliases, that were not read."""
        reasoning = dict.get(self, REASONING[0])
        found = []
        for key, value in message.items():
            names = REASONING if key in REASONING and value == reasoning else (key,)
            if key not in SAID and value not in EMPTY and self._seen.isdisjoint(names):
                found.append(key)
        return found

    def _look(self, *keys: Any) -> None:
        self._seen.update(keys or dict.keys(self))

    def __getitem__(self, key: str) -> Any:
        self._look(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._look(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, recorded as read."""
        self._look(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._look()
        return super().__iter__()

    def items(self) -> Any:
        """All items, recorded as read."""
        self._look()
        return super().items()

    def keys(self) -> Any:
        """All keys, recorded as read."""
        self._look()
        return super().keys()

    def values(self) -> Any:
        """All values, recorded as read."""
        self._look()
        return super().values()

    def __repr__(self) -> str:
        self._look()
        return super().__repr__()


def aliased(message: Message) -> Message:
    """A message with its reasoning under both names that templates read, as transformers passes it."""
    if isinstance(message, Watched):
        return message
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def written_whole(render: Render, messages: Sequence[Message]) -> str:
    """The conversation as the template writes it, without marks.

    ValueError for a key of a message that the template never reads, or a content that it leaves out. A key also counts
    as read where the template reads it only in the last message, as some do with reasoning.
    """
    watched = [Watched(m) for m in messages]
    text = MARKS.sub("", render(watched))
    for n, message in enumerate(messages):
        left = watched[n].unread(message)
        if left and n + 1 < len(messages):
            last = Watched(message)
            attempt(render, [*messages[:n], last])
            left = [key for key in left if key in last.unread(message)]
        if left:
            raise ValueError(f"the chat template does not read {left[0]} of message {n + 1} ({message['role']})")
    _require_contents(render, messages, text)
    return text


def _require_contents(render: Render, messages: Sequence[Message], text: str) -> None:
    """ValueError for a message whose content is missing from the text; a template whose text changes with marks in it,
    such as one that counts characters, is trusted."""
    found = attempt(render, [_numbered(message, n) for n, message in enumerate(messages)])
    if found is None or MARKS.sub("", found) != text:
        return
    there = {int("".join(f"{ord(c) - DIGIT:x}" for c in digits), 16) for digits in NUMBER.findall(found)}
    for n, message in enumerate(messages):
        if n not in there and message.get("content", "").strip():
            raise ValueError(f"the chat template leaves out the content of message {n + 1} ({message['role']})")


def _numbered(message: Message, n: int) -> Message:
    """A message with its number, in marks, before and after its content."""
    content = message.get("content", "")
    core = content.strip()
    mark = OPEN + "".join(chr(DIGIT + int(digit, 16)) for digit in f"{n:x}") + CLOSE
    at = content.index(core)
    return {**message, "content": content[:at] + mark + core + mark + content[at + len(core) :]} if core else message


def attempt(render: Render, messages: Sequence[Message]) -> str | None:
    """A conversation as text; None where the template refuses it."""
    try:
        return render(messages)
    except (TemplateError, TypeError, ValueError):
        return None
