"""One model's score on every held-out document, and for a Mixture of Experts where its tokens were routed.

A report is made of these, one a model, so a further model is scored alone and a further report scores nothing.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.errors import RecipeError
from btx.graph.artifact import fingerprint, is_published, read_manifest, write_json
from btx.graph.step import Step, Tell
from btx.recipe.settings import MeasureSettings, RoutingRule
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    import torch

    from btx.data.packed import Tokens

SCORES, ROUTING = "scores.json", "routing.json"


class Measure(Step):
    """A report folder: scores.json (by domain, the nats of each document) and, for a mixture, routing.json."""

    kind: ClassVar[str] = "measure"
    model: Step
    tokens: dict[str, TokensStep]  # by domain, in the seed's tokenizer: which documents are scored
    own: dict[str, TokensStep] = Field(default_factory=dict)  # the same documents in the model's, where it is another
    length: int
    settings: MeasureSettings
    rule: RoutingRule | None = None  # of a Mixture of Experts

    def run(self, out: Path, work: Path, tell: Tell) -> dict[str, Any]:
        """Score, unless the same bytes were scored already; write."""
        about = fingerprint([
            self.model.digest, {name: step.digest for name, step in (self.own or self.tokens).items()},
            {name: step.digest for name, step in self.tokens.items()}, self.length, self.settings.identity(),
            self.rule.identity() if self.rule else None,
        ])  # fmt: skip
        twin = self._scored(about)
        if twin:
            tell({"label": self.label, "note": f"the same model as that of {twin.name}"})
            for file in (SCORES, ROUTING):
                if (twin / file).is_file():
                    shutil.copyfile(twin / file, out / file)
            return {"scored": about}
        documents = self.documents()
        tell({"label": self.label, "note": f"scores {sum(map(len, documents.values()))} documents"})
        scores, routing = self._measure(self.model.folder, documents)
        write_json(out / SCORES, {domain: list(map(float, nats)) for domain, nats in scores.items()})
        if routing:
            write_json(out / ROUTING, routing)
        return {"scored": about}

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scores as arrays of nats by domain, and the routing by domain."""
        import numpy as np

        scores = json.loads((self.folder / SCORES).read_text(encoding="utf-8"))
        file = self.folder / ROUTING
        routing = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {domain: np.array(nats) for domain, nats in scores.items()}, routing

    def documents(self) -> dict[str, list[Any]]:
        """What is scored, by domain: ids and bytes of each document; RecipeError for a domain that has none."""
        from btx.data.packed import Tokens

        found = {name: Tokens(step.folder).valid(self.settings.tokens, self.settings.split)
                 for name, step in self.tokens.items()}  # fmt: skip
        for domain, rows in found.items():
            if not rows:
                raise RecipeError(
                    f"domain {domain} has no held-out document to evaluate on ({self.settings.split}). Name `valid:` "
                    "files with several documents, or give it more data."
                )
        own = {name: Tokens(step.folder) for name, step in self.own.items()}
        return {name: self._same(own[name], rows, name) if name in own else rows for name, rows in found.items()}

    def _same(self, tokens: Tokens, documents: list[Any], domain: str) -> list[Any]:
        """The same documents in another tokenizer; RecipeError when they are not the same."""
        found = tokens.valid_documents(len(documents), self.settings.split)
        if [size for _, size in found] != [size for _, size in documents]:
            raise RecipeError(
                f"domain {domain}: a held-out document is a single token in the tokenizer of {self.name} or of the "
                "seed, so it cannot be scored in both. Leave documents of one word out."
            )
        return found

    def _scored(self, about: str) -> Path | None:
        """A folder that holds the scores of the same bytes on the same documents."""
        for folder in sorted((self.root / "steps").glob(f"{self.kind}-*")):
            if is_published(folder) and read_manifest(folder)["facts"].get("scored") == about:
                return folder
        return None

    def _measure(self, folder: Path, documents: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nats of each document by domain, and for a Mixture of Experts its routing by domain, found on the way."""
        from btx.models import model
        from btx.moe.hooks import Routed
        from btx.probes.bits_per_byte import nats
        from btx.probes.routing_shares import RoutingShares

        model.set_threads(self.where)
        per_token = (self.rule.experts_per_token or len(experts_of(folder))) if self.rule else None
        net = model.load(folder, where=self.where, dtype=self._dtype(), experts_per_token=per_token)
        net = net.to(model.device_of(self.where)).eval()
        score = partial(nats, net, length=self.length, batch_tokens=self.settings.batch_tokens)
        if self.rule is None:
            return {d: score(rows) for d, rows in documents.items()}, {}
        with Routed(
            net, self.rule.routing, net.config.num_experts_per_tok, soft_first_layer=self.rule.soft_first_layer
        ) as watched:
            shares = {d: RoutingShares(net, watched) for d in documents}
            scored = {d: score(rows, watch=shares[d]) for d, rows in documents.items()}
        return scored, {d: found.table() for d, found in shares.items()}

    def _dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32


def experts_of(folder: Path) -> list[str]:
    """The names of the experts of a merged or finetuned model."""
    names: list[str] = json.loads((folder / "experts.json").read_text(encoding="utf-8"))["experts"]
    return names
