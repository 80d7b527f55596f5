"""Pico models of every Mixture-of-Experts family, far from their initial symmetry."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.shapes import MOE, OWN, TOP_K

E = 4
SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": E, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES = (
    "mixtral", "qwen3_moe", "qwen2_moe", "flex_olmo", "granitemoe_swa", "ernie4_5_moe", "hunyuan_v1_moe",
    "cohere2_moe", "lfm2_moe", "gemma4_moe",
)  # fmt: skip
RULES = (("top_k", 2), ("switch", 1), ("soft", E), ("sample_top1", 1))
IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(5))


def build(family: str = "mixtral", *, k: int = 2, **changes: Any) -> Any:
    """A pico model whose weights are all far from their initial symmetry."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_experts_per_tok": k} | changes
    model: Any = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=E)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**(EXPERTS | shape), head_dim=8)),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**(EXPERTS | shape), shared_expert_intermediate_size=8)
        ),
        "flex_olmo": lambda: FlexOlmoForCausalLM(FlexOlmoConfig(**({"norm_topk_prob": True} | shape), num_experts=E)),
        "granitemoe": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**shape, num_local_experts=E)),
    }.get(family, lambda: _any(family, shape))()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # not a bias of the choice alone, which is zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return model


def _any(family: str, shape: dict[str, Any]) -> Any:
    """A model of a family by its type alone."""
    shape = dict(shape)
    own = {**MOE[family], **next((more for kind, more in OWN.items() if family.startswith(kind)), {})}
    own |= {name: E for name in ("num_experts", "num_local_experts", "moe_num_experts") if name in own}
    own |= {"moe_intermediate_size": 24} if "moe_intermediate_size" in own else {}
    own |= {TOP_K[family]: shape.pop("num_experts_per_tok")} if family in TOP_K else {}
    if "vocab_size_per_layer_input" in own:
        own["vocab_size_per_layer_input"] = shape["vocab_size"]
    if "layer_types" in own:
        own["layer_types"] = own["layer_types"][-shape["num_hidden_layers"] :]
    kind = family.replace("gemma4_moe", "gemma4_text")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **own}))


def use_checkpointing(model: nn.Module, *, reentrant: bool = False) -> int:
    """Enable gradient checkpointing as transformers does, by the attributes that its layers read."""
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and hasattr(m, "self_attn")]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    return len(layers)


def forward(model: Any, ids: Tensor = IDS, **options: Any) -> Any:
    return model(input_ids=ids, labels=ids, use_cache=False, **options)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
