"""Renders conversations by a tokenizer's chat template, and locates the answers in the text.

The template is rendered here and not by `apply_chat_template`, to the same text (a test compares the two), so that
nothing ambient affects it: the date is a setting, and random functions are removed. Position marks are characters that
no text may hold (Unicode's noncharacters), and are removed again.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from btx.data.documents import ABOUT, EMPTY, FLAGS, SAID, Message, Span, learned, require_learned
from btx.data.watched import CLOSE, MARKS, OPEN, aliased, attempt, written_whole
from btx.errors import RecipeError

TEXT, END = "\ufdd2", "\ufdd3"  # around a special token that is only text, as OPEN and CLOSE are around an answer
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, the spans in it to be learned, and those that look like special tokens but are text."""

    text: str
    learned: list[Span] = field(default_factory=list)
    plain: list[Span] = field(default_factory=list)


class _Generation(Extension):
    """`{% generation %}`, by which a template itself marks what the assistant wrote."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)


def strftime(date: datetime.date, form: str) -> str:
    """A date in English, whatever the locale; TemplateError for formats of a time, or that depend on the locale."""
    said = {
        "d": f"{date.day:02}", "m": f"{date.month:02}", "Y": str(date.year), "y": f"{date.year % 100:02}",
        "B": MONTHS[date.month - 1], "b": MONTHS[date.month - 1][:3], "A": DAYS[date.weekday()],
        "a": DAYS[date.weekday()][:3], "j": f"{date.timetuple().tm_yday:03}", "%": "%", "F": date.isoformat(),
    }  # fmt: skip

    def one(match: re.Match[str]) -> str:
        if match[2] not in said:
            raise TemplateError(f"the date format %{match[2]} is not the same everywhere")
        return said[match[2]].lstrip("0") if match[1] else said[match[2]]

    return re.sub(r"%(-?)(.)", one, form)


class Template:
    """A chat template, compiled once."""

    def __init__(self, text: str, marks: Mapping[str, Any], *, special: Sequence[str], date: str | None) -> None:
        """`marks` are the tokenizer's own by name (bos_token, ...), `special` all texts that are special tokens."""
        self.marks, self.special = dict(marks), sorted(special, key=len, reverse=True)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        del environment.filters["random"], environment.globals["lipsum"]
        environment.globals["raise_exception"] = _refuse
        try:
            tree = environment.parse(text)
            self.variables = meta.find_undeclared_variables(tree)
            if "strftime_now" in self.variables and date is None:
                raise RecipeError(
                    "the tokenizer's chat template asks for today's date, so the texts would change from day to day. "
                    "Set data.date, say to 2026-01-31."
                )
            if date is not None:
                day = datetime.date.fromisoformat(date)
                environment.globals["strftime_now"] = lambda form: strftime(day, form)
            self.template = environment.from_string(text)
        except TemplateError as error:
            raise RecipeError(f"the tokenizer's chat template cannot be used: {error}. Fix it.") from error

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special)) or "(?!)")

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        """What may end a turn: a special token, with optional space before it; but not BOS, unless it is EOS too."""
        bos, eos = self.marks.get("bos_token"), self.marks.get("eos_token")
        ends = [s for s in self.special if s != bos or s == eos]
        return re.compile(r"\s*(?:" + ("|".join(map(re.escape, ends)) or "(?!)") + ")")

    # ---- what is read ----

    def read(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The columns beside the messages that the template reads; ValueError for one that it would drop silently,
        unless it is empty or metadata."""
        for key, value in extra.items():
            if key not in self.variables and key not in ABOUT and value not in EMPTY:
                raise ValueError(f"the chat template does not read the column {key}")
        return {key: value for key, value in extra.items() if key in self.variables}

    def render(self, messages: Sequence[Message], extra: Mapping[str, Any], *, opened: bool = False) -> str:
        """The conversation, with marks; `opened` adds the header of an assistant's turn. TemplateError, TypeError or
        ValueError when the template refuses it."""
        context = {**self.marks, "tools": None, "documents": None, **extra}
        passed = [aliased(m) for m in messages]
        return self.template.render({**context, "messages": passed, "add_generation_prompt": opened})

    # ---- the whole conversation ----

    def write(self, messages: Sequence[Message], extra: Mapping[str, Any], *, answers: bool) -> Rendered:
        """A conversation as text; with `answers`, their spans too. ValueError where they cannot be located."""
        flags = [learned(m) for m in messages]
        spoken = [{k: v for k, v in m.items() if k not in FLAGS} for m in messages]
        for message in messages:
            require_learned(message, answers=answers)
        extra = self.read(extra)
        _require_unmarked([spoken, extra])
        marked = [self._mark_special(m) for m in spoken]
        more = self._mark_special(extra)
        whole = self.render(marked, more)
        text, plain = _take_out(whole.replace(OPEN, "").replace(CLOSE, ""), TEXT, END)
        if text != written_whole(lambda messages: self.render(messages, extra), spoken):
            raise ValueError("the chat template changes a text that looks like one of its own marks")
        if not answers:
            return Rendered(text, [(0, len(text))], plain)
        wanted = [n for n, m in enumerate(spoken) if _is_answer(m) and flags[n] is not False]
        spans = self._tagged(whole, spoken, wanted) if OPEN in whole else [
            self._answer(marked, more, whole, n) for n in wanted]  # fmt: skip
        unmarked = MARKS.sub("", whole)
        assert unmarked == text
        return Rendered(text, sorted(_without(whole, span) for span in spans), plain)

    def asked(self, messages: Sequence[Message]) -> Rendered:
        """A conversation up to the answer that is to be generated: it ends with the header of an assistant's turn."""
        whole = self.render([self._mark_special(m) for m in messages], {}, opened=True)
        text, plain = _take_out(whole.replace(OPEN, "").replace(CLOSE, ""), TEXT, END)
        return Rendered(text, [(0, len(text))], plain)

    def _mark_special(self, value: Any) -> Any:
        """The same value with the special tokens in its texts marked as text."""
        if isinstance(value, str):
            return self._special.sub(lambda match: TEXT + match[0] + END, value)
        if isinstance(value, dict):
            return {k: v if k == "role" else self._mark_special(v) for k, v in value.items()}
        return [self._mark_special(v) for v in value] if isinstance(value, list) else value

    # ---- where the answers are ----

    def _tagged(self, whole: str, messages: Sequence[Message], wanted: list[int]) -> list[Span]:
        spans = [match.span() for match in re.finditer(f"{OPEN}[^{CLOSE}]*{CLOSE}", whole)]
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        if len(spans) == len(turns):
            return [span for n, span in zip(turns, spans, strict=True) if n in wanted]
        if turns == wanted:
            return spans
        raise ValueError("the chat template marks other turns than the assistant's as generated")

    def _answer(self, messages: Sequence[Message], extra: Mapping[str, Any], whole: str, n: int) -> Span:
        """The span of message `n`'s answer, with its end-of-turn token, in the whole conversation."""
        marks = self._content(messages, extra, whole, n)
        start = self._start(messages, extra, whole, n, marks)
        end = None if start is None else self._end(messages, extra, whole, n)
        if start is None and set(messages[n]) <= {*SAID}:
            start = marks[0]
        if end is None and marks[1] is not None and "tool_calls" not in messages[n]:
            ends = self._ends.match(whole, marks[1])
            end = ends.end() if ends else marks[1] + len(whole[marks[1] :]) - len(whole[marks[1] :].lstrip())
        if start is None or end is None or start > end:
            raise ValueError(
                f"the chat template rewrites what comes before or in message {n + 1}, so that the answer cannot be "
                "located"
            )
        return start, end

    def _content(
        self, messages: Sequence[Message], extra: Mapping[str, Any], whole: str, n: int
    ) -> tuple[int | None, int | None]:
        """Where the content of message `n` begins and ends, each None where the output does not show it."""
        content = messages[n].get("content", "")
        core = content.strip()
        if not core:
            return None, None
        at = content.index(core)
        marked = {**messages[n], "content": content[:at] + OPEN + core + CLOSE + content[at + len(core) :]}
        found = self._try([*messages[:n], marked, *messages[n + 1 :]], extra)
        if found is None or found.replace(OPEN, "").replace(CLOSE, "") != whole:
            return None, None
        start = found.index(OPEN) if found.count(OPEN) == 1 else None
        end = found.replace(OPEN, "").index(CLOSE) if found.count(CLOSE) == 1 else None
        return start, end

    def _start(
        self, messages: Sequence[Message], extra: Mapping[str, Any], whole: str, n: int,
        content: tuple[int | None, int | None],
    ) -> int | None:  # fmt: skip
        """The position after the header of the turn: after what precedes the turn and the prefix that this turn shares
        with a generation prompt (or, where the template has none, with another answer)."""
        before = self._try(messages[:n], extra)
        if before is None or not whole.startswith(before):
            return None
        if "add_generation_prompt" in self.variables:
            other = self._try(messages[:n], extra, opened=True)
        else:
            other = self._try([*messages[:n], {"role": "assistant", "content": OPEN}], extra)
            other = other.partition(OPEN)[0] if other and OPEN in other else None
        if other is None or not other.startswith(before):
            return None
        start = next(
            (k for k, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), min(len(whole), len(other))
        )
        return start if content[0] is None else min(start, content[0])

    def _end(self, messages: Sequence[Message], extra: Mapping[str, Any], whole: str, n: int) -> int | None:
        """The position after the end-of-turn token; without one, after all that the template writes for the turn."""
        until = self._try(messages[: n + 1], extra)
        if until is None or not whole.startswith(until):
            return None
        bare = until.rstrip()
        return len(bare) if any(bare.endswith(mark) for mark in self.special) else len(until)

    def _try(self, messages: Sequence[Message], extra: Mapping[str, Any], *, opened: bool = False) -> str | None:
        """A part of the conversation as text; None where the template refuses it."""
        return attempt(lambda part: self.render(part, extra, opened=opened), messages)


def _is_answer(message: Message) -> bool:
    """Whether a message is the assistant's and not empty."""
    values = [value for key, value in message.items() if key not in ("role", "name")]
    said = any(value.strip() if isinstance(value, str) else value for value in values)
    return message["role"] == "assistant" and bool(said)


def _require_unmarked(value: Any) -> None:
    if MARKS.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise ValueError("it holds one of the characters U+FDD0 to U+FDEF, which no text may hold")


def _without(text: str, span: Span) -> Span:
    """The span once all marks are removed from the text."""
    start, end = (at - len(MARKS.findall(text[:at])) for at in span)
    return start, end


def _take_out(text: str, opens: str, closes: str) -> tuple[str, list[Span]]:
    """A text without the marks of one kind, and the spans that they marked."""
    spans = [match.span() for match in re.finditer(f"{opens}[^{closes}]*{closes}", text)]
    return MARKS.sub("", text), [_without(text, span) for span in spans]
