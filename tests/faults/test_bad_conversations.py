"""Conversations that would teach nothing, or not what they say, are refused before anything is written."""

from __future__ import annotations

import pytest

from tests.support.chat_cases import CHATML
from tests.support.world import World, refused, write_jsonl


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "model"), ("user", "Assistant"), ("user", "user")])
@pytest.mark.parametrize("template", [True, False])
def test_data_without_an_answer_is_refused_where_only_answers_are_learned(
    world: World, roles: tuple[str, str], template: bool
) -> None:
    asked, answered = roles
    rows = [
        {"messages": [{"role": asked, "content": f"what is {n}"}, {"role": answered, "content": f"the number {n}"}]}
        for n in range(60)
    ]
    write_jsonl(world.math, rows)
    if template:
        (world.seed / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    world.set("data.loss_mask", "completion")
    refused(world.write(), world.runs, 2, ("tokens:math", "no document has an answer", "role assistant"))
    rows[7]["messages"].append({"role": "assistant", "content": "Seven."})
    write_jsonl(world.math, rows)
    world.examine()
