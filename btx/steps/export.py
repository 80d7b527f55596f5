"""The result as a plain Hugging Face folder, with model card, digests and proof (golden logits)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.errors import RecipeError
from btx.events import Emit
from btx.graph.artifact import read_manifest, write_json
from btx.graph.step import Step
from btx.recipe.settings import ExportSettings
from btx.steps.evaluate import Evaluate
from btx.steps.finetune import Finetune
from btx.steps.given import ExternalCheckpoint
from btx.steps.measure import experts_of
from btx.steps.model import ModelStep

if TYPE_CHECKING:
    from btx.export.card import About


class Export(Step):
    """A checkpoint folder for others: published (or fused) names, tokenizer, card, SHA256SUMS, proof."""

    kind: ClassVar[str] = "export"
    version: ClassVar[int] = 4
    model: Finetune
    evaluate: Evaluate | None  # its figures go to the model card; optional
    settings: ExportSettings
    title: str
    base_model: str

    def check(self, asked: int) -> None:
        """RecipeError if no stock class can hold the finetuned model."""
        if self.model.settings.soft_first_layer:
            raise RecipeError(
                "finetune.soft_first_layer: no stock class routes to all experts in one layer and to one expert in the "
                "others, so the export would differ from the model that was measured. Leave it out, or stop before "
                "the export: --until evaluate."
            )

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Write the model with its proof, the model card and the digests."""
        from btx.export.card import card
        from btx.export.proof import write_sums

        tensors = write_model(self.model.folder, out, self.settings)
        write_json(out / "experts.json", {"experts": experts_of(self.model.folder)})
        (out / "README.md").write_text(card(self._about(), out), encoding="utf-8")
        write_sums(out)
        return {"tensors": tensors}

    def _about(self) -> About:
        """What the card says of the model."""
        from btx.export.card import About

        finetune, merge = self.model, self.model.merge
        results = None
        if self.evaluate:
            results = json.loads((self.evaluate.folder / "results.json").read_text(encoding="utf-8"))
            results["exported"] = self.evaluate.name_of(finetune)
        facts = {name: read_manifest(tokens.folder)["facts"] for name, tokens in finetune.tokens.items()}
        return About(
            title=self.title, base_model=self.base_model, license=self.settings.license, layout=self.settings.layout,
            attention=merge.settings.attention, experts=experts_of(finetune.folder),
            parents=[(name, _made_by(model), model.digest) for name, model in merge.models.items()],
            data=[(name, about["train_tokens"], about["valid_documents"]) for name, about in facts.items()],
            recipe={"merge": merge.settings.identity(), "finetune": finetune.settings.identity()}, results=results,
        )  # fmt: skip


def _made_by(model: ModelStep) -> str:
    """What made a model: a step's kind, and of what was fetched from the hub its repository and commit."""
    origin = model.origin if isinstance(model, ExternalCheckpoint) else None
    return f"{model.kind}, {origin}" if origin else model.kind


def write_model(source: Path, out: Path, settings: ExportSettings) -> int:
    """Write a Mixture of Experts portably: weights, config, tokenizer, proof; returns the number of tensors."""
    from btx.checkpoints.reader import carry_files, opened
    from btx.checkpoints.writer import write_weights
    from btx.export.portable import portable_config, rows
    from btx.export.proof import PROOF, make_proof

    with opened(source) as model:
        tensors = rows(model, settings.layout)
        write_weights(out, tensors, shard_bytes=settings.shard_bytes)
        config = portable_config(model.config)
    write_json(out / "config.json", config)
    carry_files(source, out)
    if not (out / "generation_config.json").is_file():
        write_json(out / "generation_config.json", _generation(config))
    write_json(out / PROOF, make_proof(out))
    return len(tensors)


def _generation(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True, **{k: config[k] for k in keys if config.get(k) is not None}}
