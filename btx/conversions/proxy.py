"""Proxy-tuning (arXiv 2401.08565): a model that stays as it is, steered by what tuning changed in others.

The scores of the next token are base + Σ α (expert − antiexpert), sums of logits; since they are normalised afterwards,
log-probabilities give the same. In the paper the base is a large model, and expert and antiexpert are a small one with
and without tuning. With the seed as base and antiexpert it is seed + Σ α (expert − seed), which needs no router.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.conversions.contract import EXPERT, Conversion
from btx.conversions.experts import Experts, plan, spend
from btx.conversions.sources import Model, Sources, Start
from btx.errors import ArtifactError, RecipeError
from btx.events import Emit
from btx.recipe.fields import Factor, Text
from btx.recipe.recipe import Recipe, Section
from btx.recipe.settings import Settings
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ComposedStep, ModelStep

if TYPE_CHECKING:
    from torch import Tensor

BASE, ANTIEXPERT = "base", "antiexpert"


class ProxySettings(Section):
    """Proxy-tuning: a base steered in logit space by the experts against an antiexpert; nothing is trained for it."""

    base: Text | None = Field(None, description="folder of the checkpoint that is steered; default: the seed")
    antiexpert: Text | None = Field(
        None, description="folder of what the experts are set against; default: the seed, from which they were trained"
    )
    weights: dict[str, Factor] = Field(
        default_factory=dict, description="α of each expert, those not named being left out; default: 1 for every one"
    )

    def fits(self, recipe: Recipe, name: str) -> None:
        """Weights of experts that there are."""
        recipe.require_experts(f"{name}.weights", self.weights)


class ProxyRule(Settings):
    """What the combination depends on."""

    weights: dict[str, Factor]  # α by expert


class Proxy(ComposedStep):
    """Names the base, the experts and, unless it is the base, the antiexpert."""

    kind: ClassVar[str] = "proxy"
    settings: ProxyRule
    seed: ModelStep

    def check(self, asked: int) -> None:
        """ArtifactError for a base or an antiexpert that makes no model, or has other tokens than the seed."""
        from btx.checkpoints.reader import opened
        from btx.steps.branch import require_complete, require_ids

        for part in self._elsewhere().values():
            with opened(part.folder) as checkpoint:
                require_complete(checkpoint)
                require_ids(checkpoint)
        if isinstance(self.seed, ExternalCheckpoint):  # a builtin seed does not exist yet
            self._require_tokens()

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Write the file."""
        self._require_tokens()
        return super().run(out, work, emit)

    def _elsewhere(self) -> dict[str, ModelStep]:
        return {n: part for n, part in self.parts.items() if n in (BASE, ANTIEXPERT) and part.key != self.seed.key}

    def _require_tokens(self) -> None:
        from btx.merge.vocabulary import added_tokens

        for name, part in self._elsewhere().items():
            who = f"proxy.{name} ({part.folder})"
            if added := added_tokens(self.seed.folder, part.folder, who):
                raise ArtifactError(
                    f"{who} has tokens that the seed ({self.seed.folder}) lacks, such as "
                    f"{added[0]['content']!r}, so their distributions cannot be combined. Use models of one tokenizer."
                )

    @staticmethod
    def combine(state: ProxyRule, log_probs: dict[str, Tensor], _ids_BS: Tensor) -> Tensor:
        """base + Σ α (expert − antiexpert)."""
        scores, anti = log_probs[BASE].clone(), log_probs.get(ANTIEXPERT, log_probs[BASE])
        for name, weight in state.weights.items():
            scores += weight * (log_probs[EXPERT + name] - anti)
        return scores


def build(sources: Sources, start: Start, experts: Experts, settings: ProxySettings) -> dict[str, Model]:
    """The steered base."""
    if experts.vocabulary:
        raise RecipeError("proxy: experts with tokens of their own give distributions over other ids. Leave proxy out.")

    def model(name: str, path: str | None) -> ModelStep:
        return sources.given(f"proxy:{name}", path, f"proxy.{name}") if path else start.seed

    base, anti = model(BASE, settings.base), model(ANTIEXPERT, settings.antiexpert)
    weights = settings.weights or dict.fromkeys(experts.steps, 1.0)
    parts = {BASE: base, **{EXPERT + name: experts.steps[name] for name in weights}}
    if anti.key != base.key:
        parts[ANTIEXPERT] = anti
    rule = ProxyRule(weights=weights)
    return {"proxy": Model(sources.add(Proxy(parts=parts, settings=rule, seed=start.seed, **sources.place())))}


CONVERSION = Conversion(
    build, models=("proxy",), section=ProxySettings, plan=plan, rates=("train.learning_rate",), spend=spend
)
