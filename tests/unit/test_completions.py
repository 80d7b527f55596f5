"""Completions of a task's items: the same in any batch, ended where they should, judged item by item."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from btx.cli.main import main
from btx.data.encoder import Encoder, load_tokenizer
from btx.errors import RecipeError
from btx.models.opened import Stock, opened_checkpoint
from btx.recipe.settings import RunSettings
from btx.recipe.task_settings import TaskSettings
from btx.tasks.items import read_items
from btx.tasks.solve import Completion, complete, cut, end_ids, numbers_of, prompts_of, require_room, rows_of, text_of
from tests.support.models import config_of, save_model, tokenizer_into
from tests.support.world import write_jsonl

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[it]{% endif %}"


def task(**more: Any) -> TaskSettings:
    """Settings of an exact-match task."""
    return TaskSettings.model_validate({"file": "x", "kind": "exact_match", **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model."""
    return save_model(tmp_path_factory.mktemp("model") / "m", config_of("llama"), seed=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Stock]:
    with opened_checkpoint(folder, where=RunSettings(device="cpu")) as found:
        yield found


def test_completions_do_not_depend_on_their_batch(folder: Path, model: Stock) -> None:
    """Alone and beside others, with stops and without: those of greedy decoding without a cache."""
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in ("the fox", "the dog", "xyz", "zyx", "lazy")]
    assert len({*map(len, prompts)}) < len(prompts)
    end = end_ids(folder, tokenizer)
    for stops in ([], ["e"], ["o", "he "]):
        alone, batched = (
            complete(model, tokenizer, prompts, most=10, stops=stops, end=end, batch_tokens=size) for size in (1, 10**6)
        )
        assert alone == batched
        for ids, made in zip(prompts, alone, strict=True):
            text, tokens = _plainly(model, tokenizer, ids, 10, stops, end)
            assert (made.text, made.tokens) == (text, tokens)
    assert any(one.ended for one in batched)


def _plainly(model: Stock, tokenizer: Any, prompt: list[int], most: int, stops: list[str], end: set[int]) -> Any:
    ids = list(prompt)
    for _ in range(most):
        ids.append(int(model.log_probs(torch.tensor([ids]))[0, -1].argmax()))
        text, stopped = cut(text_of(tokenizer, ids[len(prompt) :], end), stops)
        if stopped or ids[-1] in end:
            break
    return text, len(ids) - len(prompt)


def test_rows_and_numbers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(4)])
    items = read_items(task(), str(tmp_path / "i.jsonl"), None)
    made = [Completion(text, 3, n < 2) for n, text in enumerate(["#### 0", "so 1", "3", "none"])]
    rows = rows_of(items, made, task())
    assert [row["right"] for row in rows] == [True, True, False, False]
    assert [row["answer"] for row in rows] == ["0", "1", "3", None]
    found = numbers_of(rows)
    assert (found["accuracy"], found["right"], found["items"], found["ended"], found["answered"]) == (0.5, 2, 4, 2, 3)
    assert len({row["prompt_sha256"] for row in rows}) == 4


def test_a_prompt_that_is_too_long_is_refused() -> None:
    require_room([[1] * 10], 6, 16, "task:x")
    require_room([[1] * 10], 6, None, "task:x")
    with pytest.raises(RecipeError, match=r"10 tokens.*16 positions"):
        require_room([[1] * 10], 7, 16, "task:x")


def test_a_chat_template_is_used_only_if_asked_for(folder: Path, tmp_path: Path) -> None:
    tokenizer_into(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    write_jsonl(tmp_path / "i.jsonl", [{"question": "the <|end|> fox", "answer": "1"}])
    items = read_items(task(prompt="{question}"), str(tmp_path / "i.jsonl"), None)
    with pytest.raises(RecipeError, match="no chat template"):
        prompts_of(Encoder(tokenizer, "all"), items, task(chat=True))
    tokenizer.chat_template = CHAT
    plain, chat = (prompts_of(Encoder(tokenizer, "all"), items, task(chat=flag))[0] for flag in (False, True))
    assert tokenizer.decode(plain) == "the <|end|> fox"
    assert tokenizer.decode(chat) == "[user]the <|end|> fox\n[it]"
    assert tokenizer.eos_token_id not in {*plain, *chat}  # a special token in an item is text


def test_what_ends_a_text(tmp_path: Path) -> None:
    tokenizer_into(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert end_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}', encoding="utf-8")
    assert end_ids(tmp_path, tokenizer) == {7, 9, tokenizer.eos_token_id}


def test_without_lm_eval_the_verb_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "btx.tasks.harness", raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")  # so that what the verb sets is undone
    said = CliRunner().invoke(main, ["lm-eval", str(folder), "--tasks", "x", "--include", str(folder)])
    assert said.exit_code == 5
    assert "pip install 'btx[lm-eval]'" in said.output
