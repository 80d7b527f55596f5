"""Anchored experts, after FlexOlmo (arXiv 2507.07024) and BAR (arXiv 2604.18473): nothing is averaged.

Each domain's expert is trained as the second of a mixture of two, beside a frozen copy of the seed's feed-forward
blocks; every other tensor is frozen too. The router of the pair has the row zero for the seed, so that an expert's own
row is its logit against the seed's, and the rows of experts that never met can stand side by side: the mixture is the
seed, with the experts and their rows beside it. Last, the routers alone are trained on a sample of all data.

FlexOlmo starts the rows from embeddings of the domains; here they start small and random, and are learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from btx.conversions.contract import Conversion
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Branch, Model, Sources, Start
from btx.conversions.upcycle import Upcycle
from btx.errors import RecipeError
from btx.events import Emit
from btx.graph.step import HASHED
from btx.merge.layout import layout
from btx.recipe.compare_settings import Arm
from btx.recipe.fields import Count, Part
from btx.recipe.makers import Maker
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.mixing import both_stages
from btx.recipe.recipe import Recipe, Section, require_whole_batches
from btx.recipe.settings import BalanceSettings, FinetuneSettings, TrainSettings
from btx.steps.branch import require_positions
from btx.steps.finetune import Finetune
from btx.steps.merge import SEED, Merge
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep
from btx.steps.train import OWN, fit, memory_of
from btx.training.hook import TrainingHook

ROWS = "router.safetensors"  # an expert's row of every router, in the model's order
ANCHOR, OWN_EXPERT = 0, 1  # places in the pair


class AnchoredSettings(TrainSettings, Section):
    """Experts trained beside the frozen seed; what it does not say is as in train."""

    tokens: Count | None = Field(
        None, description="default: what the experts trained here and the finetuning take together"
    )
    sample: Part = Field(0.05, description="share of the tokens that the routers alone are trained on, last")
    top_k: Count = Field(2, description="experts per token of the mixture")

    @model_validator(mode="after")
    def _whole_batch(self) -> AnchoredSettings:
        return self  # what is not said here comes from `train`, so `fits` looks at the two together

    def fits(self, recipe: Recipe, name: str) -> None:
        """Domains to train on, whole batches, and as many experts as a token visits."""
        require_whole_batches(f"{name}, with what it takes from train", recipe.filled(self))
        if bare := [domain for domain, one in recipe.domains.items() if not one.data]:
            raise ValueError(f"{name}: the domain {bare[0]} has no `data` to train an expert on; give it some")
        count = len(recipe.domains) + 1
        if self.top_k > count:
            raise ValueError(f"{name}.top_k is {self.top_k}, but there are {count} experts; choose 1 to {count}")

    def budgets(self, recipe: Recipe) -> tuple[dict[str, int], int]:
        """Tokens of each domain's expert, and of the routers."""
        whole = self.tokens or recipe.tokens_in_all
        said = [domain.tokens for domain in recipe.domains.values() if domain.tokens]
        usual = round(sum(said) / len(said)) if said else 1  # where an expert that exists has no budget of its own
        known = {name: domain.tokens or usual for name, domain in recipe.domains.items()}
        last = round(whole * self.sample)
        return {name: max(1, round((whole - last) * n / sum(known.values()))) for name, n in known.items()}, last


class Pair(ModelStep):
    """A mixture of the seed's feed-forward blocks, frozen, and of a copy that is trained; all else frozen."""

    kind: ClassVar[str] = "anchored-pair"
    trains: ClassVar[bool] = True
    merge: Upcycle  # of two copies
    tokens: TokensStep
    budget: int
    train: TrainSettings

    @property
    def needs(self) -> int:
        """Weights, gradients, optimiser state and activations of the pair."""
        return memory_of(self.merge.folder, self.train, self.where)

    @property
    def asks(self) -> dict[str, int]:
        """A sequence."""
        return {self.tokens.label: self.train.sequence_length}

    def check(self, asked: int) -> None:
        """RecipeError for sequences that are too long, and for processes that may shard what is frozen by halves."""
        require_positions(self.merge.branch.seed, "anchored.sequence_length", self.train.sequence_length)
        if self.merge.laid_out().own:
            raise RecipeError(
                "anchored: it trains feed-forward blocks beside those of a dense seed, and the seed is a mixture. "
                "Leave it out; domains.NAME.expert: train makes experts of a mixture."
            )
        if self.where.launch:
            raise RecipeError(
                "anchored: half of each stacked expert tensor is frozen, which was not tried on shards, as run.launch "
                "may make. Leave run.launch out, or leave anchored out."
            )

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train and save."""
        facts = fit(
            self, folder=self.merge.folder, like=self.merge.folder, tokens={OWN: self.tokens}, weights={OWN: 1.0},
            budget=self.budget, settings=self.train, out=out, work=work, emit=emit, prepare=Beside,
            experts_per_token=2,
        )  # fmt: skip
        (out / "experts.json").write_bytes((self.merge.folder / "experts.json").read_bytes())
        return facts


class Beside(TrainingHook):
    """The hook of a pair: the seed's blocks, its row and all shared tensors keep every bit."""

    def __init__(self, model: Any, _stream: Any) -> None:
        from btx.models.flops import experts_in
        from btx.moe.dialects import matrix_of
        from btx.moe.hooks import find_routers, route_in_float32

        routers: list[Any] = [matrix_of(router).weight for router in find_routers(model).values()]
        experts: list[Any] = [p for module in experts_in(model) for p in module.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for row in routers:
            row.data[ANCHOR] = 0.0
        self.halves = [*experts, *routers]  # (2, ...), of which the first is frozen
        for parameter in self.halves:
            parameter.requires_grad_(True)
        self.kept = [parameter.data[ANCHOR].clone() for parameter in self.halves]
        route_in_float32(model)

    def gradients(self) -> None:
        """Take those of the frozen half away, before they count into the norm that is clipped."""
        for parameter in self.halves:
            if parameter.grad is not None:
                parameter.grad[ANCHOR] = 0.0

    def figures(self) -> dict[str, Any]:
        """Put the frozen half back, which weight decay has touched."""
        for parameter, kept in zip(self.halves, self.kept, strict=True):
            parameter.data[ANCHOR] = kept
        return {}


class AnchoredExpert(ModelStep):
    """The seed with the trained blocks, as a dense checkpoint, and its row of every router."""

    kind: ClassVar[str] = "anchored-expert"
    pair: Pair

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Take the expert and its rows out of the pair."""
        from safetensors.torch import save_file

        from btx.checkpoints.reader import opened
        from btx.checkpoints.token_map import carry_dense
        from btx.export.extract import extract
        from btx.models.mixture import Moe

        with opened(self.pair.folder) as found:
            moe = Moe(found)
            extract(out, moe, moe.names[OWN_EXPERT])
            rows = {str(layer): found.read(moe.family.router_name(layer))[OWN_EXPERT].clone() for layer in moe.layers}
        save_file(rows, out / ROWS)
        carry_dense(self.pair.merge.branch.seed.folder, out)
        return {}


class AnchoredMerge(Merge):
    """The seed's tensors, the experts beside its blocks, and their rows beside its zeros."""

    kind: ClassVar[str] = "anchored-merge"

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Merge, then put the rows in their places."""
        import torch
        from safetensors.torch import load

        from btx.checkpoints.reader import opened
        from btx.checkpoints.writer import overwrite
        from btx.models.families import mixture_family

        facts = super().run(out, work, emit)
        rows = [load((step.folder / ROWS).read_bytes()) for step in self.experts.values()]
        with opened(out) as found:
            family = mixture_family(found.config)
            assert family is not None
            names = {layer: family.router_name(int(layer)) for layer in rows[0]}
            stacked = {
                names[layer]: torch.stack([*(one[layer] for one in rows), torch.zeros_like(rows[0][layer])]).to(
                    found.flat(names[layer], 0, 0).dtype
                )
                for layer in rows[0]
            }
        changed = overwrite(out, stacked)
        hashed = facts[HASHED]
        return {**facts, HASHED: {file: digest for file, digest in hashed.items() if file not in changed}}


class AnchoredRouters(Finetune):
    """The mixture with its routers trained on a sample of all data, and nothing else."""

    kind: ClassVar[str] = "anchored"
    section: ClassVar[str] = "anchored"


def _laid_out(recipe: Recipe, names: list[str]) -> MergeSettings:
    """Every expert beside the seed's blocks; shared tensors are the seed's, to the bit."""
    return MergeSettings.model_validate({
        "include_seed": True, "router": "random", "seed": recipe.merge.seed, "dtype": recipe.merge.dtype,
        "shared": {"method": "linear", "weights": {**dict.fromkeys(names, 0.0), SEED: 1.0}},
    })  # fmt: skip


def build(sources: Sources, start: Start, _experts: Experts, settings: AnchoredSettings) -> dict[str, Model]:
    """The anchored experts, and the mixture of them."""
    recipe = sources.recipe
    filled = recipe.filled(settings)
    train = TrainSettings(**{name: getattr(filled, name) for name in TrainSettings.model_fields})
    budgets, last = settings.budgets(recipe)
    two = _pair_of(sources, start)
    steps: dict[str, ModelStep] = {
        name: _branched(sources, two, name, start.tokens[name], tokens, train) for name, tokens in budgets.items()
    }
    merge = sources.add(AnchoredMerge(
        branch=start.branch, descent=None, experts=steps, settings=_laid_out(recipe, list(steps)), **sources.place()
    ))  # fmt: skip
    said = FinetuneSettings(**{
        **train.model_dump(), "tokens": max(1, last), "top_k": settings.top_k, "trainable": "router",
        "balance": BalanceSettings(type="none", weight=0.0),
    })  # fmt: skip
    if not last:
        return {"anchored": Model(merge, said.rule)}
    tokens_of = sources.all_data(start)
    step = sources.add(AnchoredRouters(
        merge=merge, tokens=tokens_of, weights=both_stages(recipe, list(tokens_of)), settings=said, **sources.place()
    ))  # fmt: skip
    return {"anchored": Model(step, said.rule)}


def expert(sources: Sources, start: Start, branch: Branch, settings: AnchoredSettings) -> AnchoredExpert:
    """A domain's expert: blocks trained beside the seed's own, in the seed."""
    train = TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})
    return _branched(sources, _pair_of(sources, start), branch.name, branch.text, branch.tokens, train)


def expert_plan(settings: AnchoredSettings, seed: Config, name: str, tokens: int) -> Training:
    """The training of the pair."""
    two = layout(MergeSettings(copies=2), [SEED], seed, "the seed").config(seed, 2, "the seed").to_dict()
    return Training(f"anchored-pair:{name}", two, tokens, settings)


def _pair_of(sources: Sources, start: Start) -> Upcycle:
    """The seed beside itself."""
    copies = MergeSettings(copies=2, router="random", seed=sources.recipe.merge.seed, dtype=sources.recipe.merge.dtype)
    return sources.add(Upcycle(branch=start.branch, descent=None, experts={}, settings=copies, **sources.place("pair")))


def _branched(
    sources: Sources, two: Upcycle, name: str, text: TokensStep, tokens: int, train: TrainSettings
) -> AnchoredExpert:
    pair = sources.add(Pair(merge=two, tokens=text, budget=tokens, train=train, **sources.place(name)))
    return sources.add(AnchoredExpert(pair=pair, **sources.place(name)))


def plan(recipe: Recipe, settings: AnchoredSettings, seed: Config) -> list[Training]:
    """The pairs, and the routers."""
    filled, (budgets, last) = recipe.filled(settings), settings.budgets(recipe)
    names = list(budgets)
    whole = layout(_laid_out(recipe, names), [*names, SEED], seed, "the seed")
    config = whole.config(seed, settings.top_k, "the seed").to_dict()
    routers = [Training("anchored", config, last, filled)] if last else []
    return [*(expert_plan(filled, seed, name, count) for name, count in budgets.items()), *routers]


def spend(_recipe: Recipe, tokens: int, _arm: Arm) -> dict[str, Any]:
    """All of it, the sample for the routers included."""
    return {"anchored.tokens": tokens}


CONVERSION = Conversion(
    build,
    models=("anchored",),
    section=AnchoredSettings,
    plan=plan,
    rates=("anchored.learning_rate",),
    spend=spend,
    maker=Maker(section=AnchoredSettings, build=expert, plan=expert_plan, apart=("tokens", "sample", "top_k")),
)
