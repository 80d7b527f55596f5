"""The settings of the merge: what a recipe may say under `merge`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from btx.recipe.fields import Count, Positive, Several, Share, Weight, Whole
from btx.recipe.settings import Settings, torch_dtype

if TYPE_CHECKING:
    import torch

Method = Literal["mean", "linear", "task_arithmetic", "ties", "dare_ties", "slerp", "model_stock"]
Group = Literal["attention", "norms", "embeddings", "head"]
Router = Literal["auto", "random", "orthogonal", "activations", "embeddings", "arrow", "own"]
ATTENTION = "ffn+attention"
SharedExperts = Annotated[list[Literal["average", "seed"]], Field(min_length=1, max_length=8)]
RANDOM_ENTROPY = 0.99
ROUTER_TOKENS = (4_000, 20_000)
FROM_DATA = ("activations", "embeddings", "arrow")
GROUPS: tuple[str, ...] = get_args(Group)
WEIGHED = ("linear", "task_arithmetic", "ties", "dare_ties")  # methods that use model weights
FROM_SEED = ("task_arithmetic", "ties", "dare_ties", "model_stock")  # methods that add up differences from the seed
OPTIONS = {"density": ("ties", "dare_ties"), "t": ("slerp",), "scale": ("task_arithmetic", "ties", "dare_ties")}

LayerWeights = Weight | Annotated[list[Weight], Field(min_length=1)]


class AveragingSettings(Settings):
    """How tensors of several models become one. All methods but `mean` are mergekit's."""

    method: Method = "mean"
    weights: dict[str, LayerWeights] = Field(
        default_factory=dict,
        description="by model, default 1; a list is interpolated linearly from the first layer to the last; tensors "
        "outside the layers take its first value (as in mergekit)",
    )
    density: Annotated[Share, Field(gt=0)] = Field(
        0.5, description="ties, dare_ties: share of each difference that is kept"
    )
    t: Share = Field(0.5, description="slerp: interpolation factor, 0 the first model, 1 the second")
    scale: Positive = Field(1.0, description="task_arithmetic, ties, dare_ties: factor of the summed differences")

    @model_validator(mode="after")
    def _weighed(self) -> AveragingSettings:
        if self.weights and self.method not in WEIGHED:
            raise ValueError(f"weights have no effect under method {self.method}; use {', '.join(WEIGHED)}")
        for name, methods in OPTIONS.items():
            if name in self.model_fields_set and self.method not in methods:
                raise ValueError(f"{name} has no effect under method {self.method}; it belongs to {', '.join(methods)}")
        if "seed" in self.weights and self.method != "linear":
            raise ValueError(f"{self.method} takes differences from the seed, so a weight of the seed has no effect")
        return self

    def weight(self, model: str, depth: float) -> float:
        """A model's weight at a depth from 0, the first layer, to 1, the last."""
        found = self.weights.get(model, 1.0)
        if not isinstance(found, list):
            return found
        place = depth * (len(found) - 1)
        low = min(int(place), len(found) - 2) if len(found) > 1 else 0
        high = min(low + 1, len(found) - 1)
        return found[low] + (place - low) * (found[high] - found[low])

    def counts(self, models: list[str]) -> bool:
        """Whether at every depth at least one of the weighted models has a positive weight."""
        weighed = [name for name in models if self.method == "linear" or name != "seed"]
        lengths = {len(w) for w in self.weights.values() if isinstance(w, list)} - {1}
        knots = {0.0, *(knot / (length - 1) for length in lengths for knot in range(length))}
        return all(any(self.weight(name, depth) for name in weighed) for depth in knots)


def _named(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


Averaging = Annotated[AveragingSettings, BeforeValidator(_named)]


class SharedSettings(AveragingSettings):
    """How the shared (non-expert) tensors are averaged: all alike, or some groups of them differently."""

    groups: dict[Group, Averaging] = Field(
        default_factory=dict,
        description="groups with their own method: attention, norms (those of q and k too), embeddings (with a tied "
        "head), head",
    )

    def of(self, tensor: str) -> AveragingSettings:
        """The averaging settings of a tensor, by its name on disk."""
        return self.groups.get(group_of(tensor), self)  # type: ignore[call-overload, no-any-return]

    @property
    def everything(self) -> dict[str, AveragingSettings]:
        """All averaging settings, by their key in the recipe."""
        return {"merge.shared": self, **{f"merge.shared.groups.{name}": one for name, one in self.groups.items()}}


def group_of(tensor: str) -> str:
    """The group of a tensor by its name on disk: attention, norms, embeddings, head, or feed_forward."""
    if tensor.startswith("model.embed_tokens"):  # Gemma 4 has a second table
        return "embeddings"
    if tensor.startswith("lm_head."):
        return "head"
    if "norm." in tensor:
        return "norms"
    return "attention" if "_attn." in tensor or ".conv." in tensor else "feed_forward"  # self_attn, linear_attn, LFM2


class MergeSettings(Settings):
    """The merge: which models, how the shared tensors are averaged, how feed-forwards become experts."""

    include_seed: bool = Field(True, description="the untouched seed is one more expert, as in the paper")
    shared: Annotated[SharedSettings, BeforeValidator(_named)] = SharedSettings()
    experts: Literal["per_model", "split", "blend", "ffn+attention"] = Field(
        "per_model",
        description="per_model: one expert per model; split, blend: the paper's variants; ffn+attention: attention "
        "experts too, with shared keys and values (BAM; Llama seeds without grouped-query attention become JetMoE)",
    )
    chunks: Annotated[Count, Field(ge=2)] = Field(2, description="split: pieces each feed-forward is cut into")
    router: Router = Field(
        "auto",
        description="initial router: random or orthogonal rows; or from each domain's data, by regression on router "
        "inputs (activations), as mean input embedding (embeddings), or as the input that the expert's change answers "
        "to most, data saying its sign and scale (arrow): these load the merged model once, in fp32. auto: activations "
        "where two domains have data and each expert is a model's, else random. Where the seed is a mixture, such a "
        "row is added to all of a model's own rows; own adds none",
    )
    layers: Literal["all", "alternate"] | Annotated[list[Whole], Field(min_length=1)] = Field(
        "all",
        description="layers that get experts, counted from 0; alternate: every second one, from layer 1. In the others "
        "the feed-forward blocks are averaged too (Qwen seeds: other Mixture-of-Experts classes have no such layers)",
    )
    copies: Several | dict[str, Several] = Field(
        1, description="experts made of each model's feed-forward blocks, or by model (1 for one not named)"
    )
    reinitialize: Annotated[Share, Field(lt=1)] = Field(
        0.0,
        description="share of each expert's hidden units that are reinitialised, different ones in each expert, from a "
        "normal distribution like that of the weights they replace (Drop-Upcycling; 0.5 there)",
    )
    shared_expert: Literal["none", "average", "seed"] | SharedExperts = Field(
        "none",
        description="one more expert that every token visits, half of each block's output: the models' average, or the "
        "seed's own block; a list of these for several (where the MoE class has them)",
    )
    router_tokens: Count | Literal["auto"] = Field(
        "auto",
        description="activations, embeddings, arrow: tokens of each domain, at most; auto: as many as an expert is "
        "trained on here, from {:,} to {:,}".format(*ROUTER_TOKENS),
    )
    router_entropy: Annotated[Share, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="mean entropy of the initial router, as a share of log(experts); auto: 0.99 for random and "
        "orthogonal rows; from data, what makes the domains of its tokens most likely",
    )
    seed: Whole = 0
    dtype: Literal["seed", "fp32", "bf16", "fp16"] = "seed"

    @model_validator(mode="after")
    def _owned(self) -> MergeSettings:
        if self.router in FROM_DATA and self.experts == "blend":
            raise ValueError(f"router: {self.router} needs experts that belong to a domain, which blended ones do not")
        if self.router == "arrow" and self.experts == ATTENTION:
            raise ValueError(f"router: arrow makes rows for feed-forward experts, and experts are {ATTENTION}")
        return self

    @model_validator(mode="after")
    def _whole_experts(self) -> MergeSettings:
        if self.experts == ATTENTION and (self.layers != "all" or self.shared_experts):
            raise ValueError(f"experts: {ATTENTION} requires experts in all layers, and no shared expert")
        if self.experts in ("split", "blend") and (self.copies != 1 or self.reinitialize):
            raise ValueError(
                f"experts: {self.experts} cuts feed-forward blocks; copies and reinitialize require experts: per_model"
            )
        many = self.copies if isinstance(self.copies, int) else max(self.copies.values(), default=1)
        if many > 1 and self.router in (*FROM_DATA, "own") and not self.reinitialize:
            raise ValueError(
                f"router: {self.router} gives copies of one model equal or nearly equal rows; "
                "use random or orthogonal, or reinitialize some of their units"
            )
        return self

    def resolved(self, domains_with_data: int, trained_on: int) -> MergeSettings:
        """With `auto` decided of the router and of its tokens; an expert is trained on `trained_on` tokens at most."""
        found: dict[str, Any] = {}
        if self.router_tokens == "auto":
            least, most = ROUTER_TOKENS  # rows of fewer tokens than the model is wide tell any two domains apart
            found["router_tokens"] = min(max(trained_on or most, least), most)
        if self.router == "auto":
            found["router"] = "activations" if domains_with_data > 1 and self._takes("activations") else "random"
        return self.model_copy(update=found)

    def _takes(self, router: str) -> bool:
        """Whether nothing here stands against a kind of router."""
        try:
            type(self).model_validate({**dict(self), "router": router})
        except ValidationError:
            return False
        return True

    @property
    def random_entropy(self) -> float:
        """The mean entropy of rows that no data makes, as a share of log(experts)."""
        return RANDOM_ENTROPY if self.router_entropy == "auto" else self.router_entropy

    @property
    def averaging(self) -> MergeSettings:
        """The settings that decide the dense average; the others at their defaults."""
        return MergeSettings(include_seed=self.include_seed, shared=self.shared, dtype=self.dtype)

    @property
    def attention(self) -> bool:
        """Whether attention has experts too."""
        return self.experts == ATTENTION

    @property
    def shared_experts(self) -> list[str]:
        """What each expert that every token visits is made of; empty for none."""
        if isinstance(self.shared_expert, str):
            return [] if self.shared_expert == "none" else [self.shared_expert]
        return list(self.shared_expert)

    def owners(self, models: Iterable[str]) -> dict[str, str]:
        """The name of every MoE expert, in order, with the model it is made of (empty for one blended of all)."""
        if self.experts == "blend":
            return {f"blend.{n}": "" for n, _ in enumerate(models)}
        counts = {m: self.chunks if self.experts == "split" else self._copies_of(m) for m in models}
        return {f"{m}.{n}" if count > 1 else m: m for m, count in counts.items() for n in range(count)}

    def _copies_of(self, model: str) -> int:
        return self.copies if isinstance(self.copies, int) else self.copies.get(model, 1)

    def torch_dtype(self, seed: torch.dtype) -> torch.dtype:
        """The dtype of the written checkpoint, given the seed's."""
        return torch_dtype(self.dtype, seed)
