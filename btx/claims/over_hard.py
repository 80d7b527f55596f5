"""Reinforcement on items beyond the policy: whether it spoils what the policy could do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btx.claims.contract import Claim, Finding, Results, forgotten, nats, points

HARD, ABLE = 0.2, 0.3  # accuracy at the start: at most, of items that are over-hard; at least, of others


def judge(results: Results) -> Finding | None:
    """Held if accuracy on a task that the seed can do falls after a run on over-hard items alone."""
    policies = results.get("policies", {})
    hard = [name for name, one in policies.items() if one["first"]["accuracy"] <= HARD]
    able = [name for name, one in policies.items() if one["first"]["accuracy"] >= ABLE]
    task = _able(results, [*hard, *able])
    if not hard or not able or task is None:
        return None
    before = task["seed"]["accuracy"]
    after = {name: task[name]["accuracy"] for name in policies}
    name = hard[0]
    told = (f"{one} ({policies[one]['first']['accuracy']:.0%}) {after[one]:.0%}" for one in policies)
    measured = (
        f"The seed has {before:.0%} of the task right. After reinforcement, in brackets how much the seed has right of "
        f"the items trained on: {', '.join(told)}."
    )
    return Finding(
        points(before, after[name]), nats(forgotten(results, name)), results["spent"][name], measured,
        "held" if after[name] < before else "did not hold",
    )  # fmt: skip


def _able(results: Results, names: list[str]) -> Mapping[str, Any] | None:
    """The models of the first task, without label spaces, that the seed has right often enough."""
    for task in results.get("tasks", {}).values():
        models: Mapping[str, Any] = task["models"]
        if {*names} <= {*models} and "compliance" not in models["seed"] and models["seed"]["accuracy"] >= ABLE:
            return models
    return None


CLAIM = Claim(
    5,
    "over-hard RL samples",
    "Over-hard samples contaminate.",
    "arXiv 2605.28388 sorts items by the pass rate of the policy as it is; the bands drift with the policy.",
    judge,
)
