"""Verification of the seed and of experts trained elsewhere, on which the later stages rely."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.checkpoints.validate import read_config, sees_images
from btx.errors import ArtifactError, RecipeError
from btx.events import Emit, Warned
from btx.graph.artifact import write_json
from btx.graph.step import Step
from btx.models.family import LAYER
from btx.models.native import config_difference, idle_difference, native_config
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ModelStep

if TYPE_CHECKING:
    from btx.checkpoints.reader import Checkpoint
    from btx.models.family import Family


class VerifySeed(Step):
    """A report folder with lineage.json: the seed's digest, family, tokenizer and shapes.

    Its `tokenizer/` holds the seed's tokenizer in the form that the Mixture of Experts gets.
    """

    kind: ClassVar[str] = "branch"
    version: ClassVar[int] = 2
    seed: ModelStep

    @property
    def tokenizer(self) -> Path:
        """The folder of the Mixture of Experts' tokenizer files."""
        return self.folder / "tokenizer"

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Check the seed, write its lineage and tokenizer."""
        from btx.checkpoints.token_map import carry_beside

        lineage = self.examine()
        write_json(out / "lineage.json", lineage)
        carry_beside(self.seed.folder, out / self.tokenizer.name, lineage["becomes"])
        for warning in lineage["warnings"]:
            emit(Warned(self.label, warning))
        return {"family": lineage["family"], "becomes": lineage["becomes"]}

    def check(self, asked: int) -> None:
        """Check the seed."""
        if isinstance(self.seed, ExternalCheckpoint):  # a builtin seed does not exist yet
            self.examine()

    def examine(self) -> dict[str, Any]:
        """Read the whole seed and refuse what cannot be merged; returns the lineage, writes nothing.

        It is called before anything is written and again when the step runs; the files are read once.
        """
        return self.lineage

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What `examine` found."""
        from btx.checkpoints.reader import opened, require_finite
        from btx.checkpoints.token_map import require_carried, tokenizer_digest
        from btx.models.families import family_of
        from btx.models.target import warnings_of

        folder = self.seed.folder
        with opened(folder) as seed:
            family = family_of(seed.config, str(folder))
            check_buildable(seed.config, str(folder))
            require_complete(seed)
            require_ids(seed)
            require_carried(folder, family.moe)
            require_finite(seed, "the seed")
            return {
                "digest": self.seed.digest,
                "family": seed.config["model_type"],
                "becomes": family.moe,
                "tokenizer": tokenizer_digest(folder),
                "dtype": str(seed.dtype).removeprefix("torch."),
                "tensors": {n: list(e.shape) for n, e in seed.entries.items()},
                "warnings": warnings_of(seed.config, str(folder), sees_images=sees_images(folder)),
            }


class VerifyExperts(Step):
    """A report folder with lineage.json: how each expert that was trained elsewhere descends from the seed.

    Separate from VerifySeed, so that adding an expert does not retrain the others.
    """

    kind: ClassVar[str] = "branch"
    seed: ModelStep
    given: dict[str, ModelStep]  # by name

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Check the experts, write the lineage."""
        lineage = self.examine()
        write_json(out / "lineage.json", lineage)
        for warning in (warning for about in lineage.values() for warning in about["warnings"]):
            emit(Warned(self.label, warning))
        return {"experts": list(lineage)}

    def check(self, asked: int) -> None:
        """Check the experts."""
        if isinstance(self.seed, ExternalCheckpoint):  # a builtin seed does not exist yet
            self.examine()

    def examine(self) -> dict[str, Any]:
        """Read the whole experts and refuse what cannot be merged; returns the lineage, writes nothing."""
        return self.lineage

    def distances(self) -> dict[str, dict[str, float]]:
        """Each expert's distance from the seed (`cosine`, `change`), read from the finished step."""
        lineage = json.loads((self.folder / "lineage.json").read_text(encoding="utf-8"))
        return {name: {key: about[key] for key in ("cosine", "change")} for name, about in lineage.items()}

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What `examine` found."""
        return {name: check_expert(self.seed.folder, step.folder, name) for name, step in self.given.items()}


def require_positions(seed: Step, setting: str, length: int) -> None:
    """RecipeError if `length` exceeds the seed's max_position_embeddings; `setting` names it in the message."""
    if not isinstance(seed, ExternalCheckpoint):
        return  # a builtin seed is made for this length
    most = native_config(read_config(seed.folder), str(seed.folder)).max_position_embeddings
    if length > most:
        raise RecipeError(
            f"{setting} is {length}, but the seed {seed.folder} has max_position_embeddings {most}. Lower it."
        )


def check_buildable(config: dict[str, Any], where: str) -> None:
    """Raise now, not after days of training, if the MoE class cannot hold this model."""
    from btx.models.families import mixture_family
    from btx.models.own_experts import side_by_side
    from btx.models.target import moe_config

    if mixture_family(config):
        side_by_side(deepcopy(config), where, models=2, top_k=1)
        return
    width = native_config(config, where).to_dict()["intermediate_size"]
    moe_config(deepcopy(config), experts=2, top_k=1, width=width, where=where)


def require_complete(checkpoint: Checkpoint) -> None:
    """ArtifactError unless names and shapes of the tensors match the model that the config describes."""
    from btx.checkpoints.layouts import ANEW
    from btx.checkpoints.names import EMBEDDING, HEAD
    from btx.merge.canonical import canonical
    from btx.models.families import mixture_family
    from btx.models.stored import stored_shapes

    mixture = mixture_family(checkpoint.config)
    width = mixture.width_field if mixture else "intermediate_size"
    if unstated := [f for f in ("hidden_size", width, "num_hidden_layers") if f not in checkpoint.config]:
        raise ArtifactError(
            f"{checkpoint.folder}: config.json does not state {', '.join(unstated)}. Add the model's values."
        )
    native = native_config(checkpoint.config, str(checkpoint.folder))
    stored = canonical(checkpoint) if mixture else checkpoint
    if mixture:
        _require_count(stored, mixture, native)
    wanted = stored_shapes(native, str(checkpoint.folder))
    found = {n: e.shape for n, e in stored.entries.items()}
    wrong = [
        f"{n} is {_as_text(found.get(n))}, should be {_as_text(wanted.get(n))}"
        for n in sorted(wanted.keys() | found.keys())
        if wanted.get(n) != found.get(n)
    ]
    missing = {HEAD, EMBEDDING} & wanted.keys() - found.keys()
    if len(missing) == len(wrong) == 1:
        raise ArtifactError(
            f"{checkpoint.folder}: {missing.pop()} is missing, and config.json does not tie head and embedding. Set "
            "tie_word_embeddings: true in config.json if the model was trained so, or fetch the checkpoint again."
        )
    extra = [n for n in found.keys() - wanted.keys() if not _beyond(n, native.num_hidden_layers)]
    if wrong and len(extra) == len(wrong):
        raise ArtifactError(
            f"{checkpoint.folder} holds {', '.join(sorted(extra)[:3])}, which its class does not have: "
            f"transformers would drop it. {ANEW}"
        )
    if wrong:
        raise ArtifactError(
            f"{checkpoint.folder}: weights and config.json disagree on {len(wrong)} tensors: {'; '.join(wrong[:3])}. "
            "Fetch the checkpoint again."
        )


def _require_count(stored: Checkpoint, mixture: Family, native: Any) -> None:
    """ArtifactError unless routers have a row for each expert that the config counts, which may be any number."""
    from btx.models.stored import layers_with_experts

    where = str(stored.folder)
    for layer in layers_with_experts(native, where)[:1]:
        name, count = mixture.router_name(layer), getattr(native, mixture.experts_field)
        entry = stored.entries.get(name)
        if entry is None or entry.shape[:1] != (count,):
            raise ArtifactError(
                f"{where}: weights and config.json disagree on the number of experts: {mixture.experts_field} is "
                f"{count}, and {name} is {_as_text(entry.shape if entry else None)}. Fetch the checkpoint again."
            )


def _beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer beyond the config's num_hidden_layers."""
    match = LAYER.fullmatch(name)
    return match is not None and int(match[1]) >= layers


def _as_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def require_ids(checkpoint: Checkpoint) -> None:
    """ArtifactError if the tokenizer has ids without a row in the embedding: training would fail on the first one."""
    from btx.data.packed import Encoder, load_tokenizer

    rows = native_config(checkpoint.config, str(checkpoint.folder)).vocab_size
    ids = Encoder(load_tokenizer(checkpoint.folder), "all").ids
    if ids > rows:
        raise ArtifactError(
            f"{checkpoint.folder}: the tokenizer has ids up to {ids - 1}, but the embedding {rows} rows (vocab_size). "
            "Use the tokenizer that the checkpoint was trained with, or resize the embedding."
        )


def check_expert(seed_folder: Path, folder: Path, name: str) -> dict[str, Any]:
    """Refuse an expert that does not descend from the seed; returns its tokenizer's digest and its distance."""
    from btx.checkpoints.carried import chat_template
    from btx.checkpoints.reader import opened, require_finite
    from btx.checkpoints.token_map import tokenizer_digest
    from btx.merge.canonical import canonical
    from btx.merge.lineage import LEAST_COSINE, distances, require_same
    from btx.merge.padded import same_width
    from btx.merge.vocabulary import TruncatedView, added_tokens, common_ids, require_ids_as_stated, require_rows
    from btx.models.families import family_of, mixture_family
    from btx.models.target import warnings_of

    who = f"the expert of domain {name} ({folder})"
    remedy = "Train it from this seed, or leave the domain out."
    with opened(seed_folder) as seed, opened(folder) as other:
        carried, mixture = family_of(seed.config, str(seed_folder)).carried, mixture_family(seed.config) is not None
        different = config_difference(seed.config, other.config, who, carried=carried, routing=mixture)
        if different:
            said = f"{who} does not descend from the seed ({seed_folder}): config.json differs: {'; '.join(different)}."
            raise ArtifactError(f"{said} {remedy}")
        warnings = warnings_of(other.config, who, sees_images=sees_images(folder))
        warnings += idle_difference(seed.config, other.config, who)
        if (own := chat_template(folder)) and own != chat_template(seed_folder):
            warnings.append(
                f"{who} has a chat template of its own; texts are rendered by the seed's, which the model keeps"
            )
        require_complete(other)
        models = {"seed": canonical(seed), "other": canonical(other)} if mixture else {"seed": seed, "other": other}
        added = added_tokens(seed_folder, folder, who)
        if added or seed.config.get("vocab_size") != other.config.get("vocab_size"):
            require_ids(other)
            require_ids_as_stated(folder, added, who)
            require_rows(other, common_ids(seed_folder), who)
            models = {name: TruncatedView(one, common_ids(seed_folder), 0) for name, one in models.items()}
        wide = same_width(models)
        require_same(wide["seed"], wide["other"], who)
        require_finite(other, f"the expert of domain {name}")
        far = distances(wide["seed"], {name: wide["other"]})[name]
    if far["cosine"] < LEAST_COSINE:
        raise ArtifactError(
            f"{who} does not descend from the seed ({seed_folder}): the cosine between their weights is "
            f"{far['cosine']:.3f}, and descendants have more than {LEAST_COSINE}. {remedy}"
        )
    about: dict[str, Any] = {"tokenizer": tokenizer_digest(folder), **{k: round(v, 6) for k, v in far.items()}}
    about["warnings"] = warnings
    return {**about, "added_tokens": [token["content"] for token in added]} if added else about
