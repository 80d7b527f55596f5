"""Which dense family becomes which Mixture-of-Experts family, as data.

A family is here only when N copies of a dense model make an MoE with the same logits ("exact").
`btx.models.target` makes the config of such an MoE from these entries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from btx.errors import ArtifactError
from btx.models.native import native_config

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{kind}_proj.weight" for kind in "qkvo")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
ANY = None
IDLE_WIDTH = 128  # of a shared expert of zeros: small, and divisible as kernels and tensor parallelism require


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token visits, behind a gate of its own: sigmoid(gate · x) times its output."""

    names: dict[str, str]  # dense feed-forward tensor -> its name on disk
    gate: str  # name of the gate's weight (1, D)
    width_field: str  # config field with its feed-forward width

    def shapes(self, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in a layer, by name, for the hidden width and its own feed-forward width."""
        found = {n: (hidden, width) if kind == DOWN else (width, hidden) for kind, n in self.names.items()}
        return {**found, self.gate: (1, hidden)}


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
class Family:
    """One dense family and the MoE family that holds it exactly; names are those on disk, below `model.layers.L.`."""

    dense: str  # model_type of the dense config
    moe: str  # model_type of the MoE config
    expert: dict[str, str]  # dense feed-forward tensor -> published name, {e} the expert. Without {e} the experts are
    # stacked under it: (experts, rows, columns), gate above up where both have the same name
    router: str  # published name of the router's weight (E, D)
    experts_field: str  # config field with the number of experts
    width_field: str  # config field with an expert's feed-forward width
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
    attention: AttentionExperts | None = None  # if attention has experts too
    renamed: dict[str, str] = field(default_factory=dict)  # dense field -> MoE field of the same meaning
    derived: tuple[str, ...] = ()  # dense fields that the MoE config computes from others
    dense_layers: bool = False  # whether layers without experts can be named under mlp_only_layers

    @property
    def stacked(self) -> bool:
        """Whether the experts of a layer are one tensor on disk."""
        return "{e}" not in self.expert[GATE]

    @property
    def fused(self) -> Family:
        """The same under the names in memory: experts stacked as gate_up_proj (E, 2F, D) and down_proj (E, D, F)."""
        gate_up, down = (f"{self.block}.experts.{name}" for name in ("gate_up_proj", "down_proj"))
        return replace(self, expert={GATE: gate_up, UP: gate_up, DOWN: down}, router=f"{self.block}.{self.gate}.weight")

    def router_name(self, layer: int) -> str:
        """Published name of a layer's router weight, of shape (experts, width)."""
        return f"model.layers.{layer}.{self.router}"


_MIXTRAL = {
    GATE: "block_sparse_moe.experts.{e}.w1.weight",
    UP: "block_sparse_moe.experts.{e}.w3.weight",
    DOWN: "block_sparse_moe.experts.{e}.w2.weight",
}
_QWEN = {
    GATE: "mlp.experts.{e}.gate_proj.weight",
    UP: "mlp.experts.{e}.up_proj.weight",
    DOWN: "mlp.experts.{e}.down_proj.weight",
}
_QWEN_SHARED = SharedExpert(
    names={
        GATE: "mlp.shared_expert.gate_proj.weight",
        UP: "mlp.shared_expert.up_proj.weight",
        DOWN: "mlp.shared_expert.down_proj.weight",
    },
    gate="mlp.shared_expert_gate.weight",
    width_field="shared_expert_intermediate_size",
)
_GRANITE = {
    GATE: "block_sparse_moe.input_linear.weight",
    UP: "block_sparse_moe.input_linear.weight",
    DOWN: "block_sparse_moe.output_linear.weight",
}

ALL = (
    Family(
        dense="llama",
        moe="mixtral",
        expert=_MIXTRAL,
        router="block_sparse_moe.gate.weight",
        experts_field="num_local_experts",
        width_field="intermediate_size",
        harmless={"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": ANY},
    ),
    Family(
        dense="mistral",
        moe="mixtral",
        expert=_MIXTRAL,
        router="block_sparse_moe.gate.weight",
        experts_field="num_local_experts",
        width_field="intermediate_size",
    ),
    Family(
        dense="qwen2",
        moe="qwen2_moe",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="num_experts",
        width_field="moe_intermediate_size",
        fixed={
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "qkv_bias": True,
        },
        carried=("head_dim",),
        shared=_QWEN_SHARED,
        dense_layers=True,
    ),
    Family(
        dense="qwen3",
        moe="qwen3_moe",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="num_experts",
        width_field="moe_intermediate_size",
        fixed={
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,  # the dense class goes by layer_types, the MoE class by this, in all layers
        },
        carried=("head_dim",),
        dense_layers=True,
        harmless={"max_window_layers": ANY, "layer_types": ("full_attention",)},
    ),
    Family(
        dense="qwen3_5_text",
        moe="qwen3_5_moe_text",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="num_experts",
        width_field="moe_intermediate_size",
        norm_offset=1.0,
        shared=_QWEN_SHARED,
        harmless={"intermediate_size": ANY},
    ),
    Family(
        dense="olmo2",
        moe="flex_olmo",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="num_experts",
        width_field="intermediate_size",
        norms=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
        residual=True,
        fixed={"norm_topk_prob": True},
        carried=("head_dim",),
    ),
    Family(
        dense="granite",
        moe="granitemoe",
        expert=_GRANITE,
        router="block_sparse_moe.router.layer.weight",
        experts_field="num_local_experts",
        width_field="intermediate_size",
        block="block_sparse_moe",
        gate="router",
        carried=("head_dim",),
        harmless={"mlp_bias": (False,)},
    ),
)
WITH_ATTENTION = Family(  # it has as many query heads as key heads, so no grouped-query attention
    dense="llama",
    moe="jetmoe",
    expert={GATE: "mlp.input_linear.weight", UP: "mlp.input_linear.weight", DOWN: "mlp.output_linear.weight"},
    router="mlp.router.layer.weight",
    experts_field="num_local_experts",
    width_field="intermediate_size",
    gate="router",
    attention=AttentionExperts(
        query="self_attention.experts.input_linear.weight",
        output="self_attention.experts.output_linear.weight",
        keys_values="self_attention.kv_proj.weight",
        router="self_attention.experts.router.layer.weight",
        zeros=("self_attention.experts.bias", "mlp.bias"),
    ),
    renamed={"head_dim": "kv_channels", "hidden_act": "activation_function"},
    derived=("num_attention_heads",),
    harmless={"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": ANY},
)
DENSE = {family.dense: family for family in ALL}
MOE = {family.moe: family for family in (*ALL, WITH_ATTENTION)}

REFUSED = {
    "gemma": "no MoE class of transformers adds one to its norm weights as Gemma does",
    "gemma2": "no MoE class of transformers has its four norms a layer and its soft-capped logits",
    "gemma3_text": "no MoE class of transformers has its four norms a layer",
    "olmo": "no MoE class of transformers has its norms without weights",
    "ministral": "no MoE class of transformers has its mix of sliding and full layers (a mistral that states "
    "layer_types is read as one; if all of its layers slide, remove that key, and if none does, set "
    "sliding_window: null too)",
    "olmo3": "no MoE class of transformers has its mix of sliding and full layers",
}


def family_of(config: dict[str, Any], where: str, *, attention: bool = False) -> Family:
    """The family of a dense config; ArtifactError, with the reason, for one that no MoE class holds exactly.

    `attention` selects the family that has attention experts too.
    """
    kind = config["model_type"]
    if attention and kind in DENSE:
        return _with_attention(config, where)
    if kind in DENSE:
        return DENSE[kind]
    if kind in MOE:
        raise ArtifactError(f"{where} is already a Mixture of Experts ({kind}); a seed or an expert must be dense.")
    reason = REFUSED.get(kind, "btx has no exact Mixture-of-Experts target for it")
    raise ArtifactError(
        f"{where} is of the family {kind}, which cannot be used: {reason}. Use one of {', '.join(DENSE)}."
    )


def _with_attention(config: dict[str, Any], where: str) -> Family:
    native = native_config(config, where)
    why = f"{WITH_ATTENTION.moe}, the one class that has them, is exact for {WITH_ATTENTION.dense} models"
    same = native.num_key_value_heads == native.num_attention_heads  # null stands for as many
    if config["model_type"] == WITH_ATTENTION.dense and same:
        return WITH_ATTENTION
    raise ArtifactError(
        f"{where} cannot have attention experts: {why} with as many key heads as query heads (no grouped-query "
        "attention). Use merge.experts: per_model."
    )
