"""Encodes documents into token ids, and tells which of them are learned.

A text is encoded as a whole and answers are found by character offsets, so that the tokens at their borders are those
of inference too. What looks like a special token in a text or in a message is encoded as plain text; only those that
the tokenizer and its chat template write are special.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from btx.data.chat import Rendered, Template
from btx.data.documents import Document, Span, cut
from btx.errors import ArtifactError, RecipeError

Ids = list[int]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, from local files only and without remote code."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise any of a dozen types, among them Rust's bare Exception
        why = (str(error).splitlines() or [repr(error)])[0]
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be loaded ({why}). Copy the tokenizer files of its base model into it."
        ) from error
    model = getattr(getattr(found, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        raise ArtifactError(
            f"the tokenizer in {folder} drops merges at random (dropout {dropout:.3g} in tokenizer.json), so a text "
            "gets other ids each time. Set it to null."
        )
    return found


@dataclass(frozen=True)
class Written:
    """A document as text, and whether a chat template wrote it, whose special tokens are special."""

    made: Rendered
    by_template: bool


class Encoder:
    """Turns documents into token ids, with the special tokens that the seed's tokenizer puts around a text."""

    def __init__(self, tokenizer: Any, loss_mask: str, *, date: str | None = None) -> None:
        self.tokenizer, self.loss_mask, self.date = tokenizer, loss_mask, date
        self.ids = 1 + max(tokenizer.get_vocab().values())  # ids stay below; len(tokenizer) misses gaps
        self.end: int | None = tokenizer.eos_token_id
        led = self._led()
        if len(led) > 1:
            raise ArtifactError(
                f"the tokenizer puts {len(led)} special tokens before a text ({tokenizer.decode(led)}); btx supports "
                "one at most. Use a seed whose tokenizer adds no more, by its post_processor."
            )
        self.start: int | None = led[0] if led else None
        self.templates: dict[str, Template] = {}
        added = tokenizer.added_tokens_decoder
        self.special = tuple(token.content for token in added.values() if token.special)
        special = {*tokenizer.all_special_ids} | {n for n, token in added.items() if token.special}
        self.contents = {n: tokenizer.convert_ids_to_tokens(n) for n in special}
        if loss_mask == "completion" and not tokenizer.is_fast:
            raise RecipeError(
                "data.loss_mask: completion needs a tokenizer that gives the character offsets of its tokens, which "
                "this one does not. Give it a tokenizer.json, or set data.loss_mask: all."
            )

    def _led(self) -> Ids:
        """The ids that the tokenizer puts before a text."""
        marked, bare = (
            self.tokenizer(["a"], add_special_tokens=marks, return_attention_mask=False, verbose=False)["input_ids"][0]
            for marks in (True, False)
        )
        if not bare:  # the vocabulary lacks this letter
            return [first for first in marked[:1] if first == self.tokenizer.bos_token_id]
        return marked[: next((k for k in range(len(marked)) if marked[k : k + len(bare)] == bare), 0)]  # type: ignore[no-any-return]

    # ---- text ----

    def written(self, document: Document) -> Written:
        """A document as it is trained on; RecipeError, naming it, where the chat template cannot write it."""
        answers = self.loss_mask == "completion"
        try:
            if document.messages and self.tokenizer.chat_template:
                template = self._template(document.extra.get("tools"))
                return Written(template.write(document.messages, document.extra, answers=answers), True)
            document.require_plain(answers=answers)
        except (TemplateError, ValueError, TypeError) as error:
            raise RecipeError(self._refused(document, error)) from error
        spans, at = list[Span](), 0
        for text, learned in document.pieces:
            spans += [(at, at + len(text))] if text and (learned or not answers) else []
            at += len(text)
        return Written(Rendered(document.text, spans), False)

    def _refused(self, document: Document, error: Exception) -> str:
        roles = ", ".join(str(m["role"]) for m in document.messages[:6])
        where = f"{document.where}: " if document.where else ""
        said = f"{where}a conversation ({roles}, ...) cannot be written by the tokenizer's chat template: {error}."
        if not self.tokenizer.chat_template:
            said = f"{where}{error}."
        remedy = "Leave such conversations out, or use a seed whose template takes them; data.ignore names keys to drop"
        return f"{said} {remedy}{', data.loss_mask: all learns everything' if 'rewrites' in str(error) else ''}."

    def _template(self, tools: Any) -> Template:
        text = self.tokenizer.get_chat_template(tools=tools)
        if text not in self.templates:
            marks = self.tokenizer.special_tokens_map
            self.templates[text] = Template(text, marks, special=self.special, date=self.date)
        return self.templates[text]

    def text(self, document: Document) -> str:
        """A document as it is trained on."""
        return self.written(document).made.text

    # ---- ids ----

    def encode(self, documents: list[Document]) -> Iterator[tuple[Ids, list[int]]]:
        """Token ids of each document and, for each id, its loss mask (0 or 1)."""
        written = [self.written(document) for document in documents]
        everything = self.loss_mask == "all"
        for one, (ids, offsets) in zip(written, self._encoded(written, offsets=not everything), strict=True):
            spans = one.made.learned
            learn = [1] * len(ids) if everything else [int(_overlaps(spans, offset)) for offset in offsets]
            yield self._marked(one, ids, learn, int(everything), int(everything or self._open(one)))

    def prompt(self, text: str, *, chat: bool = False) -> Ids:
        """Ids of a text to be continued: the start token, if the tokenizer puts one there, and no end token.

        With `chat` it is a user's message in the chat template, and the header of the answer follows.
        """
        if chat:
            return self.conversation([{"role": "user", "content": text}])
        ids = self._encoded([Written(Rendered(text, []), False)], offsets=False)[0][0]
        return [*([] if self.start is None else [self.start]), *ids]

    def conversation(self, messages: Sequence[dict[str, str]]) -> Ids:
        """Ids of messages in the chat template, and of the header of the assistant's answer that follows."""
        try:
            made = self._template(None).asked(messages)
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RecipeError(
                f"the chat template cannot write messages ({roles}) to be answered: {error}. Leave `chat` out of a "
                "task, or talk by btx chat --plain."
            ) from error
        return self._encoded([Written(made, True)], offsets=False)[0][0]

    def _open(self, one: Written) -> bool:
        """Whether a document ends with an answer that no special token ends yet."""
        spans, text = one.made.learned, one.made.text
        return bool(spans) and spans[-1][1] == len(text) and not (one.by_template and text.endswith(self.special))

    def _marked(self, one: Written, ids: Ids, learn: list[int], first: int, last: int) -> tuple[Ids, list[int]]:
        """With the start and end token, each once: a template may have written them."""
        start = [] if self.start is None or ids[:1] == [self.start] else [self.start]
        closed = one.by_template and self.end is not None and one.made.text.rstrip().endswith(self.tokenizer.eos_token)
        end = [] if closed else self.separator
        return [*start, *ids, *end], [*(first for _ in start), *learn, *(last for _ in end)]

    @cached_property
    def separator(self) -> Ids:
        """The ids that end a document: the end token, or whatever else the tokenizer has to separate documents."""
        for mark in (self.end, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id):
            if mark is not None:
                return [mark]
        for text in ("\n\n", "\n", " "):
            ids = self._ids([text], split=True)[0]
            if ids and self.tokenizer.unk_token_id not in ids:
                return ids
        raise RecipeError("the tokenizer has no end token, nor space to separate documents. Give it an eos_token.")

    @property
    def warnings(self) -> list[str]:
        """Caveats of the tokenizer for scores."""
        if self.start is not None or self.end is not None:
            return []
        return [
            "the tokenizer has no start and no end token: documents are separated by "
            f"{self.tokenizer.decode(self.separator)!r}, and the first token of a held-out document is not scored, "
            "nor are its bytes"
        ]

    def _ids(self, texts: list[str], *, split: bool) -> list[Ids]:
        return self._tokenized(texts, split=split, offsets=False)["input_ids"]  # type: ignore[no-any-return]

    def _tokenized(self, texts: list[str], *, split: bool, offsets: bool) -> Any:
        """`split` encodes special tokens in the texts as plain text."""
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, split_special_tokens=split,
            return_offsets_mapping=offsets,
        )  # fmt: skip

    def _encoded(self, written: list[Written], *, offsets: bool) -> list[tuple[Ids, list[Span]]]:
        found: list[tuple[Ids, list[Span]]] = [([], [])] * len(written)
        for by_template in (False, True):
            chosen = [n for n, one in enumerate(written) if one.by_template == by_template]
            if not chosen:
                continue
            asked = offsets or any(written[n].made.plain for n in chosen)
            done = self._tokenized([written[n].made.text for n in chosen], split=not by_template, offsets=asked)
            places = done["offset_mapping"] if asked else [[]] * len(chosen)
            for n, ids, spans in zip(chosen, done["input_ids"], places, strict=True):
                text, plain = written[n].made.text, written[n].made.plain
                among = self.contents.keys() & {*ids} if not by_template else ()
                if any(self.contents[token] in text for token in among):  # the token is also a word of the vocabulary
                    spans = self._tokenized([text], split=True, offsets=True)["offset_mapping"][0]
                    plain = [(0, len(text))]
                found[n] = self._respelt(text, ids, spans, plain) if plain else (ids, spans)
        return found

    def _respelt(self, text: str, ids: Ids, offsets: list[Span], plain: list[Span]) -> tuple[Ids, list[Span]]:
        """With special tokens in `plain` spans replaced by the tokens of their text."""
        new: Ids = []
        places: list[Span] = []
        for token, place in zip(ids, offsets, strict=True):
            said = text[slice(*place)]
            mark = self.contents.get(token) == said.strip() and _overlaps(plain, place)
            again = self._as_text(said) if mark else [token]
            new += again
            places += [place] * len(again)
        return new, places

    def _as_text(self, mark: str) -> Ids:
        """The tokens of a special token as text, in two parts where it is also a word of the vocabulary."""
        for parts in ((mark,), (mark[:1], mark[1:])):
            found = [self._amid(part) for part in parts]
            ids = [token for part in found for token in part]
            if all(found) and (mark.strip() not in map(self.contents.get, ids) or mark == self.tokenizer.unk_token):
                return ids
        raise RecipeError(f"the tokenizer cannot write {mark!r} as text. Leave texts that hold it out.")

    def _amid(self, text: str) -> Ids:
        """The tokens of a text after another one, whose tokens are dropped; none where the two cannot be separated."""
        for before in ("\n", "a", "0", " "):
            done = self._tokenized([before + text], split=True, offsets=True)
            for n, (start, _) in enumerate(done["offset_mapping"][0]):
                if start >= len(before):
                    if n and done["offset_mapping"][0][n - 1][1] <= len(before):
                        return done["input_ids"][0][n:]  # type: ignore[no-any-return]
                    break
        return []

    # ---- held-out text ----

    def scored(self, documents: list[Document], limit: int) -> list[tuple[Ids, int]]:
        """Token ids of held-out documents and the bytes of text that they are scored on, `limit` at most.

        The first id is the context (start, else end token) and is not scored. Without either, the first token of the
        text is the context, and its bytes do not count.
        """
        lead = self.start if self.start is not None else self.end
        written = [_shortened(self.written(document), limit) for document in documents]
        found = []
        for one, (ids, offsets) in zip(written, self._encoded(written, offsets=lead is None), strict=True):
            text = one.made.text
            if lead is None:
                text = text[offsets[0][1] :] if offsets else ""
            elif ids[:1] != [lead]:
                ids = [lead, *ids]
            found.append((ids, len(text.encode())))
        return found


def _shortened(one: Written, limit: int) -> Written:
    text = cut(one.made.text, limit)
    plain = [(start, end) for start, end in one.made.plain if end <= len(text)]
    return Written(Rendered(text, [], plain), one.by_template)


def _overlaps(spans: list[Span], place: Span) -> bool:
    """Whether a token at `place` overlaps one of the spans, which are in order; an empty one, whether it lies in
    one."""
    start, end = place
    n = bisect_right(spans, (max(end - 1, start), 2**62)) - 1
    return n >= 0 and spans[n][1] > start
