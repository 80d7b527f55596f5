"""Binary and calibrated rewards: what they do to the confidence that a policy states."""

from __future__ import annotations

from btx.claims.contract import Claim, Finding, Results, forgotten, nats, points, verdict

ERROR = "stated_ece"


def judge(results: Results) -> Finding | None:
    """Held if the calibration error rose under the binary reward and the calibrated one ended below that."""
    policies = results.get("policies", {})
    free = {name: one for name, one in policies.items() if not one["kl"]}
    name = next((name for name, one in free.items() if one["reward"] == "calibrated" and _stated(one)), None)
    other = next((one for key, one in free.items() if one["reward"] == "binary" and key == "grpo"), None)
    if name is None or other is None or not _stated(other):
        return None
    own, last, first = free[name]["last"], other["last"], other["first"]
    measured = (
        f"Expected calibration error of the stated confidence: {first[ERROR]:.2f} before, {last[ERROR]:.2f} after the "
        f"binary reward (at {last['accuracy']:.0%} right), {own[ERROR]:.2f} after the calibrated one "
        f"(at {own['accuracy']:.0%}); {own['stated']:.0%} of its answers state one."
    )
    halves = [last[ERROR] > first[ERROR], own[ERROR] < last[ERROR]]
    return Finding(
        points(free[name]["first"]["accuracy"], own["accuracy"]), nats(forgotten(results, name)),
        results["spent"][name], measured, verdict(halves),
    )  # fmt: skip


def _stated(policy: dict[str, dict[str, float]]) -> bool:
    return ERROR in policy["first"] and ERROR in policy["last"]


CLAIM = Claim(
    6,
    "calibrated rewards",
    "Binary rewards hurt calibration.",
    "arXiv 2507.16806: the binary reward degrades calibration and the calibrated one improves it at equal accuracy; "
    "not on every set.",
    judge,
)
