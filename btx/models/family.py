"""What btx knows of one dense family and the MoE family that holds it exactly: the record that its table is made of.

Names are those on disk, below `model.layers.L.`, unless a comment says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{kind}_proj.weight" for kind in "qkvo")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
ANY = None
IDLE_WIDTH = 128  # of a shared expert of zeros: small, and divisible as kernels and tensor parallelism require


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token visits, times the sigmoid of a gate of its own where the class has one."""

    names: dict[str, str]  # dense feed-forward tensor -> its name on disk
    gate: str | None = None  # name of the gate's weight (1, D)
    width_field: str | None = None  # config field with its feed-forward width; None: as wide as a routed expert
    count_field: str | None = None  # config field with how many there are, each as wide as a routed one: as one block
    # of their widths together. Without the field there is one block always, which zeros make idle

    def shapes(self, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in a layer, by name, for the hidden width and its own feed-forward width."""
        found: dict[str, tuple[int, ...]] = {
            n: (hidden, width) if kind == DOWN else (width, hidden) for kind, n in self.names.items()
        }
        return {**found, self.gate: (1, hidden)} if self.gate else found

    def width(self, config: Any, expert: int) -> int:
        """Its feed-forward width by a native config, with experts of width `expert`."""
        if self.count_field:
            return expert * int(getattr(config, self.count_field))
        return int(getattr(config, self.width_field)) if self.width_field else expert


@dataclass(frozen=True)
class AttentionExperts:
    """Query and output projections as experts with a router of their own; keys and values are averaged, and shared.

    As in BAM (arXiv 2408.08274) with shared keys and values, but for its soft routing: a token visits top-k of them.
    """

    query: str  # name on disk of (E, H, D)
    output: str  # (E, D, H)
    keys_values: str  # (2H, D), keys above values
    router: str  # (E, D)
    zeros: tuple[str, ...]  # biases (D,) that dense models do not have
    norm: str = "input_layernorm.weight"  # the norm whose output they and their router see


@dataclass(frozen=True)
class Constant:
    """A tensor of the MoE class that a dense model does not have, with the value under which it does nothing."""

    shape: tuple[str | int, ...]  # "E" stands for the number of experts, "D" for the hidden width
    value: float
    memory: str = ""  # its name in memory, where that is another than on disk
    switch: str = ""  # config field without which a mixture that is a seed does not have it
    shared_out: bool = False  # whether it is added to probabilities that sum to one, so that N copies have an Nth each

    def within(self, native: Any) -> bool:
        """Whether a mixture of a native config has it."""
        return not self.switch or bool(getattr(native, self.switch))

    def sizes(self, experts: int, hidden: int) -> tuple[int, ...]:
        """Its shape for a number of experts and a hidden width."""
        known = {"E": experts, "D": hidden}
        return tuple(known[s] if isinstance(s, str) else s for s in self.shape)


@dataclass(frozen=True)
class Family:
    """One dense family and the MoE family that holds it exactly; names are those on disk, below `model.layers.L.`."""

    dense: str  # model_type of the dense config
    moe: str  # model_type of the MoE config
    expert: dict[str, str]  # dense feed-forward tensor -> published name, {e} the expert. Without {e} the experts are
    # stacked under it: (experts, rows, columns), gate above up where both have the same name
    router: str  # published name of the router's weight (E, D)
    experts_field: str  # config field with the number of experts
    width_field: str  # config field with an expert's feed-forward width
    top_k_field: str = "num_experts_per_tok"  # config field with the number of experts a token visits
    norms: tuple[str, ...] = ("post_attention_layernorm.weight",)  # the norm whose output the feed-forward block and
    # the router see; or, where they see the bare residual stream, all norms whose outputs are added to it
    residual: bool = False  # whether they see the bare residual stream
    norm_offset: float = 0.0  # what the class adds to the weights of those norms
    block: str = "mlp"  # the MoE block in memory
    gate: str = "gate"  # its router in memory
    fixed: dict[str, Any] = field(default_factory=dict)  # MoE config fields that make it exact
    carried: tuple[str, ...] = ()  # fields that both models read although a config class does not declare them
    harmless: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)  # dense-only field: values that do
    # nothing in the dense model (for a list: of each of its items), or ANY
    shared: SharedExpert | None = None  # in every layer, if the family has one; zeros make it idle
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # dense tensor as stored -> the tensors, under the
    # names used here, whose rows it joins in order
    copies: dict[str, str] = field(default_factory=dict)  # further tensor of a layer with experts -> the dense tensor
    # whose values it gets
    input_scale: str | None = None  # name of (D,), by which the router multiplies its normed input, over sqrt(D)
    constants: dict[str, Constant] = field(default_factory=dict)  # further tensors of a layer with experts
    attention: AttentionExperts | None = None  # if attention has experts too
    renamed: dict[str, str] = field(default_factory=dict)  # dense field -> MoE field of the same meaning
    derived: tuple[str, ...] = ()  # dense fields that the MoE config computes from others
    extracted: dict[str, Any] = field(default_factory=dict)  # dense config fields of an extracted expert
    scores: str = "softmax"  # what makes a router's logits scores: softmax, sigmoid, or the config field that says it
    switch: str | None = None  # config field that makes a mixture of the class, where the dense one is the same class
    rotates_parts: bool = True  # whether the MoE class rotates parts of heads wherever the dense one does
    dense_layers: bool = False  # whether layers without experts can be named under mlp_only_layers

    @property
    def stacked(self) -> bool:
        """Whether the experts of a layer are one tensor on disk."""
        return "{e}" not in self.expert[GATE]

    @property
    def fused(self) -> Family:
        """The same under the names in memory: experts stacked as gate_up_proj (E, 2F, D) and down_proj (E, D, F)."""
        gate_up, down = (f"{self.experts}{name}" for name in ("gate_up_proj", "down_proj"))
        return replace(self, expert={GATE: gate_up, UP: gate_up, DOWN: down}, router=self.router_in_memory)

    @property
    def experts(self) -> str:
        """Name of the experts in memory, with the dot behind it."""
        return f"{self.block}.experts.".removeprefix(".")

    @property
    def as_in_memory(self) -> bool:
        """Whether experts and routers have the same names on disk and in memory."""
        return (self.expert, self.router) == (self.fused.expert, self.fused.router)

    @property
    def router_in_memory(self) -> str:
        """Name of the router's weight in memory."""
        return f"{self.block}.{self.gate}.weight".removeprefix(".")

    @property
    def feed_forward(self) -> set[str]:
        """Names of the dense feed-forward tensors as stored, which are those in memory."""
        joined = {name: parts for name, parts in self.parts.items() if {*parts} <= {*self.expert}}
        return {*joined, *self.expert} - {part for parts in joined.values() for part in parts}

    def scores_of(self, native: Any) -> str:
        """What makes scores of a router's logits in a mixture of a native config: softmax or sigmoid."""
        return str(getattr(native, self.scores, self.scores))

    def normalised(self, native: Any) -> bool:
        """Whether the routing weights of a token add up to one in a mixture of a native config."""
        of_chosen = self.scores_of(native) == "softmax" != self.scores  # Cohere 2's, over the chosen logits alone
        said = any(one.name == "norm_topk_prob" for one in fields(native))  # else the class does not read it
        return of_chosen or not said or bool(native.norm_topk_prob)

    def router_name(self, layer: int) -> str:
        """Published name of a layer's router weight, of shape (experts, width)."""
        return f"model.layers.{layer}.{self.router}"


def part_rows(parts: tuple[str, ...], rows: int, config: dict[str, Any]) -> list[int]:
    """How many of the rows of a joined tensor each of its parts has, by the parsed dense config."""
    if parts != (QUERY, KEY, VALUE):
        return [rows // len(parts)] * len(parts)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = (config.get("num_key_value_heads") or heads) * width
    return [heads * width, keys, keys]
