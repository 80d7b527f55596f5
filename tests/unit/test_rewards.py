"""Rewards: the confidence that pays most, what a text states, and the formats that a KL term leads to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from btx.data.arithmetic import problems
from btx.recipe.task_settings import TaskSettings
from btx.rl.rewards import binary, calibrated, confidence, optimum
from btx.rl.settings import STATED, PolicySettings
from btx.tasks.answers import judge_for, number, require_answers
from btx.tasks.items import read_items

CHANCE = st.floats(0, 1)
TASK = {"file": "builtin:arithmetic", "kind": "exact_match"}


def expected(chance: float, stated: float | None, unstated: float = 0.5) -> float:
    """The mean calibrated reward of answers that are right with this chance."""
    return chance * calibrated(True, stated, unstated) + (1 - chance) * calibrated(False, stated, unstated)


@given(CHANCE, CHANCE)
def test_the_confidence_that_pays_most_is_the_chance_of_being_right(chance: float, stated: float) -> None:
    """Its cost is the squared distance, so it is a proper score with one optimum."""
    assert expected(chance, chance) - expected(chance, stated) == pytest.approx((chance - stated) ** 2, abs=1e-12)


@given(CHANCE, CHANCE, st.floats(0.25, 1))
def test_a_likelier_answer_pays_more_when_both_are_honest(one: float, other: float, unstated: float) -> None:
    assert (expected(one, one, unstated) - expected(other, other, unstated)) * (one - other) >= -1e-12


@given(CHANCE, st.floats(0.25, 1))
def test_silence_never_pays(chance: float, unstated: float) -> None:
    assert expected(chance, None, unstated) <= expected(chance, chance, unstated) + 1e-12


def test_an_answer_without_confidence_is_no_confidently_wrong_one_unless_that_is_said() -> None:
    unstated = PolicySettings.model_fields["unstated"].default
    assert calibrated(False, 1.0, unstated) == -1 < calibrated(False, None, unstated) == -0.5
    assert calibrated(False, None, 1.0) == -1
    assert calibrated(True, None, 0.25) == calibrated(True, 0.5, 0.25)
    assert (binary(True), binary(False)) == (1, 0)


@pytest.mark.parametrize(("text", "wanted"), [
    ("7, confidence: 0.8", 0.8), ("Confidence 80%", 0.8), ("confidence = .25", 0.25), ("CONFIDENCE: 1", 1.0),
    ("confidence: 0", 0.0), ("confidence: 12.5 %", 0.125), ("confidence: 0.1, no, confidence: 0.9", 0.9),
    ("confidence: high", None), ("0.8", None), ("confidence: 120%", None), ("", None),
])  # fmt: skip
def test_the_confidence_that_a_text_states(text: str, wanted: float | None) -> None:
    found = confidence(text, STATED)
    assert found == wanted if wanted is None else found == pytest.approx(wanted)


def test_a_pattern_whose_group_is_no_number_states_none() -> None:
    assert confidence("sure: very", r"sure: (\w+)") is None
    assert confidence("sure", r"sure(: \d)?") is None
    assert confidence("sure: nan", r"sure: (\w+)") is None


# ---- formats ----

SHARES, ACCURACY = {"a": 0.3, "b": 0.5, "c": 0.2}, {"a": 0.9, "b": 0.4, "c": 0.0}


@pytest.mark.parametrize("kl", [0.25, 1.0, 3.0])
def test_policy_gradient_on_a_table_of_formats_ends_at_the_optimum(kl: float) -> None:
    """Over (format, right or wrong), REINFORCE with a baseline and a KL term, in expectation.

    The closed form re-weights; a real run collapses by its dynamics, which are not seen here.
    """
    names = [(name, right) for name in SHARES for right in (True, False)]
    start = torch.tensor([SHARES[n] * (ACCURACY[n] if right else 1 - ACCURACY[n]) for n, right in names]).double()
    reward = torch.tensor([binary(right) for _, right in names]).double()
    known = start > 0  # what the policy never says, it does not learn
    logits = start[known].log().requires_grad_()
    for _ in range(4000):
        log_p = logits.log_softmax(0)
        p = log_p.exp()
        advantage = (reward[known] - (p * reward[known]).sum()).detach()
        loss = -(p.detach() * advantage * log_p).sum() + kl * (p * (log_p - start[known].log())).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 1.0 * gradient / max(kl, 1.0)
    found = torch.zeros(len(names)).double()
    found[known] = logits.softmax(0).detach()
    ended = {name: float(found[2 * n] + found[2 * n + 1]) for n, name in enumerate(SHARES)}
    assert ended == pytest.approx(optimum(SHARES, ACCURACY, kl), abs=1e-3)


@given(st.floats(0.01, 1), st.floats(0.01, 1), CHANCE, CHANCE, st.floats(0.001, 50))
def test_the_optimum_is_the_formula(one: float, other: float, p: float, q: float, kl: float) -> None:
    found = optimum({"a": one / (one + other), "b": other / (one + other)}, {"a": p, "b": q}, kl)
    assert sum(found.values()) == pytest.approx(1)
    if kl > 0.01 and found["b"] > 1e-9:
        odds = math.log(one / other) + np.logaddexp(math.log(p) + 1 / kl if p else -np.inf, np.log1p(-p) if p < 1 else
                                                    -np.inf)  # fmt: skip
        odds -= np.logaddexp(math.log(q) + 1 / kl if q else -np.inf, np.log1p(-q) if q < 1 else -np.inf)
        assert math.log(found["a"] / found["b"]) == pytest.approx(float(odds), abs=1e-6) if found["a"] else True


def test_the_ends_of_the_kl_weight() -> None:
    assert optimum(SHARES, ACCURACY, 1e9) == pytest.approx(SHARES)
    assert optimum(SHARES, ACCURACY, 1e-3) == pytest.approx({"a": 0.27 / 0.47, "b": 0.2 / 0.47, "c": 0.0})


# ---- settings ----


@pytest.mark.parametrize(("more", "words"), [
    ({"reward": "calibrated", "scale_rewards": "group"}, "scale_rewards: none"),
    ({"confidence": r"\d"}, "group"), ({"confidence": "("}, "regular expression"),
    ({"sequence_length": 256}, "max_new_tokens"), ({"bands": ["hard"]}, "needs marks"),
    ({"passrate": "x.jsonl"}, "bands"), ({"mark_every": 5}, "bands"), ({"generations": 1}, "generations"),
    ({"formats": {"other": "x"}}, "other"), ({"bands": ["odd"], "passrate": "x"}, "bands"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(more: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PolicySettings.model_validate({"task": TASK, **more})


# ---- generated items ----


def test_generated_items_are_each_there_once_and_the_same_for_any_number() -> None:
    few, many = list(problems(50)), list(problems(500))
    assert few == many[:50]
    assert len({question for question, _ in many}) == 500
    assert list(problems(50, seed=1)) != few


def test_generated_items_are_read_as_those_of_a_file() -> None:
    task = TaskSettings.model_validate({**TASK, "limit": 200})
    items = read_items(task, "builtin:arithmetic", None)
    require_answers(task, items)
    assert len(items) == 200
    judge = judge_for(task)
    for item, (question, answer) in zip(items, problems(200), strict=True):
        assert item.prompt == f"Question: {question}\nAnswer:"
        assert judge(item, f"so it is\n#### {answer}").right
        assert judge(item, f"so it is {answer}").right
        assert not judge(item, f"#### {int(str(number(answer))) + 1}").right
