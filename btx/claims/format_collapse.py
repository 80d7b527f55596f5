"""Reinforcement learning: whether one form of answer drives out the others, and whether it forgets most."""

from __future__ import annotations

from btx.claims.contract import Claim, Finding, Results, forgotten, nats, points, verdict

POLICY = "grpo"
OTHERS = ("dense", "sft", "finetuned")


def judge(results: Results) -> Finding | None:
    """Held if the entropy of formats fell and no other conversion lost more on the seed's own text."""
    policy = results.get("policies", {}).get(POLICY)
    if policy is None:
        return None
    first, last = policy["first"], policy["last"]
    form = max((name for name in last if name.startswith("share_")), key=lambda name: last[name])
    measured = (
        f"Entropy of the forms of answers {first['entropy']:.2f} → {last['entropy']:.2f} (1: all alike), the share of "
        f"{form.removeprefix('share_')} {first[form]:.2f} → {last[form]:.2f}."
    )
    held = next((one for one in results["policies"].values() if one["kl"] and one["reward"] == policy["reward"]), None)
    if held:
        measured += f" With a KL weight of {held['kl']:g} the entropy ends at {held['last']['entropy']:.2f}."
    own = forgotten(results, POLICY)
    other = {name: lost for name in OTHERS if (lost := forgotten(results, name)) is not None}
    most = own is not None and bool(other) and own > max(other.values())
    if own is not None and other:
        measured += (
            f" On the seed's own text it lost {nats(own)}, {', '.join(f'{n} {nats(v)}' for n, v in other.items())}."
        )
    else:
        measured += " Whether it loses most was not measured."
    halves = [last["entropy"] < first["entropy"], most]
    return Finding(
        points(first["accuracy"], last["accuracy"]), nats(own), results["spent"][POLICY], measured, verdict(halves)
    )


CLAIM = Claim(
    4,
    "RL's format collapse",
    "Reinforcement loses most, and collapses formats.",
    "arXiv 2504.07912: one format of pretraining comes to dominate. That RL loses most is contested: arXiv 2509.04259 "
    "has it forget less than finetuning at equal new accuracy.",
    judge,
)
