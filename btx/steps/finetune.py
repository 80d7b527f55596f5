"""Finetuning of the whole merged model, router included, on all domains and the seed's own data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.errors import RecipeError
from btx.events import Emit, Warned
from btx.recipe.fields import later
from btx.recipe.joint_settings import AdapterRule
from btx.recipe.settings import FinetuneSettings, steps_of, torch_dtype
from btx.steps.branch import require_positions
from btx.steps.merge import Merge
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep
from btx.steps.train import Train, fit, memory_of, require_finite
from btx.training.hook import TrainingHook

if TYPE_CHECKING:
    import torch

    from btx.moe.balance import StepMeans
    from btx.training.adapters import Held
    from btx.training.moments import Moments


JUDGED = 32  # sequences that an expert is judged dead over: one step may lack its domain


class Finetune(ModelStep):
    """A Mixture-of-Experts checkpoint."""

    kind: ClassVar[str] = "finetune"
    trains: ClassVar[bool] = True
    section: ClassVar[str] = "finetune"  # of the recipe, for messages
    fresh: ClassVar[bool] = False  # from random weights of the merged model's shape
    merge: Merge
    tokens: dict[str, TokensStep]
    weights: dict[str, float]
    settings: FinetuneSettings
    moments: bool = later(False)  # whether the optimiser starts from those of the experts
    adapter: AdapterRule | None = later(None)  # trained instead of the weights, and merged

    @property
    def needs(self) -> int:
        """Weights, gradients, optimiser state and activations of the merged model."""
        return memory_of(self.merge.folder, self.settings, self.where)

    @property
    def asks(self) -> dict[str, int]:
        """One sequence of each domain with a positive weight."""
        length = self.settings.sequence_length
        return {tokens.label: length for name, tokens in self.tokens.items() if self.weights[name]}

    def check(self, asked: int) -> None:
        """RecipeError if a sequence is too long for the seed, or the merged model's class lacks what is asked for."""
        require_positions(self.merge.branch.seed, f"{self.section}.sequence_length", self.settings.sequence_length)
        if self.moments:
            self._require_moments()
        if self.adapter:
            self._require_adapter(self.adapter)
        self._require_rule()
        if not self.merge.settings.attention:
            return
        why = f"merge.experts: {self.merge.settings.experts} makes a model whose class"
        if self.settings.gradient_checkpointing:
            raise RecipeError(f"{why} has no gradient checkpointing. Set {self.section}.gradient_checkpointing: false.")
        if self.where.kernel not in ("auto", "eager"):
            raise RecipeError(f"{why} computes its experts by its own loops, not by kernels. Set run.kernel: auto.")

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train and save."""
        from btx.models.mixture import branches_in, own_in

        names, (each, visited) = branches_in(self.merge.folder), own_in(self.merge.folder)
        chosen = (self.settings.experts_per_token or 0) * visited or len(names) * each
        source = {"config": self._shape(chosen)} if self.fresh else {"folder": self.merge.folder}
        held = self._held() if self.adapter else None

        def prepare(net: Any, _stream: Any) -> TrainingHook:
            hook = Balanced(net, self.settings, self.label, emit, names, each=each)
            if held:
                held.prepare_mixture(net)
            return hook

        facts = fit(
            self, **source, like=self.merge.folder, tokens=self.tokens, weights=self.weights,
            budget=self.settings.tokens, settings=self.settings, out=out, work=work, emit=emit, prepare=prepare,
            experts_per_token=chosen, moments=self._carried() if self.moments else None,
            publish=partial(self._publish, held) if held else None,
        )  # fmt: skip
        (out / "experts.json").write_bytes((self.merge.folder / "experts.json").read_bytes())
        return facts

    def _require_rule(self) -> None:
        """RecipeError for a rule under which the routing weights of a seed that is a mixture would be others."""
        said, experts = self.settings, self.merge.laid_out()
        if said.routing not in ("top_k", "soft") and experts.visited > 1:
            raise RecipeError(
                f"{self.section}.routing: {said.routing} visits one expert, and a token of the seed, which is a "
                f"mixture, visits {experts.visited}. Use routing: top_k, which counts models: {experts.visited} "
                "experts for each."
            )
        chosen = said.experts_per_token
        if chosen and (needed := experts.per_token(chosen)) != chosen:
            raise RecipeError(
                f"{self.section}.top_k is {chosen}, and the seed is a mixture whose routing weights do not add up to "
                f"one (norm_topk_prob: false): those of the experts of {chosen} out of {needed} models add up to less "
                f"than in the seed. Set it to {needed}."
            )

    def _held(self) -> Held:
        from btx.training.adapters import Held

        assert self.adapter
        return Held(self.adapter, f"{self.section}.adapter")

    def _publish(self, held: Held, net: Any, _state: Any, out: Path) -> None:
        """Write the mixture that the adapter makes."""
        from btx.checkpoints.reader import Checkpoint
        from btx.models import model

        like = self.merge.folder
        state, dtype = held.merge(net).state_dict(), torch_dtype(self.settings.dtype, Checkpoint(like).dtype)
        require_finite(self.label, 0.0, state, dtype)
        model.save(out, config=net.config, state=state, dtype=dtype, like=like)

    def _require_moments(self) -> None:
        """RecipeError where moments cannot be carried over exactly."""
        asked, merge = "finetune.moments: experts", self.merge.settings
        if self.merge.laid_out().own:
            raise RecipeError(f"{asked} was not tried on a seed that is a mixture. Use moments: fresh.")
        if elsewhere := [name for name, step in self.merge.experts.items() if not isinstance(step, Train)]:
            raise RecipeError(f"{asked} needs the optimiser's moments of every expert, and {elsewhere[0]} was made "
                              "elsewhere, or not by `train`. Use moments: fresh.")  # fmt: skip
        if merge.experts != "per_model" or merge.reinitialize or merge.shared_experts:
            raise RecipeError(f"{asked} is for experts that are whole feed-forward blocks of the models: merge.experts "
                              "per_model, nothing reinitialised, no shared expert. Use moments: fresh.")  # fmt: skip
        if self.where.launch:
            raise RecipeError(f"{asked} was not tried on shards, as run.launch may make. Use moments: fresh, or leave "
                              "run.launch out.")  # fmt: skip

    def _require_adapter(self, adapter: AdapterRule) -> None:
        """RecipeError for an adapter that peft does not know, targets that there are not, or where it was not tried."""
        from btx.training.adapters import TARGETS, config_of, require_targets

        asked = f"{self.section}.adapter"
        config = config_of(adapter.method, adapter.options, asked)
        if TARGETS in adapter.options:
            require_targets(config, self.merge.modules(), asked)
        if self.merge.settings.attention:
            raise RecipeError(f"{asked} was not tried on experts of attention. Leave it, or merge.experts, out.")
        if self.where.launch:
            raise RecipeError(f"{asked} was not tried on shards, as run.launch may make. Leave one of them out.")

    def _carried(self) -> Moments:
        from btx.training.moments import Moments

        owners = list(self.merge.settings.owners(list(self.merge.models)).values())
        return Moments({name: step.folder for name, step in self.merge.experts.items()}, owners)

    def _shape(self, chosen: int) -> Any:
        """The merged model's config, in which a token visits so many experts."""
        from btx.checkpoints.validate import read_config
        from btx.models.families import mixture_family
        from btx.models.native import native_config

        config = read_config(self.merge.folder)
        family = mixture_family(config)
        assert family is not None
        return native_config({**config, family.top_k_field: chosen}, str(self.merge.folder))


def freeze(model: Any, trainable: str) -> None:
    """Freeze every parameter but those that are `trainable`: all, the routers, or all but the experts."""
    from btx.models.flops import experts_in
    from btx.moe.hooks import find_routers

    routers = {id(p) for router in find_routers(model).values() for p in router.parameters()}
    experts = {id(p) for module in experts_in(model) for p in module.parameters()}
    for parameter in model.parameters():
        kept = {"all": True, "router": id(parameter) in routers, "no_experts": id(parameter) not in experts}
        parameter.requires_grad_(parameter.requires_grad and kept[trainable])  # some classes freeze a bias themselves


class Balanced(TrainingHook):
    """The training hook of finetuning: the recipe's routing rule, its balance loss, and per-layer figures.

    Figures are of `names`, each of which has `each` consecutive experts.
    """

    def __init__(
        self, model: Any, settings: FinetuneSettings, label: str, emit: Emit, names: list[str], *, each: int = 1
    ) -> None:  # fmt: skip
        from btx.moe.bias import LoadBias
        from btx.moe.dialects import dialect_of
        from btx.moe.hooks import Routed, find_routers, route_in_float32, router_labels
        from btx.moe.routing import RoutingTotals

        freeze(model, settings.trainable)
        router = dialect_of(next(iter(find_routers(model).values())))
        self.settings, self.label, self.emit, self.experts = settings, label, emit, router.experts
        self.names, self.each, self.labels = names, each, router_labels(model)
        route_in_float32(model)
        self.routed = Routed(model, settings.routing, router.top_k, soft_first_layer=settings.soft_first_layer)
        balance, self.step = settings.balance, 0
        steps = steps_of(settings.tokens, settings)
        self.bias = LoadBias(self.routed, rate=balance.weight, steps=steps) if balance.type == "bias" else None
        self.form = "none" if self.bias else balance.type
        self.warned: set[tuple[int, int]] = set()
        self.dead: list[list[int]] = []
        self.window = RoutingTotals()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start a step: sets Sample Top-1's temperature, and resets means and figures, which are per step."""
        from btx.moe.routing import RoutingTotals

        self.routed.step = self.step = step
        if self.bias:
            self.bias.begin(step)
        self.means: StepMeans | None = None
        self.totals = RoutingTotals()

    def sequences(self, numbers: range, length: int) -> None:
        """Set Sample Top-1's noise, drawn per sequence, so that micro-batching does not change it."""
        from btx.data.sampler import key_of
        from btx.moe.hooks import sequence_noise

        if self.settings.routing != "sample_top1":
            return
        keys = [key_of(self.settings.seed, "noise", number) for number in numbers]
        noise = sequence_noise(keys, layers=len(self.labels), length=length, experts=self.experts)
        self.routed.noise = lambda layer: noise[layer]

    def surveys(self, passes: int) -> bool:
        """Whether a forward survey is needed: the balance loss spans the whole step, also one cut into passes."""
        return passes > 1 and self.form != "none"

    def survey(self, share: float) -> None:
        """Add the routing means of the last forward pass."""
        from btx.moe.balance import StepMeans

        if self.means is None:
            self.means = StepMeans()
        self.means.observe(self.form, self.routed.layers, share)

    def loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted balance loss of the step, with the gradient of the last pass's tokens, and its value."""
        from btx.moe.balance import balance_loss, over_processes, z_loss

        everywhere = self.means.everywhere() if self.means else over_processes
        raw = balance_loss(self.form, self.routed.layers, everywhere)
        self.totals.add(self.routed.layers)
        self.window.add(self.routed.layers)
        added, seen = self.settings.balance.weight * raw, {"balance": float(raw.detach())}
        if self.settings.balance.z:
            z = z_loss(self.routed.layers)
            added, seen = added + self.settings.balance.z * z, seen | {"z": float(z.detach())}
        return added, seen | ({"bias": self.bias.largest} if self.bias else {})

    def figures(self) -> dict[str, Any]:
        """Load and entropy of each layer in the step, and the experts found dead when that was last judged."""
        layers = self.totals.statistics()
        self.routed.clear()
        if self.bias:
            self.bias.update(self.step, layers)
        self._judge()
        return {
            "load": [[round(x, 4) for x in self._together(layer.load)] for layer in layers],
            "entropy": [round(layer.entropy_share, 4) for layer in layers],
            "dead": self.dead,
        }

    def _together(self, load: list[float]) -> list[float]:
        """Loads of what has a name."""
        return [sum(load[n : n + self.each]) for n in range(0, len(load), self.each)]

    def _judge(self) -> None:
        """Find the dead experts, over enough sequences to include every domain; emits a warning for a new one."""
        from btx.moe.routing import RoutingTotals

        if self.window.tokens < JUDGED * self.settings.sequence_length:
            return
        layers = [self._together(layer.load) for layer in self.window.statistics()]
        self.window, least = RoutingTotals(), self.settings.dead_below * self.each / self.experts
        self.dead = [[n, e] for n, load in enumerate(layers) for e, share in enumerate(load) if share < least]
        for n, expert in self.dead:
            if (n, expert) not in self.warned:
                self.warned.add((n, expert))
                said = f"the expert {self.names[expert]} is dead ({layers[n][expert]:.1%} of the routing choices)"
                self.emit(Warned(self.label, f"layer {self.labels[n]}: {said}"))
