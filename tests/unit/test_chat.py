"""Conversations: the text as at inference, loss on the answers only, and nothing dropped silently."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from btx.data.chat import strftime
from btx.data.documents import parse
from btx.data.encoder import Encoder
from btx.errors import RecipeError
from btx.recipe.settings import DataSettings
from tests.support.chat_cases import CHATML, QWEN3, TAGGED, TALK, TEMPLATES, encoded, render, tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    eos = "<|im_end|>"
    said, _ = encoded({"messages": TALK}, TEMPLATES[name], eos=eos)
    theirs = render({"messages": TALK}, TEMPLATES[name])
    assert said.replace("<s>", "") == theirs.replace("<s>", "") + ("" if theirs.rstrip().endswith(eos) else eos)


LEARNED = {
    "chatml": "five<|im_end|>  five too\n<|im_end|>",
    "llama3": "five<|eot|>five too<|eot|>",
    "mistral": " five<|im_end|>   five too\n<|im_end|>",
    "gemma": "five<|im_end|>five too<|im_end|>",
    "qwen3": "five<|im_end|>  five too\n<|im_end|>",
    "tagged": "five<|im_end|>  five too\n<|im_end|>",
    "closed": "five\nfive too\n\n<|im_end|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_marks_are_learned_and_nothing_else(name: str) -> None:
    _, learned = encoded({"messages": TALK}, TEMPLATES[name])
    assert learned.replace(" ", "") == LEARNED[name].replace(" ", "")
    for text in ("What", "And", "brief", "assistant", "user", "model", "<|im_start|>", "<|head|>", "INST"):
        assert text not in learned


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3", "mistral"])
def test_after_a_question_alone_nothing_is_learned_not_even_the_end(name: str) -> None:
    assert encoded({"messages": TALK[:2]}, TEMPLATES[name])[1] == ""
    assert encoded({"messages": TALK[:2]}, None)[1] == ""


def test_the_tags_of_a_template_say_the_same_as_transformers_mask() -> None:
    using = tokenizer(template=TAGGED)
    done = using.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    theirs = using.decode([i for i, yes in zip(done["input_ids"], done["assistant_masks"], strict=True) if yes])
    assert encoded({"messages": TALK}, TAGGED)[1] == theirs


@pytest.mark.parametrize("loss_mask", ["all", "completion"])
@pytest.mark.parametrize("name", ["chatml", "mistral", "closed"])
def test_an_end_mark_that_the_template_brings_stands_once(name: str, loss_mask: str) -> None:
    said, learned = encoded({"messages": TALK[:3]}, TEMPLATES[name], loss_mask=loss_mask)
    assert said.rstrip().endswith("<|im_end|>")
    assert not said.rstrip().removesuffix("<|im_end|>").rstrip().endswith("<|im_end|>")
    assert learned.count("five<|im_end|>") + learned.count("five\n<|im_end|>") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_assistant_that_says_nothing_is_not_learned(name: str) -> None:
    talk = [*TALK[:2], {"role": "assistant", "content": ""}, *TALK[3:]]
    learned = encoded({"messages": talk}, TEMPLATES[name])[1]
    assert learned.count("<|im_end|>") + learned.count("<|eot|>") == 1
    assert "five too" in learned
    assert encoded({"messages": talk[:3]}, None)[1] == ""


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"ignore": True}, {"weight": 0.0}])
@pytest.mark.parametrize("template", [CHATML, QWEN3, TAGGED, None])
def test_a_turn_that_is_not_to_be_learned_is_context(flag: Any, template: str | None) -> None:
    talk = [TALK[1], {**TALK[2], "content": "wrong", **flag}, TALK[3], {**TALK[4], "weight": 1}]
    said, learned = encoded({"messages": talk}, template)
    assert "wrong" in said
    assert "wrong" not in learned
    assert "five too" in learned
    assert learned.count("<|im_end|>") == 1
    with pytest.raises(RecipeError, match=r"not to be learned.*loss_mask: completion"):
        encoded({"messages": talk}, template, loss_mask="all")


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": "no"}, {"weight": 1, "ignore": True}])
def test_a_flag_that_says_neither_yes_nor_no_is_refused(flag: Any) -> None:
    with pytest.raises((RecipeError, ValueError), match="message"):
        encoded({"messages": [TALK[1], {**TALK[2], **flag}]}, CHATML)
    with pytest.raises((RecipeError, ValueError), match="only the assistant's"):
        encoded({"messages": [{**TALK[1], "train": True}, TALK[2]]}, CHATML)


# ---- reasoning and tools ----

TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]


def test_tools_and_calls_are_written_and_a_call_is_learned_whole() -> None:
    talk = [
        TALK[1],
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "5"},
        TALK[2],
    ]
    record = {"messages": talk, "tools": TOOLS}
    said, learned = encoded(record, QWEN3)
    assert said.removeprefix("<s>") == render(record, QWEN3.replace("m.content", "(m.content or '')"))
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert learned == f"\n{written}<|im_end|>five<|im_end|>"
    assert '"description": "adds"' in said


@pytest.mark.parametrize("where", ["reasoning_content", "reasoning", "content"])
def test_reasoning_is_learned_where_the_template_writes_it(where: str) -> None:
    def answer(number: int) -> Any:
        if where == "content":
            return {"role": "assistant", "content": f"<think>\nbecause {number}\n</think>\n\nfive {number}"}
        return {"role": "assistant", "content": f"five {number}", where: f"because {number}"}

    talk = [TALK[1], answer(1), TALK[3], answer(2)]
    said, learned = encoded({"messages": talk}, QWEN3)
    assert said.removeprefix("<s>") == render({"messages": talk}, QWEN3)
    assert learned == "five 1<|im_end|><think>\nbecause 2\n</think>\n\nfive 2<|im_end|>"


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"messages": TALK[1:3], "tools": TOOLS}, "tools"),
        ({"messages": TALK[1:3], "documents": [{"title": "a"}]}, "documents"),
        ({"messages": TALK[1:3], "tools": "[]"}, "tools"),
        ({"messages": TALK[1:3], "weight": 0}, "weight"),
        ({"messages": [{**TALK[1], "name": "Ada"}, TALK[2]]}, "name"),
        ({"messages": [TALK[1], {**TALK[2], "reasoning_content": "hm"}]}, "reasoning_content"),
        ({"messages": [TALK[1], {**TALK[2], "tool_calls": CALL}]}, "tool_calls"),
        ({"messages": [TALK[1], {**TALK[2], "tool_call_id": "7"}]}, "tool_call_id"),
        ({"messages": [{**TALK[1], "content": [{"type": "image_url", "image_url": "x"}]}, TALK[2]]}, "image_url"),
        ({"messages": [{**TALK[1], "content": [{"type": "text", "text": "x", "cache_control": 1}]}]}, "cache_control"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, None])
def test_what_the_template_does_not_read_is_refused_by_name(record: Any, word: str, template: str | None) -> None:
    with pytest.raises((RecipeError, ValueError), match=word):
        encoded(record, template)
    using = Encoder(tokenizer(template=template), "completion")
    if word not in ("image_url", "cache_control"):
        assert list(using.encode([parse(record, [word])]))


def test_texts_in_parts_are_joined_and_what_describes_a_record_is_no_part_of_it() -> None:
    parts = [{"type": "text", "text": "What is two "}, {"type": "text", "text": "plus three?", "image_url": None}]
    record = {"messages": [{**TALK[1], "content": parts}, TALK[2]], "id": 7, "source": "here", "tools": None}
    assert encoded(record, CHATML) == encoded({"messages": TALK[1:3]}, CHATML)


ZEPHYR = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'U: ' + m.content }}{% elif m.role == 'system' %}"
    "{{ 'S: ' + m.content }}{% elif m.role == 'assistant' %}{{ 'A: ' + m.content }}{% endif %}\n{% endfor %}"
)
EITHER = CHATML.replace("m.content +", "(m.content or m.tool_calls | tojson) +")
NAMES = QWEN3.replace("(c.function | tojson)", "c.function.name")
LAST = CHATML.replace("m.content +", "((m.thinking or '') + m.content if loop.last else m.content) +")
THOUGHT = {**TALK[2], "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("messages", "template", "said"),
    [
        ([*TALK[1:3], {"role": "tool", "content": "5"}, TALK[4]], ZEPHYR, r"content of message 3 \(tool\)"),
        ([{"role": "developer", "content": "Be brief."}, *TALK[1:3]], ZEPHYR, r"content of message 1 \(developer\)"),
        (TALK, CHATML.replace("m.content", "'x'"), r"content of message 1 \(system\)"),
        ([TALK[1], {**TALK[2], "tool_calls": CALL}], EITHER, r"tool_calls of message 2 \(assistant\)"),
        ([{**TALK[1], "tool_calls": CALL}, TALK[2]], QWEN3, r"tool_calls of message 1 \(user\)"),
        ([{**TALK[1], "name": "Ada"}, TALK[2]], NAMES, r"name of message 1 \(user\)"),
        ([TALK[1], {**THOUGHT, "thinking": "aha"}], QWEN3, r"thinking of message 2"),
    ],
)
@pytest.mark.parametrize("loss_mask", ["all", "completion"])
def test_what_the_template_passes_over_in_this_conversation_is_refused(
    messages: Any, template: str, said: str, loss_mask: str
) -> None:
    """Even if the template mentions the key somewhere, or renders the content of other messages."""
    with pytest.raises(RecipeError, match=said):
        encoded({"messages": messages}, template, loss_mask=loss_mask)


@pytest.mark.parametrize("look", ["m.tool_calls", "m['tool_calls']", "m.get('tool_calls')", "m.items() | list", "m"])
def test_a_key_is_read_in_whatever_way_the_template_looks_at_it(look: str) -> None:
    template = CHATML.replace("m.content +", f"m.content + ({look}) | string +")
    assert "add" in encoded({"messages": [TALK[1], {**TALK[2], "tool_calls": CALL}]}, template, loss_mask="all")[0]


def test_what_is_thought_may_be_written_in_the_last_turn_alone() -> None:
    talk = [TALK[1], THOUGHT, TALK[3]]
    for messages in (talk, [*talk, THOUGHT]):
        said, _ = encoded({"messages": messages}, LAST, loss_mask="all")
        assert said == render({"messages": messages}, LAST) + "<|im_end|>" * (not said.rstrip().endswith("<|im_end|>"))


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_empty_key_or_column_says_nothing(template: str | None) -> None:
    talk = [{**TALK[1], "tool_calls": [], "name": ""}, {**TALK[2], "reasoning_content": "", "tool_calls": []}]
    record = {"messages": talk, "tools": [], "documents": [], "kwargs": {}}
    assert encoded(record, template) == encoded({"messages": TALK[1:3]}, template)


def test_a_column_about_the_record_is_written_where_the_template_reads_it() -> None:
    template = "{{ 'In ' + language + '. ' if language else '' }}" + CHATML
    record = {"messages": TALK, "language": "French"}
    assert encoded(record, template, loss_mask="all")[0] == render(record, template)
    assert encoded(record, CHATML, loss_mask="all")[0] == render({"messages": TALK}, CHATML)


# ---- ambient values, and what is refused ----


def test_two_days_locales_and_environments_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%d %b %Y') }} " + CHATML
    with pytest.raises(RecipeError, match=r"today's date.*data.date"):
        encoded({"messages": TALK}, template)
    found = set()
    for zone in ("UTC", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        using = Encoder(tokenizer(template=template), "all", date="2026-01-31")
        found.add(using.text(parse({"messages": TALK})))
    assert len(found) == 1
    assert found.pop().startswith("31 Jan 2026 <|im_start|>")
    monkeypatch.undo()
    time.tzset()
    with pytest.raises(ValueError, match="date"):
        DataSettings(date="2026-02-31")


@pytest.mark.parametrize("day", [date(2024, 2, 9), date(2026, 12, 31)])
@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %B %d, %y", "%a %m/%j", "%-d %%", "%Y-%m-%d"])
def test_dates_are_written_as_python_does_in_english(day: date, form: str) -> None:
    assert strftime(day, form) == day.strftime(form)


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}", "{{ lipsum() }}", "{{ messages[0]", "{{ 1 | nosuch }}"])
def test_a_template_that_draws_at_random_or_is_broken_is_refused(template: str) -> None:
    with pytest.raises(RecipeError, match="template"):
        encoded({"messages": TALK}, template)


@pytest.mark.parametrize("shown", ["m.content + m.content", "m.content[:3]", "m.content.split()[0]"])
def test_answers_that_cannot_be_told_are_refused(shown: str) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ " + shown + " }}\n{% endfor %}"
    with pytest.raises(RecipeError, match=r"rewrites .* message 3.*loss_mask: all"):
        encoded({"messages": [*TALK[:2], {**TALK[2], "content": "five it is"}, *TALK[3:]]}, template)
    assert encoded({"messages": TALK}, template, loss_mask="all")


@pytest.mark.parametrize("how", ["reverse", "list"])
def test_answers_are_found_where_a_template_orders_and_changes_them(how: str) -> None:
    turns = "{% for m in messages | " + how + " %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    template = "{{ messages | length }}" + turns
    talk = [*TALK[:4], {**TALK[4], "content": "five too"}]
    assert encoded({"messages": talk}, template)[1].removesuffix("<|im_end|>").split() == (
        ["FIVE", "TOO", "FIVE"] if how == "reverse" else ["FIVE", "FIVE", "TOO"]
    )


def test_characters_that_no_text_may_hold_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"U.FDD0"):
        encoded({"messages": [TALK[1], {**TALK[2], "content": "a\ufdd0b"}]}, CHATML)


def test_a_template_is_the_one_for_tools_where_there_are_several(tmp_path: Path) -> None:
    using = tokenizer(template=CHATML)
    using.chat_template = {"default": CHATML, "tool_use": QWEN3}
    made = Encoder(using, "all")
    assert "adds" in made.text(parse({"messages": TALK[1:3], "tools": TOOLS}))
    assert made.text(parse({"messages": TALK[1:3]})) == render({"messages": TALK[1:3]}, CHATML)
