"""Branch-Train-Merge (arXiv 2208.03306): the experts stay as they are, and their next-token distributions are mixed.

An expert's weight is the likeness of the text so far to its domain, by tf-idf as the BTX paper has it for this baseline
(arXiv 2403.07816, section 4.1): cosines, through a softmax as in c-BTM (arXiv 2303.14177), of the best `top_k` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from btx.conversions.contract import Conversion
from btx.conversions.experts import Experts, plan, spend
from btx.conversions.sources import Model, Sources, Start
from btx.errors import RecipeError
from btx.events import Emit
from btx.recipe.fields import Count, Positive
from btx.recipe.recipe import Recipe, Section
from btx.steps.model import ComposedStep
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    from torch import Tensor

FILE = "tfidf.safetensors"
MOST = 2000  # windows of a domain that its centre is made of


class BtmSettings(Section):
    """Mixing the experts' distributions by how like each domain the text so far is."""

    top_k: Count = Field(2, description="experts that are mixed for a token")
    temperature: Positive = Field(0.1, description="of the softmax over cosines, which lie in 0 to 1")
    window: Count = Field(256, description="tokens of training text that count as one document of tf-idf")

    def fits(self, recipe: Recipe, name: str) -> None:
        """As many experts as are mixed."""
        if self.top_k > len(recipe.domain_of):
            raise ValueError(
                f"{name}.top_k is {self.top_k}, but there are {len(recipe.domain_of)} experts; choose 1 to that"
            )


class Tfidf(NamedTuple):
    """What weights are made of. Axes: V ids, D experts."""

    settings: BtmSettings
    idf_V: Tensor
    centres_DV: Tensor  # mean of each domain's normalised windows, itself of length 1


class Btm(ComposedStep):
    """Names the experts, and keeps the tf-idf of their domains beside."""

    kind: ClassVar[str] = "btm"
    settings: BtmSettings
    tokens: dict[str, TokensStep]  # of each expert's domain, by the expert's name

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Fit tf-idf on the training text, and write it beside the file."""
        from safetensors.torch import save_file

        from btx.data.packed import Tokens

        idf, centres = fitted([Tokens(step.folder).train for step in self.tokens.values()], self.settings.window)
        save_file({"idf": idf, "centres": centres}, out / FILE)
        return super().run(out, work, emit)

    @classmethod
    def state(cls, folder: Path, settings: BtmSettings) -> Tfidf:
        """The tf-idf of the domains."""
        from safetensors.torch import load

        found = load((folder / FILE).read_bytes())
        return Tfidf(settings, found["idf"], found["centres"])

    @staticmethod
    def combine(state: Tfidf, log_probs: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
        """log Σ w p, the weights those of the text up to each position."""
        import torch

        count = next(iter(log_probs.values())).shape[1]
        weights_DBK = weights(state, ids_BS)[..., -count:]
        each = [found + weight[..., None].log() for found, weight in zip(log_probs.values(), weights_DBK, strict=True)]
        return torch.logsumexp(torch.stack(each), dim=0)


def fitted(texts: list[Any], window: int) -> tuple[Tensor, Tensor]:
    """idf (V,) and centres (D, V) of domains by their training ids, each cut into windows of equal weight.

    idf is ln((1 + n) / (1 + df)) + 1 over the n windows of all domains, as scikit-learn's smooth one. The last column
    stands for all ids that no training text has.
    """
    import numpy as np
    import torch

    size = 2 + max(int(ids.max()) for ids in texts)
    counts = []
    for ids in texts:
        windows = max(1, len(ids) // window)
        chosen = np.unique(np.linspace(0, windows - 1, min(windows, MOST)).round().astype(int))
        counts.append(np.stack([np.bincount(ids[n * window : (n + 1) * window], minlength=size) for n in chosen]))
    found = sum((np.count_nonzero(rows, axis=0) for rows in counts), np.zeros(size, dtype=int))
    idf = np.log((1 + sum(map(len, counts))) / (1 + found)) + 1
    centres = [_unit(_unit(rows * idf).mean(axis=0)) for rows in counts]
    return torch.tensor(idf, dtype=torch.float32), torch.tensor(np.stack(centres), dtype=torch.float32)


def _unit(rows: Any) -> Any:
    import numpy as np

    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def weights(state: Tfidf, ids_BS: Tensor) -> Tensor:
    """Weights (D, B, S) of the experts for what comes after each position: of the text up to it, itself included.

    The tf-idf of a prefix is its counts times idf. With every token its product with a centre grows by idf · centre,
    and its squared length by idf² (2 n + 1), n how often the token was there before: all prefixes take one pass.
    """
    import torch

    known = ids_BS.clamp(max=len(state.idf_V) - 1)
    idf_V, centres_DV = state.idf_V.to(ids_BS.device), state.centres_DV.to(ids_BS.device)
    before_BS = (known[:, :, None] == known[:, None, :]).tril(-1).sum(-1)
    squared_BS = (idf_V[known] ** 2 * (2 * before_BS + 1)).cumsum(-1)
    cosine_DBS = (idf_V * centres_DV)[:, known].cumsum(-1) / squared_BS.sqrt()
    best = cosine_DBS.topk(state.settings.top_k, dim=0)
    shares = (best.values / state.settings.temperature).softmax(dim=0)
    return torch.zeros_like(cosine_DBS).scatter(0, best.indices, shares)


def build(sources: Sources, start: Start, experts: Experts, settings: BtmSettings) -> dict[str, Model]:
    """The mixed experts."""
    domains = sources.recipe.domain_of
    if bare := [name for name in experts.steps if domains[name] not in start.tokens]:
        raise RecipeError(f"btm: the domain of {bare[0]} has no `data` to tell its text by. Give it some.")
    if experts.vocabulary:
        raise RecipeError("btm: experts with tokens of their own give distributions over other ids. Leave btm out.")
    tokens = {name: start.tokens[domains[name]] for name in experts.steps}
    return {"btm": Model(sources.add(Btm(parts=experts.steps, settings=settings, tokens=tokens, **sources.place())))}


CONVERSION = Conversion(
    build, models=("btm",), section=BtmSettings, plan=plan, rates=("train.learning_rate",), spend=spend
)
