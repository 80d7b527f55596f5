"""The founding claims as judged from a report's numbers: each side of each, and silence where nothing was measured."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from btx.claims.registry import claims, judged
from btx.report.claims import HEAD, lines, rows, section, summary

SPENT = {"tokens": 100, "steps": 10, "flops": 2e9, "path_tokens": 50, "path_steps": 5, "path_flops": 1e9}
MODELS = ("seed", "finetuned", "dense", "proxy", "reft", "grpo", "grpo-sure", "grpo-hard", "sft", "sft-simplified")


def policy(reward: str, first: float, last: float, entropy: float, error: float) -> dict[str, Any]:
    """A policy that began with an entropy of 0.8 and a calibration error of 0.3."""
    before = {"accuracy": first, "entropy": 0.8, "share_plain": 0.4, "stated_ece": 0.3, "stated": 1.0}
    after = {"accuracy": last, "entropy": entropy, "share_plain": 0.9, "stated_ece": error, "stated": 1.0}
    return {"reward": reward, "kl": 0.0, "first": before, "last": after}


def right(accuracy: float, compliance: float | None = None) -> dict[str, Any]:
    """A model's numbers on a task."""
    return {"accuracy": accuracy} | ({} if compliance is None else {"compliance": compliance, "chance": 1 / 3})


LOST = {"finetuned": 0.1, "dense": 0.3, "proxy": 0.1, "reft": 0.05, "sft": 0.2, "grpo": 0.4}
RESULTS: dict[str, Any] = {
    "mean": dict.fromkeys(MODELS, 2.0) | {"finetuned": 1.7, "dense": 1.8, "proxy": 1.85, "reft": 1.9},
    "probes": {
        "forgetting": {
            name: {"seed": {"change_nats_per_token": lost}}
            for name, lost in LOST.items()
        },
        "logit_lens": {"seed": {"seed": {"middle_bits_per_token": 4.0}},
                       "dense": {"seed": {"middle_bits_per_token": 4.5}},
                       "proxy": {"missing": "it has no hidden states"}},
    },
    "tasks": {
        "labels": {"models": dict.fromkeys(MODELS, right(0.1, 0.2)) | {
            "sft": right(0.35, 0.9), "sft-simplified": right(0.33, 0.95)}},
        "sums": {"models": dict.fromkeys(MODELS, right(0.5)) | {"grpo": right(0.9), "grpo-hard": right(0.2)}},
    },
    "policies": {"grpo": policy("binary", 0.5, 0.9, 0.3, 0.4), "grpo-sure": policy("calibrated", 0.5, 0.9, 0.3, 0.1),
                 "grpo-hard": policy("binary", 0.1, 0.1, 0.5, 0.4)},
    "spent": dict.fromkeys(MODELS, SPENT) | {"proxy": dict.fromkeys(SPENT, 0)},
}  # fmt: skip
SYSTEMS = ["Branch-Train-MiX", "proxy-tuning", "LoReFT", "RL's format collapse", "over-hard RL samples",
           "calibrated rewards", "instruction controls"]  # fmt: skip


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    """The verdict by system."""
    return {claim.system: one.verdict for claim, one in judged(results)}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The results with one number changed, or a mapping taken out (None)."""
    found = deepcopy(RESULTS)
    *above, last = path.split("/")
    place = found
    for part in above:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


def test_all_seven_hold_where_every_number_says_so_in_the_order_of_the_note() -> None:
    assert [claim.system for claim in claims()] == SYSTEMS
    assert verdicts(RESULTS) == dict.fromkeys(SYSTEMS, "held")


@pytest.mark.parametrize(("system", "path", "value", "verdict"), [
    (0, "mean/finetuned", 1.81, "did not hold"),
    (1, "probes/forgetting/proxy/seed/change_nats_per_token", 0.31, "held in part"),
    (1, "probes/logit_lens/dense/seed/middle_bits_per_token", 3.9, "held in part"),
    (1, "probes/logit_lens", None, "cannot tell"),
    (1, "mean/dense", 2.1, "held"),  # no gap to close, yet both halves are told
    (2, "probes/forgetting/reft/seed/change_nats_per_token", 0.2, "held in part"),  # 2.0 a bit against 1.5
    (2, "probes/forgetting/reft/seed/change_nats_per_token", 0.31, "did not hold"),
    (2, "mean/reft", 2.1, "cannot tell"),
    (2, "probes/forgetting", None, "cannot tell"),
    (3, "policies/grpo/last/entropy", 0.81, "held in part"),
    (3, "probes/forgetting/dense/seed/change_nats_per_token", 0.5, "held in part"),
    (3, "probes/forgetting", None, "held in part"),  # that it collapses is then all that can be told
    (4, "tasks/sums/models/grpo-hard/accuracy", 0.6, "did not hold"),
    (5, "policies/grpo/last/stated_ece", 0.2, "held in part"),
    (5, "policies/grpo-sure/last/stated_ece", 0.5, "held in part"),
    (6, "tasks/labels/models/sft/accuracy", 0.8, "held in part"),
])  # fmt: skip
def test_each_half_of_a_claim_decides(system: int, path: str, value: Any, verdict: str) -> None:
    found = verdicts(changed(path, value))
    assert found.pop(SYSTEMS[system]) == verdict
    if value is not None and "dense" not in path:
        assert {*found.values()} == {"held"}  # and nobody else's


@pytest.mark.parametrize(("path", "silent"), [
    ("mean/dense", {0, 1, 2}), ("mean/finetuned", {0}), ("mean/proxy", {1}), ("mean/reft", {2}),
    ("policies", {3, 4, 5}), ("policies/grpo-hard", {4}), ("policies/grpo-sure", {5}), ("tasks/sums", {4}),
    ("tasks/labels", {6}), ("tasks", {4, 6}),
])  # fmt: skip
def test_a_report_is_silent_on_what_it_did_not_measure(path: str, silent: set[int]) -> None:
    assert set(SYSTEMS) - {*verdicts(changed(path, None))} == {SYSTEMS[n] for n in silent}


def test_an_ordinary_report_has_no_claims() -> None:
    plain = {"mean": {"seed": 2.0, "finetuned": 1.9}, "spent": {}, "policies": {}}
    assert judged(plain) == []
    assert section([]) == summary([]) == ""


def test_gain_forgetting_and_cost_stand_side_by_side_and_on_the_page() -> None:
    table = {row[0]: dict(zip(HEAD, row, strict=True)) for row in rows(judged(RESULTS))}
    assert table["Branch-Train-MiX"]["gain"] == "0.300 bits/byte"
    assert table["LoReFT"]["forgetting"] == "+0.050 nats/token"
    assert table["LoReFT"]["cost"] == "2G FLOPs, 5 steps"
    assert table["proxy-tuning"]["cost"] == "nothing trained"
    assert table["over-hard RL samples"]["gain"] == "50 → 20 % right"
    assert lines(judged(RESULTS))[2] == (
        "LoReFT: gain 0.100 bits/byte; forgetting +0.050 nats/token; cost 2G FLOPs, 5 steps; "
        "its claim, at this size: held"
    )
    page = summary(judged(RESULTS)) + section(judged(RESULTS))
    for claim in claims():
        assert claim.claimed in page
        assert "arXiv" in claim.source
