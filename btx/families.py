"""Which dense family becomes which Mixture-of-Experts family, as data.

A family is here only when N copies of a dense model make an MoE with the same logits ("exact"). What is carried
over in the config is decided field by field: a field that the MoE class knows is copied, one that it does not know
must have a value under which it does nothing, and anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from btx.errors import ArtifactError

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
ANY = None
SHARED_WIDTH = 128  # of a shared expert of zeros: small, and a multiple of what kernels and tensor parallelism ask for


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
    block: str = "mlp"  # the MoE block in memory
    gate: str = "gate"  # its router in memory
    fixed: dict[str, Any] = field(default_factory=dict)  # MoE config fields that make it exact
    carried: tuple[str, ...] = ()  # fields that the MoE model reads although its config class does not declare them
    harmless: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)  # dense-only field: values that do
    # nothing in the dense model (for a list: of each of its items), or ANY
    zeros: Callable[[int], dict[str, tuple[int, ...]]] | None = None  # tensors of zeros in every layer, by model width

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


def _shared_expert(width: int) -> dict[str, tuple[int, ...]]:
    """The always-on expert of Qwen2-MoE and its gate, all zero: it adds nothing and, without a gradient, never will."""
    rows, columns = (SHARED_WIDTH, width), (width, SHARED_WIDTH)
    return {
        "mlp.shared_expert.gate_proj.weight": rows,
        "mlp.shared_expert.up_proj.weight": rows,
        "mlp.shared_expert.down_proj.weight": columns,
        "mlp.shared_expert_gate.weight": (1, width),
    }


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
            "shared_expert_intermediate_size": SHARED_WIDTH,
        },
        carried=("head_dim",),
        zeros=_shared_expert,
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
        harmless={"max_window_layers": ANY, "layer_types": ("full_attention",)},
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
DENSE = {family.dense: family for family in ALL}
MOE = {family.moe: family for family in ALL}

REFUSED = {
    "gemma": "no MoE class of transformers adds one to its norm weights as Gemma does",
    "gemma2": "no MoE class of transformers has its four norms a layer and its soft-capped logits",
    "gemma3_text": "no MoE class of transformers has its four norms a layer",
    "olmo": "no MoE class of transformers has its norms without weights",
    "olmo3": "no MoE class of transformers has its mix of sliding and full layers",
}
_RECORDED = {"_name_or_path", "transformers_version", "architectures", "model_type", "dtype", "torch_dtype"}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a dense config; ArtifactError, saying why, for one that no MoE class holds exactly."""
    kind = config["model_type"]
    if kind in DENSE:
        return DENSE[kind]
    if kind in MOE:
        raise ArtifactError(f"{where} is a Mixture of Experts already ({kind}); a seed or an expert must be dense.")
    reason = REFUSED.get(kind, "btx has no exact Mixture-of-Experts target for it")
    raise ArtifactError(
        f"{where} is of the family {kind}, which cannot be used: {reason}. Use one of {', '.join(DENSE)}."
    )


def moe_config(dense: dict[str, Any], *, experts: int, top_k: int, width: int, where: str) -> Any:
    """The native MoE config that gives a dense model's logits when all experts are that model.

    `dense` is the parsed config.json; `width` an expert's feed-forward width. ArtifactError names the field when the
    dense model uses something that the MoE class does not have.
    """
    from transformers import AutoConfig

    family = family_of(dense, where)
    source = AutoConfig.for_model(**dense).to_dict()
    known = AutoConfig.for_model(family.moe).to_dict().keys() | set(family.carried)
    _refuse_unknown(family, source, known, where)
    kept = {k: v for k, v in source.items() if k in known and k not in _RECORDED}
    kept |= {**family.fixed, family.experts_field: experts, family.width_field: width, "num_experts_per_tok": top_k}
    return AutoConfig.for_model(family.moe, **kept)


def class_name(config: object) -> str:
    """The stock class of a native config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def dense_config(family: Family, moe: dict[str, Any]) -> Any:
    """The native dense config of a model of one expert of a Mixture of Experts; `moe` is its parsed config.json."""
    from transformers import AutoConfig

    source = AutoConfig.for_model(**moe).to_dict()
    known = AutoConfig.for_model(family.dense).to_dict().keys() | set(family.carried)
    kept = {k: v for k, v in source.items() if k in known and k not in (*_RECORDED, "intermediate_size")}
    config = AutoConfig.for_model(family.dense, **kept, intermediate_size=source[family.width_field])
    config.dtype = source.get("dtype")
    config.architectures = [class_name(config)]
    return config


def _refuse_unknown(family: Family, source: dict[str, Any], known: set[str], where: str) -> None:
    for key, value in source.items():
        if key in known or key in _RECORDED:
            continue
        allowed = family.harmless.get(key, ())
        items = value if isinstance(value, list) else [value]
        if allowed is not None and any(item not in allowed for item in items):
            raise ArtifactError(
                f"{where}: config.json has {key} = {value!r}, which {family.moe} has no place for, so "
                "the merged model would compute something else."
            )


def published(family: Family, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A native MoE model's state dict under the published names.

    transformers 5 keeps the experts of a layer fused in memory as gate_up_proj (E, 2F, D) and down_proj (E, D, F). The
    names on disk, one tensor an expert (GraniteMoE: stacked), load in transformers 4 and 5, vLLM and llama.cpp. Views,
    no copies.
    """
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = LAYER.fullmatch(name)
        rest = match[2] if match else ""
        prefix = name.removesuffix(rest) if rest else ""
        if rest == f"{family.block}.{family.gate}.weight":
            out[prefix + family.router] = tensor
        elif rest == f"{family.block}.experts.gate_up_proj":
            out |= _unstacked(family, prefix, GATE, tensor)
        elif rest == f"{family.block}.experts.down_proj":
            out |= _unstacked(family, prefix, DOWN, tensor)
        else:
            out[name] = tensor
    return out


def _unstacked(family: Family, prefix: str, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts of one layer, (E, rows, columns), one by one where the family publishes them so."""
    if family.stacked:
        return {prefix + family.expert[kind]: tensor}
    if kind == DOWN:
        return {prefix + family.expert[DOWN].format(e=e): down for e, down in enumerate(tensor)}
    names = (family.expert[GATE], family.expert[UP])
    return {
        prefix + name.format(e=e): part
        for e, both in enumerate(tensor)
        for name, part in zip(names, both.chunk(2, dim=0), strict=True)
    }
