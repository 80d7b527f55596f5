"""Installs a routing rule on a native transformers MoE model by forward hooks, and records its routing.

btx has no modelling code of its own: a router of transformers returns (logits, weights, indices), and a hook on
it may return others.

Axes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from btx.moe.dialects import GATING, Plain, Unsummed, dialect_of
from btx.moe.routing import Routing, experts_per_token, route


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a native MoE model by name, first layer first.

    They are the modules whose first output its class declares to be router logits (and JetMoE's, which sort tokens).
    """
    kinds = {kind for module in model.modules() for kind in _router_classes(module)}
    routers = {n: m for n, m in model.named_modules() if type(m) in kinds or type(m).__name__.endswith(GATING)}
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router: its class declares no module that puts out router logits, as "
            "MixtralForCausalLM and Qwen3MoeForCausalLM do; a dense model cannot be routed"
        )
    return routers


def _router_classes(module: nn.Module) -> list[type]:
    """The classes whose first output is router logits, as a transformers model declares them for its own recording."""
    declared = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = declared if isinstance(declared, list) else [declared]
    return [one.target_class for one in recorders if one.index == 0]


def router_labels(model: nn.Module) -> list[str]:
    """Names of the routers in tables: the layer's number, followed by `attention` for an attention router."""
    places = [name.split(".") for name in find_routers(model)]
    numbers = [next(part for part in place if part.isdecimal()) for place in places]
    of_attention = ["self_attention" in place for place in places]
    return [f"{n} attention" if attention else n for n, attention in zip(numbers, of_attention, strict=True)]


class Routed:
    """Applies a routing rule to a native MoE model, and records the routing of the last forward pass.

    `with Routed(model, "sample_top1", 1) as routed:` puts forward hooks on the model and on each of its
    routers; leaving the block, or `remove()`, removes them. In train mode the rule's experts and weights
    replace the stock ones, in the stock dtype. In eval mode the stock output stays: it equals the rule
    without its noise. `soft_first_layer` makes the first MoE layer soft in both modes, as the paper
    does with Sample Top-1; a checkpoint trained so needs this class at inference too, as stock classes would
    run that layer with their own K.

    `layers` is for balance losses and statistics: one `Routing` per layer, attached to the autograd graph in
    training. Recording is on only while `model` itself runs forward, so the recompute of gradient
    checkpointing, which runs in the backward pass, routes the same way but records nothing. If `noise` is set,
    `noise(layer)` gives the Exp(1) draws, of shape (T, E) (see `sequence_noise`); otherwise they come from torch's
    global random state, which that recompute restores.

    `each` consecutive experts are one branch, where the models that were merged are mixtures themselves.

    FlexOlmo and Gemma 4 normalise a block's output: there the weight of a single expert (`switch`, `sample_top1`) has
    no effect and next to no gradient: its router learns from the balance loss alone.

    Set `step` before a forward pass and leave it until that pass's backward is over. Pass the outermost
    wrapper that is called (peft's, say) as `model`. Do not set `output_router_logits` as well: it adds
    transformers' balance loss.
    """

    def __init__(
        self, model: nn.Module, rule: str, k: int, *, soft_first_layer: bool = False, each: int = 1
    ) -> None:  # fmt: skip
        routers = {
            name: dialect_of(router, model.get_submodule(name.rpartition(".")[0]))
            for name, router in find_routers(model).items()
        }
        self.dialects = list(routers.values())
        for name, router in routers.items():
            _check_router(name, router, rule, k)
        self.rule = rule
        self.k = k
        self.experts = min(router.experts for router in routers.values())
        self.each = each  # experts of a branch, which measurements count as one
        self.soft_first_layer = soft_first_layer
        self.step = 0
        self.noise: Callable[[int], Tensor] | None = None
        self.without: int | None = None  # a branch that no token is routed to, in evaluation
        self.names = list(routers)
        self._record: dict[int, Routing] = {}
        self._open = False
        self._needs_graph = False
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._stop, always_call=True),
        ]
        for layer, router in enumerate(routers.values()):
            router.listen()
            self._handles += [router.router.register_forward_hook(partial(self._route, layer, router)), router]

    @property
    def layers(self) -> list[Routing]:
        """One `Routing` per MoE layer, in order, of the last forward pass; ValueError before there is one."""
        if self._open or len(self._record) != len(self.names):
            raise ValueError(
                f"{len(self._record)} of {len(self.names)} routers have a record: first call the model that "
                "was given to Routed, then read `layers`"
            )
        return [self._record[layer] for layer in range(len(self.names))]

    def clear(self) -> None:
        """Forget the last forward pass, and with it the autograd graph that its record keeps alive."""
        self._record = {}

    def remove(self) -> None:
        """Remove every hook; the model routes as its stock class does. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Routed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _start(self, _model: nn.Module, _args: Any) -> None:
        self.clear()
        self._open = True
        self._needs_graph = torch.is_grad_enabled()

    def _stop(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._open = False

    def _route(self, layer: int, dialect: Plain, router: nn.Module, _args: Any, output: Any) -> Any:
        logits_TE, stock_TK, index_TK = dialect.read(output, self.k)
        weight_TK = stock_TK
        if layer == 0 and self.soft_first_layer:
            index_TK, weight_TK = route(logits_TE, "soft", logits_TE.shape[-1])
        elif router.training:
            noise_TE = self.noise(layer).to(logits_TE.device) if self.noise else None
            index_TK, weight_TK = route(
                logits_TE, self.rule, self.k, step=self.step, exponential_TE=noise_TE, training=True,
                bias_E=dialect.bias_on(logits_TE),
            )  # fmt: skip
        elif self.without is not None:
            gone = torch.arange(self.without * self.each, (self.without + 1) * self.each, device=logits_TE.device)
            left_TE = logits_TE.index_fill(-1, gone, -torch.inf)
            held = dialect.bias_on(left_TE) if dialect.holds_bias else None
            if held is not None:  # which must not choose what is gone
                held = held.expand_as(left_TE).index_fill(-1, gone, -torch.inf)
            index_TK, weight_TK = route(left_TE, self.rule, self.k, bias_E=held)
        if self._open:
            self._check_graph(router)
            self._record[layer] = Routing(logits_TE, index_TK, weight_TK)
        return output if weight_TK is stock_TK else dialect.write(output, logits_TE, weight_TK, index_TK)

    def _check_graph(self, router: nn.Module) -> None:
        if router.training and self._needs_graph and not torch.is_grad_enabled():
            raise ValueError(
                "a layer runs without gradients in a forward pass with them, as in reentrant checkpointing, "
                "so a balance loss would get none: enable checkpointing with {'use_reentrant': False}"
            )


def sequence_noise(keys: Sequence[int], *, layers: int, length: int, experts: int) -> Tensor:
    """Exp(1) draws (layers, sequences · length, experts); those of a sequence depend on its key alone.

    So a sequence gets the same noise in whichever pass and process it is computed.
    """
    drawn = []
    for key in keys:
        generator = torch.Generator().manual_seed(key % 2**63)
        drawn.append(torch.empty(layers, length, experts).exponential_(generator=generator))
    return torch.cat(drawn, dim=1)


def route_in_float32(model: nn.Module) -> None:
    """Make every router of a model compute in float32, also under autocast and between bfloat16 layers, once for all.

    Top-k depends on small differences of logits, which bfloat16 keeps to three digits.
    """
    for router in find_routers(model).values():
        if getattr(router.forward, "func", None) is not _in_float32:
            router.forward = partial(_in_float32, router.forward)


def _in_float32(forward: Callable[..., Any], hidden: Tensor, *more: Any) -> Any:
    with torch.autocast(hidden.device.type, enabled=False):
        output = forward(hidden.float(), *more)
    if len(output) == 3:
        return output
    order, tokens, gates, sizes, logits_TE = output  # JetMoE multiplies by the gates in the dtype of its layers
    return order, tokens, gates.to(hidden.dtype), sizes, logits_TE


def _check_router(name: str, router: Plain, rule: str, k: int) -> None:
    """ValueError for a stock router that in eval mode and after export would not route as trained."""
    experts_per_token(rule, k=k, experts=router.experts)
    if router.top_k != k:
        raise ValueError(f"{name} chooses {router.top_k} experts, not {k}: set num_experts_per_tok = {k}")
    if isinstance(router, Unsummed) and rule not in ("top_k", "soft"):
        raise ValueError(f"{name} leaves its weights unnormalised, unlike {rule}: set norm_topk_prob = True")
