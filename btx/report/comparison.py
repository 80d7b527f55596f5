"""From the runs of a comparison to its verdicts: who is ahead of the control, what the conversion cost, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from btx.recipe.compare_settings import MEAN
from btx.report.verdict import equivalent, paired

Run = dict[str, Any]
FEW = 10  # held-out documents below which a domain's scores are called what they are
UNEVEN = 0.05  # share of its tokens by which an arm may miss its budget unsaid


def mean(bits: Mapping[str, float]) -> float:
    """Over the domains, each counted once."""
    return math.fsum(bits.values()) / len(bits)


def judged(results: Mapping[str, Any]) -> dict[str, Any]:
    """Verdicts against the control, the tax against scratch, the decomposition, and the answer in a sentence.

    Each is a list with an entry per budget and arm. Differences are paired by block.
    """
    runs: list[Run] = results["runs"]
    found: dict[str, Any] = {"verdicts": [], "tax": [], "decomposition": []}
    for budget in sorted({run["budget"] for run in runs}):
        here = {run["arm"]: _of(runs, run["arm"], budget) for run in runs if run["budget"] == budget}
        control, scratch = here[results["control"]], here.get(results["scratch"], [])
        for arm, own in here.items():
            told = {"budget": budget, "arm": arm}
            if arm != results["control"]:
                found["verdicts"].append({**told, **_against(own, control)})
            if scratch and arm != results["scratch"]:
                tax = _against(own, scratch)
                found["tax"].append({**told, **tax, "equivalent": _equivalents(own, runs, results)})
            if own[0]["stages"]:
                found["decomposition"].append({**told, "terms": _terms(own, results["seeds"])})
    found["answer"] = answer(found["verdicts"], found["tax"], results)
    found["notes"] = [*uneven(runs, results["budgets"]), *few(results["documents"])]
    return found


def uneven(runs: Sequence[Run], budgets: Sequence[str]) -> list[str]:
    """A sentence for each arm whose trainings, each a whole number of steps, miss its budget by over a twentieth."""
    missed = {
        (run["arm"], run["budget"]): run["cost"]["tokens"] / run["tokens"] - 1
        for run in runs if abs(run["cost"]["tokens"] / run["tokens"] - 1) > UNEVEN
    }  # fmt: skip
    return [
        f"{arm} took {abs(share):.0%} {'more' if share > 0 else 'fewer'} tokens than it was given at "
        f"{budgets[budget]}, as each of its trainings is a whole number of steps."
        for (arm, budget), share in missed.items()
    ]


def few(documents: Mapping[str, int]) -> list[str]:
    """A sentence for each domain that is scored on so few documents that the next ones might say otherwise."""
    return [
        f"{domain} is scored on {count} document{'s' * (count > 1)}, so its numbers say little about other text."
        for domain, count in documents.items() if count < FEW
    ]  # fmt: skip


def _of(runs: Iterable[Run], arm: str, budget: int) -> list[Run]:
    return sorted((run for run in runs if (run["arm"], run["budget"]) == (arm, budget)), key=lambda run: run["block"])


def _against(own: Sequence[Run], other: Sequence[Run]) -> dict[str, Any]:
    """Verdicts by domain and over their mean."""
    domains = list(own[0]["bits_per_byte"])
    pairs = [(a["bits_per_byte"], b["bits_per_byte"]) for a, b in zip(own, other, strict=True)]
    found = {d: paired([a[d] for a, _ in pairs], [b[d] for _, b in pairs]).written() for d in domains}
    return {MEAN: paired([mean(a) for a, _ in pairs], [mean(b) for _, b in pairs]).written(), "domains": found}


def _equivalents(own: Sequence[Run], runs: Sequence[Run], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By block: the FLOPs at which training from scratch reaches this loss, over those of the conversion and its seed.

    The curve is that of all runs from scratch on the block, whatever their budget; beyond it there is a bound alone.
    """
    found = []
    for run in own:
        curve = [
            (other["cost"]["flops"], mean(other["bits_per_byte"]))
            for other in runs if other["conversion"] == "scratch" and other["block"] == run["block"]
        ]  # fmt: skip
        before = results["seeds"][str(run["block"])]["flops"]
        sign, flops = equivalent(curve, mean(run["bits_per_byte"]))
        whole = run["cost"]["flops"] + (before or 0)
        found.append({
            "block": run["block"], "sign": sign, "flops": flops, "of_conversion": flops / run["cost"]["flops"],
            "of_total": flops / whole if before else None,
        })  # fmt: skip
    return found


def _terms(own: Sequence[Run], seeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How a merged model came from its seed, in means over blocks and domains; the terms sum to the total.

    On each domain the best expert counts, as a rule its own. Then what averaging, the router and the finetuning change.
    """
    rows = []
    for run in own:
        seed, stages = seeds[str(run["block"])]["bits_per_byte"], run["stages"]
        at_home = {d: min(bits[d] for name, bits in stages.items() if name.startswith("expert:")) for d in seed}
        chain = {"seed": seed, "best expert of each domain": at_home}
        chain |= {name: bits for name, bits in stages.items() if not name.startswith("expert:")}
        chain["final"] = run["bits_per_byte"]
        rows.append({name: mean(bits) for name, bits in chain.items()})
    names = list(rows[0])
    levels = [math.fsum(row[name] for row in rows) / len(rows) for name in names]
    return [
        {"from": before, "to": after, "change": high - low}
        for before, after, low, high in zip(names, names[1:], levels, levels[1:], strict=False)
        if not (after == "final" and high == low)
    ]


def answer(verdicts: Sequence[dict[str, Any]], taxes: Sequence[dict[str, Any]], results: Mapping[str, Any]) -> str:
    """The answer at the largest budget: who is ahead of the control and who behind, then each with its interval."""
    largest, control = max(run["budget"] for run in results["runs"]), results["control"]
    here = [one for one in verdicts if one["budget"] == largest]
    groups = {
        f"{{}} ahead of {control}": _arms(here, "better"),
        f"{{}} behind {control}": _arms(here, "worse"),
        f"{{}} not told from {control}": _arms(here, "cannot tell"),
    }
    told = [
        text.format(f"{', '.join(arms)} {'is' if len(arms) == 1 else 'are'}") for text, arms in groups.items() if arms
    ]
    told += [] if told else ["there is one block, so no verdict" if here else "there is no other arm left"]
    told += [f"{one['arm']} diverged {one['where']}" for one in results["lost"] if one["budget"] == largest]
    first = f"At {results['budgets'][largest]} after the seed, {'; '.join(told)}."
    each = "; ".join(f"{one['arm']} {said(one[MEAN])}" for one in here)
    level = "" if any(one[MEAN]["low"] is None for one in here) else ", 95 %"
    each = f" Mean bits per byte less those of {control}{level}: {each}." if here else ""
    taxed = [one for one in taxes if one["budget"] == largest and one["arm"] == control]
    tax = f" The tax of {control}, less {results['scratch']}: {said(taxed[0][MEAN])}." if taxed else ""
    return f"{first}{each}{tax}"


def _arms(verdicts: Iterable[dict[str, Any]], word: str) -> list[str]:
    return [one["arm"] for one in verdicts if one[MEAN]["word"] == word]


def said(verdict: Mapping[str, Any]) -> str:
    """A difference with its interval, and with what would have been seen where nothing was."""
    text = f"{verdict['difference']:+.3f}"
    if verdict["low"] is None:
        return f"{text} (one block, no interval)"
    unseen = f"; {verdict['detectable']:.3f} would have been seen" if verdict["word"] == "cannot tell" else ""
    return f"{text} ({verdict['low']:+.3f} to {verdict['high']:+.3f}{unseen})"
