"""LoReFT: whether what leaves the weights alone loses less, for what it gains."""

from __future__ import annotations

from btx.claims.contract import Claim, Finding, Results, bits, forgotten, gained, nats, verdict

REFT, DIRECT = "reft", "dense"


def judge(results: Results) -> Finding | None:
    """Held if it forgot less than direct finetuning, and less for each bit that it gained."""
    own, direct = gained(results, REFT), gained(results, DIRECT)
    if own is None or direct is None:
        return None
    lost, other = forgotten(results, REFT), forgotten(results, DIRECT)
    found = bits(own), nats(lost), results["spent"][REFT]
    measured = f"It gained {bits(own)}, direct finetuning {bits(direct)}."
    if lost is None or other is None or min(own, direct) <= 0:
        return Finding(*found, measured, "cannot tell")
    measured += (
        f" On the seed's own text it lost {nats(lost)}, direct finetuning {nats(other)}: for each bit gained "
        f"{lost / own:+.2f} nats against {other / direct:+.2f}."
    )
    halves = [lost < other, lost / own < other / direct]
    return Finding(*found, measured, verdict(halves))


CLAIM = Claim(
    3,
    "LoReFT",
    "What leaves the weights alone loses less.",
    "arXiv 2404.03592: better than LoRA on commonsense, not on arithmetic (42.6 against 46.9). That less invasive "
    "means less lost is contested: arXiv 2509.04259 has the KL divergence from the seed on the new task "
    "predict forgetting.",
    judge,
)
