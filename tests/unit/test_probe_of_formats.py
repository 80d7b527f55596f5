"""Formats of a model's own answers: what counts as which, shares and entropy, and the text is the tokenizer's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.errors import RecipeError
from btx.models.opened import Opened
from btx.probes import formats
from btx.probes.contract import Data
from btx.probes.formats import OF_ARITHMETIC, FormatsSettings
from tests.support.project import write_project

END = 9
WORDS = {0: "4", 1: "2", 2: " #### 7", 3: "\\boxed{1}", 4: " so", END: "<end>"}


class Recites(Opened):
    """Answers with given ids, whatever the prompt: by the prompt's last id, which of them."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def log_probs(self, ids_BS: Tensor, prompt: int = 0) -> Tensor:
        """Not asked for."""
        raise AssertionError

    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, Any]:
        """The first id of each answer."""
        return self._at(ids_BS[:, -1], 0)

    def decode(self, ids_B: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next one."""
        return self._at(cache[0], cache[1] + 1)

    def _at(self, which: Tensor, at: int) -> tuple[Tensor, Any]:
        log_p = torch.full((len(which), 10), -1e9)
        for row, one in enumerate(which.tolist()):
            answer = self.answers[one]
            log_p[row, answer[at] if at < len(answer) else 0] = 0.0
        return log_p, (which, at)


def spoken(ids: list[int], *, skip_special_tokens: bool) -> str:
    """Ids as text."""
    return "".join(WORDS[n] for n in ids if n != END or not skip_special_tokens)


TOKENIZER = SimpleNamespace(decode=spoken, eos_token_id=END)
SAID = FormatsSettings(prompts=8, samples=2, prompt_tokens=2, new_tokens=4)


def measured(answers: list[list[int]], said: FormatsSettings = SAID) -> Any:
    """The probe of a model that answers so, on a document for each answer."""
    documents = [(np.array([4, n, 2, END]), 4) for n in range(len(answers))]
    return formats.measure(Recites(answers), None, Data({"d": documents}, 8, 100, lambda: TOKENIZER), said)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so it is\n#### 1,234", "hashes"), ("####", "other"), (r"thus \boxed{5} #### x", "boxed"),
        (" -3.5. ", "number"), ("3 apples", "other"), ("it is\n3", "other"), ("```python", "code"),
        ("  print(3)", "code"),
        ("I import things", "other"), ("", "other"), ("def f(): #### 3", "hashes"),
    ],
)  # fmt: skip
def test_the_first_format_that_is_found_counts(text: str, wanted: str) -> None:
    assert formats.format_of(text, OF_ARITHMETIC) == wanted


def test_entropy_is_one_where_all_are_alike_and_nothing_where_one_is_all() -> None:
    assert formats.entropy({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}) == pytest.approx(1.0)
    assert formats.entropy({"a": 1.0, "b": 0.0}) == 0.0
    assert formats.entropy({"a": 0.5, "b": 0.5, "c": 0.0}) == pytest.approx(math.log(2) / math.log(3))


def test_shares_length_and_entropy_are_those_of_the_answers() -> None:
    found = measured([[0, 1, END, 2], [2, END], [3, 4, END], [4, 4, 4, 4]])
    numbers = found.numbers["d"]
    assert {name: value for name, value in numbers.items() if name.startswith("share_")} == {
        "share_hashes": 0.25, "share_boxed": 0.25, "share_code": 0.0, "share_number": 0.25, "share_other": 0.25,
    }  # fmt: skip
    assert numbers["tokens"] == (2 + 1 + 2 + 4) / 4  # without the end, and nothing that comes after it
    assert numbers["entropy"] == pytest.approx(math.log(4) / math.log(5))
    assert numbers["held_out_entropy"] == 0.0  # each real text goes on with " #### 7"
    assert [row["text"] for row in found.rows[:4]] == ["42", " #### 7", "\\boxed{1} so", " so so so so"]
    assert len(found.rows) == 8
    collapsed = measured([[2, END]] * 3).numbers["d"]
    assert (collapsed["share_hashes"], collapsed["entropy"]) == (1.0, 0.0)


def test_what_cannot_be_measured_is_said() -> None:
    data = Data({"d": [(np.array([4, 0]), 4)]}, 8, 100, lambda: TOKENIZER)
    assert "more than 2 tokens" in formats.measure(Recites([]), None, data, SAID).missing
    assert "no tokenizer" in formats.measure(Recites([]), None, Data({}, 8, 100), SAID).missing


@pytest.mark.parametrize(
    ("said", "why"),
    [("{a: '['}", "a is no regular expression of Python"), ("{other: x}", "stands for what no format finds"),
     ("{}", "must not be empty")],
)  # fmt: skip
def test_formats_that_are_none_are_refused(tmp_path: Path, said: str, why: str) -> None:
    with pytest.raises(RecipeError, match=rf"probes.formats.formats: .*{why}"):
        load_recipe(write_project(tmp_path), [f"probes={{formats: {{formats: {said}}}}}"])


def test_a_measurement_writes_text_by_the_model_s_own_tokenizer(tmp_path: Path) -> None:
    said = "probes={formats: {prompt_tokens: 4, new_tokens: 6, samples: 1, formats: {any: '(?s).*'}}}"
    recipe = load_recipe(write_project(tmp_path), [f"run.directory={tmp_path}/runs", said])
    step: Any = Graph(recipe, tmp_path).steps["measure:formats:seed"]
    found = step._measure({"math": [(np.arange(1, 9), 8)]})
    assert found.numbers["math"]["share_any"] == 1.0
    assert found.rows[0]["text"]


def test_the_order_of_formats_decides_and_is_in_the_key(tmp_path: Path) -> None:
    """And a measurement with another order is no twin whose result may be copied."""
    write_project(tmp_path)
    found = []
    for order in ("{a: x, b: y}", "{b: y, a: x}"):
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"probes={{formats: {{formats: {order}}}}}"])
        found.append(Graph(recipe, tmp_path).steps["measure:formats:seed"])
    assert found[0].key != found[1].key
    assert json.dumps(found[0].options) != json.dumps(found[1].options)  # type: ignore[attr-defined]
