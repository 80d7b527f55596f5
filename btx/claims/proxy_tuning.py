"""Proxy-tuning against direct finetuning: the gap it closes, and what happens to knowledge in lower layers."""

from __future__ import annotations

from btx.claims.contract import Claim, Finding, Results, bits, forgotten, gained, middle, nats, verdict

PROXY, DIRECT = "proxy", "dense"


def judge(results: Results) -> Finding | None:
    """Held if direct finetuning lost in its middle layer on the seed's own text, and proxy-tuning forgot less."""
    own, direct = gained(results, PROXY), gained(results, DIRECT)
    if own is None or direct is None:
        return None
    lost, other = forgotten(results, PROXY), forgotten(results, DIRECT)
    before, after = middle(results, "seed"), middle(results, DIRECT)
    closed = (
        f"{own / direct:.0%} of what direct finetuning gained ({bits(direct)})" if direct > 0 else "no gap to close"
    )
    measured = f"It gained {bits(own)}, {closed}."
    if lost is None or other is None or before is None or after is None:
        return Finding(bits(own), nats(lost), results["spent"][PROXY], measured, "cannot tell")
    measured += (
        f" On the seed's own text it lost {nats(lost)}, direct finetuning {nats(other)}, whose middle layer "
        f"predicts it with {after:.2f} bits a token, where the seed's has {before:.2f}."
    )
    halves = [after > before, lost < other]
    return Finding(bits(own), nats(lost), results["spent"][PROXY], measured, verdict(halves))


CLAIM = Claim(
    2,
    "proxy-tuning",
    "Direct finetuning corrupts knowledge in lower layers; steering by logits keeps it and closes the gap.",
    "arXiv 2401.08565: 88 to 91 % of the gap to direct tuning closed, an average; 57 % on GSM8K at 70B.",
    judge,
)
