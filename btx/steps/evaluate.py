"""Bits per byte of every model on every domain's held-out documents, and who is routed where."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.data.heldout import LEAST
from btx.errors import RecipeError
from btx.graph.artifact import write_json
from btx.graph.step import Step, Tell
from btx.recipe.settings import EvaluateSettings
from btx.steps.branch import require_positions
from btx.steps.dense import Dense
from btx.steps.finetune import Finetune
from btx.steps.merge import SEED, Average
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    from btx.data.packed import Tokens

FEW = 10  # documents: fewer, drawn again and again, say little of how far other documents might lie


class Evaluate(Step):
    """A report folder: results.json, and documents.json with every document's score."""

    kind: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3
    average: Average
    finetune: Finetune
    dense: Dense | None = None
    tokens: dict[str, TokensStep]
    own: dict[str, dict[str, TokensStep]] = Field(default_factory=dict)  # by model, where its tokenizer is another
    length: int
    settings: EvaluateSettings

    @property
    def models(self) -> dict[str, Step]:
        """Every model that is measured, by the name that results.json gives it."""
        experts = {f"expert:{n}": s for n, s in self.average.experts.items()}
        merge = self.finetune.merge
        return {
            SEED: self.average.branch.seed,
            **experts,
            "average": self.average,
            "merged": merge,
            "finetuned": self.finetune,
            **({"dense": self.dense} if self.dense else {}),
        }

    def check(self, asked: int) -> None:
        """Whether the seed has as many positions as a sequence."""
        section = "evaluate" if self.settings.sequence_length else "train"
        require_positions(self.average.branch.seed, f"{section}.sequence_length", self.length)

    def run(self, out: Path, work: Path, tell: Tell) -> dict[str, Any]:
        """Measure and write."""
        from btx.data.packed import Tokens

        folders = {n: Tokens(t.folder) for n, t in self.tokens.items()}
        documents = {n: t.valid(self.settings.tokens, self.settings.split) for n, t in folders.items()}
        sources = {n: t.sources(len(documents[n]), self.settings.split) for n, t in folders.items()}
        for name, found in sources.items():
            self._require_enough(name, len(set(found)), tell)
        scores: dict[str, Any] = {}
        routing: dict[str, Any] = {}
        measured: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
        for done, (name, step) in enumerate(self.models.items()):
            tell({"label": self.label, "done": done, "total": len(self.models), "note": f"scores {name}"})
            own = {d: self._same(Tokens(t.folder), documents[d], d, name) for d, t in self.own.get(name, {}).items()}
            routed = step.kind in ("merge", "finetune")
            known = (step.digest, routed, bool(own) and name)  # the same bytes give the same scores
            if known not in measured:
                measured[known] = self._measure(step.folder, own or documents, routed=routed)
            scores[name], routing[name] = measured[known]
        tell({"label": self.label, "done": len(self.models), "total": len(self.models)})
        results = summarise(scores, documents, sources, self.settings)
        results["routing"] = {n: r for n, r in routing.items() if r}
        results["experts"] = self._experts()
        write_json(out / "results.json", results)
        write_json(
            out / "documents.json", {m: {d: list(map(float, v)) for d, v in row.items()} for m, row in scores.items()}
        )
        return {"mean": results["mean"]}

    def _require_enough(self, domain: str, count: int, tell: Tell) -> None:
        """RecipeError for a domain without a held-out document, a warning for one with few."""
        if not count:
            raise RecipeError(
                f"domain {domain} has no held-out document to evaluate on ({self.settings.split}). Name `valid:` files "
                "with several documents, or give it more data."
            )
        if count < LEAST:
            tell({
                "label": self.label,
                "warning": f"{domain}: intervals over {count} held-out source documents are too narrow, {LEAST} or "
                "more are better. Raise evaluate.tokens, lower data.valid_bytes, or give the domain more documents",
            })  # fmt: skip

    def _same(self, tokens: Tokens, documents: list[Any], domain: str, model: str) -> list[Any]:
        """The same documents in another tokenizer; RecipeError when they are not the same."""
        found = tokens.valid_documents(len(documents), self.settings.split)
        if [size for _, size in found] != [size for _, size in documents]:
            raise RecipeError(
                f"domain {domain}: a held-out document is a single token in the tokenizer of {model} or of the seed, "
                "so it cannot be scored in both. Leave documents of one word out."
            )
        return found

    def _experts(self) -> list[str]:
        import json

        names: list[str] = json.loads((self.finetune.folder / "experts.json").read_text(encoding="utf-8"))["experts"]
        return names

    def _measure(
        self, folder: Path, documents: dict[str, Any], *, routed: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nats of each document by domain, and for a Mixture of Experts its routing by domain, found on the way."""
        import torch

        from btx.models import model
        from btx.moe.hooks import Routed
        from btx.probes.bits_per_byte import nats
        from btx.probes.routing_shares import RoutingShares

        model.set_threads(self.where)
        device = model.device_of(self.where)
        per_token = (self.finetune.settings.experts_per_token or len(self._experts())) if routed else None
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        net = model.load(folder, where=self.where, dtype=dtype, experts_per_token=per_token).to(device).eval()
        score = partial(nats, net, length=self.length, batch_tokens=self.settings.batch_tokens)
        if not routed:
            return {d: score(rows) for d, rows in documents.items()}, {}
        rule = self.finetune.settings
        with Routed(
            net, rule.routing, net.config.num_experts_per_tok, soft_first_layer=rule.soft_first_layer
        ) as watched:
            shares = {d: RoutingShares(net, watched) for d in documents}
            scored = {d: score(rows, watch=shares[d]) for d, rows in documents.items()}
        return scored, {d: found.table() for d, found in shares.items()}


def summarise(
    scores: dict[str, Any], documents: dict[str, Any], sources: dict[str, list[int]], settings: EvaluateSettings
) -> dict[str, Any]:
    """Bits per byte by model and domain, their intervals, those of the differences from the seed, and sizes.

    A difference is taken document by document before their sources are drawn again, so its interval is narrower than
    those of its two sides: how hard the documents are falls out.
    """
    import numpy as np

    from btx.probes.bits_per_byte import bits_per_byte, interval

    sizes = {d: np.array([size for _, size in rows], dtype=float) for d, rows in documents.items()}
    table = {m: {d: bits_per_byte(v, sizes[d]) for d, v in row.items()} for m, row in scores.items()}
    drawn = {"resamples": settings.bootstrap, "seed": settings.seed}
    held_out = {
        d: {
            "documents": len(rows),
            "sources": len(set(sources[d])),
            "bytes": int(sizes[d].sum()),
            "tokens": sum(len(ids) - 1 for ids, _ in rows),
        }
        for d, rows in documents.items()
    }
    return {
        "bits_per_byte": table,
        "mean": {m: sum(row.values()) / len(row) for m, row in table.items()},
        "interval_95": {
            m: {d: interval(v, sizes[d], sources=sources[d], **drawn) for d, v in row.items()}
            for m, row in scores.items()
        },
        "difference_from_seed_95": {
            m: {d: interval(v - scores[SEED][d], sizes[d], sources=sources[d], **drawn) for d, v in row.items()}
            for m, row in scores.items()
        },
        "held_out": held_out,
        "split": settings.split,
    }
