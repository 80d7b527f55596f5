"""The merge of all experts (and the seed) into one Mixture of Experts, and their dense average for comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.errors import RecipeError, ResourceError
from btx.events import Emit, Note, Progress
from btx.graph.artifact import STATES, fingerprint, write_json
from btx.graph.launch import memory_here
from btx.graph.step import HASHED
from btx.recipe.merge_settings import FROM_DATA, MergeSettings
from btx.steps.branch import VerifyExperts, VerifySeed
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ModelStep
from btx.steps.pretrain import Pretrain
from btx.steps.tokens import TokensStep
from btx.steps.vocabulary import VocabularyStep

if TYPE_CHECKING:
    import torch

    from btx.checkpoints.reader import Checkpoint
    from btx.checkpoints.writer import Meter, Resume
    from btx.merge.layout import Experts
    from btx.merge.vocabulary import JointVocabulary

SEED = "seed"
TELL_EVERY = 1.0  # seconds
TOP_K = 2  # experts per token, as in the paper, until the finetuning sets its own
SEQUENCE, ROWS = 256, 16  # tokens per sequence and sequences per batch for router initialisation


class Models(ModelStep):
    """What merge and average share: the seed's lineage and the experts by domain, in the recipe's order."""

    branch: VerifySeed
    descent: VerifyExperts | None  # of the experts trained elsewhere
    experts: dict[str, ModelStep]
    settings: MergeSettings
    vocabulary: VocabularyStep | None = None  # if experts have added tokens

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer files the merged model has."""
        return (self.vocabulary or self.branch.seed).folder

    @property
    def models(self) -> dict[str, ModelStep]:
        """Every model that takes part, experts first and the seed last, as in the paper's N = 4."""
        seed = {SEED: self.branch.seed} if self.settings.include_seed else {}
        return {**self.experts, **seed}

    def opened(self, stack: ExitStack) -> tuple[dict[str, Any], Any, JointVocabulary | None]:
        """All models, open, checked and padded to one width and vocabulary; the seed; the joint vocabulary, if any."""
        from btx.checkpoints.reader import one_thread
        from btx.merge.averaging import require_memory
        from btx.merge.canonical import opened_canonical
        from btx.merge.lineage import require_same
        from btx.merge.padded import same_width
        from btx.merge.vocabulary import JointVocabulary, Vocabulary

        stack.enter_context(one_thread())
        seed = stack.enter_context(opened_canonical(self.branch.seed.folder))
        limit = self.where.max_memory
        require_memory(seed, self.settings.shared, models=len(self.models), limit=limit)
        found = {n: stack.enter_context(opened_canonical(s.folder)) for n, s in self.models.items() if n != SEED}
        found[SEED], joint = seed, None
        if self.vocabulary:
            known = Vocabulary.read(self.vocabulary.folder)
            joint = JointVocabulary(known, {name: found[name] for name in self.models}, seed)
            found = {name: joint.trimmed(model) for name, model in found.items()}
        wide = same_width(found)
        for name in self.experts:
            require_same(wide[SEED], wide[name], name)
        return {name: wide[name] for name in self.models}, wide[SEED], joint

    def resume(self, work: Path) -> Resume:
        """Where finished shards are kept for a resumed merge, valid only for the current parents."""
        from btx.checkpoints.writer import Resume

        return Resume(work / STATES, fingerprint({label: parent.digest for label, parent in self.parents.items()}))

    def progress(self, emit: Emit) -> Meter:
        """A callback that emits how many bytes of a merge are written, at most once a second."""
        last = time.monotonic()

        def told(_file: Path, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > TELL_EVERY:
                last = time.monotonic()
                emit(Progress(self.label, done // 10**6, total // 10**6, "MB"))

        return told


class Average(Models):
    """A dense checkpoint: every tensor the average over the models."""

    kind: ClassVar[str] = "average"

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Average and write."""
        from btx.checkpoints.token_map import carry_dense
        from btx.merge.write import write_average

        with ExitStack() as stack:
            models, seed, joint = self.opened(stack)
            hashed = write_average(out, models, seed, self.settings, self.resume(work), self.progress(emit), joint)
            config = {**seed.config, "dtype": _dtype_name(self.settings.torch_dtype(seed.dtype))}
            write_json(out / "config.json", config)
            carry_dense(self.tokenizer, out)
        return {"models": list(models), HASHED: hashed}


class Merge(Models):
    """A Mixture-of-Experts checkpoint."""

    kind: ClassVar[str] = "merge"
    version: ClassVar[int] = 7
    tokens: dict[str, TokensStep] = Field(default_factory=dict)  # by domain, if data initialises the router
    domains: dict[str, str] = Field(default_factory=dict)  # of models that are not named after their domain

    def check(self, asked: int) -> None:
        """Raise if the averaging needs more than run.max_memory, or the recipe's expert layout is impossible."""
        from btx.merge.averaging import require_memory
        from btx.merge.canonical import opened_canonical

        seed = self.branch.seed
        if isinstance(seed, ExternalCheckpoint):
            with opened_canonical(seed.folder) as found:
                require_memory(found, self.settings.shared, models=len(self.models), limit=self.where.max_memory)
        self.check_layout()

    def _dense(self) -> dict[str, Any]:
        """The seed's config, the width of a dense one's feed-forward blocks stated."""
        from btx.checkpoints.validate import read_config
        from btx.models.families import mixture_family, with_width

        seed = self.branch.seed
        if isinstance(seed, ExternalCheckpoint) and mixture_family(found := read_config(seed.folder)):
            return found
        return dict(seed.config) if isinstance(seed, Pretrain) else with_width(seed.config, width_of(seed.folder))

    def modules(self) -> list[str]:
        """The names of the merged model's modules that have a weight, before it is made."""
        from btx.models.flops import modules_in

        dense = self._dense()
        config = self.laid_out(dense).config(dense, 1, str(self.branch.seed.folder))
        return modules_in(config.to_dict())

    def laid_out(self, config: dict[str, Any] | None = None) -> Experts:
        """The layout of the experts, for the seed's config; RecipeError for an impossible one."""
        from btx.merge.layout import layout

        return layout(self.settings, list(self.models), config or self._dense(), str(self.branch.seed.folder))

    def check_layout(self) -> None:
        """RecipeError if the seed's feed-forward blocks cannot be made into experts as the recipe says."""
        from btx.checkpoints.token_map import require_carried
        from btx.models.table import WITH_ATTENTION

        seed, config = self.branch.seed, self._dense()
        self._require_room(self.laid_out(config), config)
        if self.settings.attention and isinstance(seed, ExternalCheckpoint):
            require_carried(seed.folder, WITH_ATTENTION.moe)
        for name, step in self.models.items():
            cut = self.settings.experts in ("split", "blend") and isinstance(step, ExternalCheckpoint)
            if cut and width_of(step.folder) != (width := config["intermediate_size"]):
                raise RecipeError(
                    f"merge.experts: {self.settings.experts} cuts feed-forward blocks of one width; that of {name} is "
                    f"{width_of(step.folder)}, the seed's {width}. Use experts: per_model, or leave that domain out."
                )

    def _require_room(self, experts: Experts, seed: dict[str, Any]) -> None:
        """ResourceError if the router is made from data and the merged model in fp32 is larger than the memory."""
        from btx.models import flops

        if self.settings.router not in FROM_DATA:
            return
        config = experts.config(seed, experts.per_token(TOP_K), "the seed").to_dict()
        needed, here = flops.checkpoint_bytes(config, "float32"), memory_here()
        if needed > here:
            raise ResourceError(
                f"merge.router: {self.settings.router} loads the merged model once, {needed / 2**30:.3g} GiB in fp32, "
                f"and this machine has {here / 2**30:.3g} GiB. Set merge.router: random, or merge on a larger machine."
            )

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Merge and write; records each expert's distance from the seed."""
        from btx.checkpoints.reader import carry_files
        from btx.checkpoints.token_map import carry_tokenizer
        from btx.merge.lineage import distances
        from btx.merge.write import write_moe
        from btx.models.mixture import EXPERTS, OWN

        with ExitStack() as stack:
            models, seed, joint = self.opened(stack)
            experts = self.laid_out(seed.config)
            top_k = experts.per_token(TOP_K)
            hashed = write_moe(out, models, seed, self.settings, top_k, self.resume(work), self.progress(emit), joint)
            if self.vocabulary or self.settings.attention:
                carry_tokenizer(self.tokenizer, out, self.branch.seed.folder)
            else:  # the branch step has verified these for this family
                carry_files(self.branch.tokenizer, out)
            known = self.descent.distances() if self.descent else {}
            new = distances(seed, {n: m for n, m in models.items() if n != SEED and n not in known})
            far = {n: known.get(n) or new[n] for n in models if n != SEED}
            rows = self._directions(models, seed, experts)
        names = list(experts.owners)
        if self.settings.router in FROM_DATA:
            emit(Note(self.label, f"initialises the routers from {self.settings.router}"))
            changed = self._route(out, experts, rows)
            hashed = {file: digest for file, digest in hashed.items() if file not in changed}
        about = {"experts": names, "models": list(models), "distance": far}
        write_json(out / EXPERTS, about | ({OWN: [experts.each, experts.visited]} if experts.own else {}))
        return {"experts": names, "distance": far, HASHED: hashed}

    def _directions(
        self, models: Mapping[str, Checkpoint], seed: Checkpoint, experts: Experts
    ) -> list[list[torch.Tensor]]:
        """Each expert's direction by layer, for a router of those."""
        if self.settings.router != "arrow":
            return []
        from btx.merge.arrow import directions

        found = {name: directions(seed, one, experts.layers) for name, one in models.items()}
        return [found[model] for model in experts.owners.values()]

    def _route(self, out: Path, experts: Experts, directions: list[list[torch.Tensor]]) -> set[str]:
        """Initialise the routers of the merged model in `out` from the domains' data; returns the changed files."""
        from btx.checkpoints.writer import overwrite
        from btx.merge.router_init import fresh_routers
        from btx.models import model
        from btx.models.families import mixture_family
        from btx.moe.dialects import matrix_of
        from btx.moe.hooks import find_routers

        model.set_threads(self.where)
        net = model.load(out, where=self.where).to(model.device_of(self.where)).eval()
        count = self.settings.router_tokens
        assert count != "auto"  # decided when the graph is built
        batches = {name: _batches(step, count) for name, step in self.tokens.items()}
        owners = [self.domains.get(model, model) for model in experts.branches.values()]
        routers = fresh_routers(
            net, batches, owners, how=self.settings.router,
            entropy=None if self.settings.router_entropy == "auto" else self.settings.router_entropy,
            together=self.settings.experts == "split", directions=directions,
        )  # fmt: skip
        if experts.own:  # a row for each model is added to all of its own
            own = [matrix_of(router).weight.detach().float().cpu() for router in find_routers(net).values()]
            routers = [a + b.repeat_interleave(experts.each, 0) for a, b in zip(own, routers, strict=True)]
        family = mixture_family(net.config)
        assert family is not None
        return overwrite(out, dict(zip(experts.routers(family), routers, strict=True)))


def width_of(folder: Path) -> int:
    """The feed-forward width of a dense checkpoint, from its config.json."""
    from btx.checkpoints.validate import read_config
    from btx.models.families import feed_forward_width

    return feed_forward_width(read_config(folder), str(folder))


def _batches(step: TokensStep, count: int) -> list[torch.Tensor]:
    """The first training tokens of a domain as batches of ids."""
    import torch

    from btx.data.packed import Tokens

    ids = torch.from_numpy(Tokens(step.folder).train[:count].astype("int64"))
    length = min(SEQUENCE, len(ids))
    return list(torch.split(ids[: len(ids) // length * length].view(-1, length), ROWS))


def check_method(settings: MergeSettings, models: list[str]) -> None:
    """RecipeError if an averaging method does not work for that many models."""
    for where, how in settings.shared.everything.items():
        if how.method == "slerp" and len(models) != 2:
            raise RecipeError(
                f"{where}: slerp interpolates two models, but here are {len(models)} ({', '.join(models)}). "
                "Use mean, linear, task_arithmetic, ties, dare_ties or model_stock."
            )
        if how.method == "model_stock" and len([m for m in models if m != SEED]) < 2:
            raise RecipeError(f"{where}: model_stock needs two experts or more besides the seed.")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
