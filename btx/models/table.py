"""The table of families, as data: which dense family becomes which Mixture-of-Experts family, and which none.

A family is here only when N copies of a dense model make an MoE with the same logits ("exact").
"""

from __future__ import annotations

from btx.models.family import ANY, DOWN, GATE, KEY, QUERY, UP, VALUE, AttentionExperts, Constant, Family, SharedExpert

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


def _several_shared(count_field: str) -> SharedExpert:
    """Shared experts without a gate, as one block beside the routed ones, as many as a config field says."""
    names = {kind: kind.replace("mlp.", "mlp.shared_experts.") for kind in (GATE, UP, DOWN)}
    return SharedExpert(names, count_field=count_field)


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
        dense="phi3",
        moe="mixtral",
        expert=_MIXTRAL,
        router="block_sparse_moe.gate.weight",
        experts_field="num_local_experts",
        width_field="intermediate_size",
        carried=("head_dim",),
        rotates_parts=False,
        parts={"self_attn.qkv_proj.weight": (QUERY, KEY, VALUE), "mlp.gate_up_proj.weight": (GATE, UP)},
        harmless={"resid_pdrop": ANY, "embd_pdrop": ANY, "original_max_position_embeddings": ANY},
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
    Family(
        dense="granite_swa",
        moe="granitemoe_swa",
        expert={
            GATE: "block_sparse_moe.experts.gate_up_proj",
            UP: "block_sparse_moe.experts.gate_up_proj",
            DOWN: "block_sparse_moe.experts.down_proj",
        },
        router="block_sparse_moe.router.weight",
        experts_field="num_local_experts",
        width_field="intermediate_size",
        block="block_sparse_moe",
        gate="router",
        fixed={"shared_intermediate_size": 0},
        carried=("head_dim",),
        harmless={"mlp_bias": (False,)},
    ),
    Family(
        dense="ernie4_5",
        moe="ernie4_5_moe",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="moe_num_experts",
        width_field="moe_intermediate_size",
        top_k_field="moe_k",
        fixed={
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        },
        carried=("head_dim",),
        shared=_several_shared("moe_num_shared_experts"),
        constants={
            "mlp.moe_statics.e_score_correction_bias": Constant(
                (1, "E"), 0.0, "mlp.gate.moe_statics.e_score_correction_bias", shared_out=True
            )
        },
    ),
    Family(
        dense="hunyuan_v1_dense",
        moe="hunyuan_v1_moe",
        expert=_QWEN,
        router="mlp.gate.wg.weight",
        experts_field="num_experts",
        width_field="intermediate_size",
        top_k_field="moe_topk",
        gate="gate.wg",
        carried=("head_dim",),
        shared=SharedExpert({kind: kind.replace("mlp.", "mlp.shared_mlp.") for kind in (GATE, UP, DOWN)}),
    ),
    Family(
        dense="lfm2",
        moe="lfm2_moe",
        expert={
            GATE: "feed_forward.experts.{e}.w1.weight",
            UP: "feed_forward.experts.{e}.w3.weight",
            DOWN: "feed_forward.experts.{e}.w2.weight",
        },
        router="feed_forward.gate.weight",
        experts_field="num_experts",
        width_field="moe_intermediate_size",
        norms=("ffn_norm.weight",),
        carried=("head_dim",),
        block="feed_forward",
        scores="sigmoid",
        constants={"feed_forward.expert_bias": Constant(("E",), 0.0, switch="use_expert_bias")},
        fixed={"num_dense_layers": 0, "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        parts={f"feed_forward.{w}.weight": (kind,) for w, kind in (("w1", GATE), ("w3", UP), ("w2", DOWN))},
        harmless={  # the first three decide the width alone, and the last is in layer_types
            "block_auto_adjust_ff_dim": ANY,
            "block_ffn_dim_multiplier": ANY,
            "block_multiple_of": ANY,
            "full_attn_idxs": ANY,
        },
        extracted={"block_auto_adjust_ff_dim": False},
    ),
    Family(
        dense="gemma4_text",
        moe="gemma4_text",
        expert={GATE: "experts.gate_up_proj", UP: "experts.gate_up_proj", DOWN: "experts.down_proj"},
        router="router.proj.weight",
        experts_field="num_experts",
        width_field="moe_intermediate_size",
        top_k_field="top_k_experts",
        norms=("pre_feedforward_layernorm.weight",),
        block="",
        gate="router.proj",
        fixed={"enable_moe_block": True, "use_double_wide_mlp": False},
        carried=("per_layer_config",),
        shared=SharedExpert({kind: kind for kind in (GATE, UP, DOWN)}, width_field="intermediate_size"),
        copies={"pre_feedforward_layernorm_2.weight": "pre_feedforward_layernorm.weight"},
        input_scale="router.scale",
        constants={
            "post_feedforward_layernorm_1.weight": Constant(("D",), 1.0),
            "post_feedforward_layernorm_2.weight": Constant(("D",), 1.0),
            "router.per_expert_scale": Constant(("E",), 1.0),
        },
        extracted={"enable_moe_block": False}
        | dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size")),
        switch="enable_moe_block",
    ),
    Family(
        dense="cohere2",
        moe="cohere2_moe",
        expert=_QWEN,
        router="mlp.gate.weight",
        experts_field="num_experts",
        width_field="intermediate_size",
        norms=("input_layernorm.weight",),
        fixed={
            "first_k_dense_replace": 0,
            "shared_expert_combination_strategy": "sum",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "rms_norm_eps": None,
        },
        shared=_several_shared("num_shared_experts"),
        scores="expert_selection_fn",
        carried=("head_dim", "rope_parameters"),
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
REFUSED = {
    "gemma4": "its checkpoint sees and hears too; take its language model out (btx import FOLDER NEW_FOLDER) and "
    "name that",
    "glm4": "no MoE class of transformers has its norms after attention and feed-forward block "
    "(post_self_attn_layernorm, post_mlp_layernorm)",
    "exaone4": "exaone_moe normalises what goes into its blocks, exaone4 what comes out (post_feedforward_layernorm)",
    "gemma": "no MoE class of transformers has its norms, its scaled embedding and its activation together",
    "gemma2": "the one MoE class of transformers with its four norms a layer, Gemma 4's, caps no attention logits",
    "gemma3_text": "the one MoE class of transformers with its four norms a layer, Gemma 4's, normalises values too "
    "(v_norm)",
    "olmo": "no MoE class of transformers has its norms without weights",
    "ministral": "btx has no exact MoE target with its mix of sliding and full layers (a mistral that states "
    "layer_types is read as one; if all of its layers slide, remove that key, and if none does, set "
    "sliding_window: null too)",
    "olmo3": "no MoE class of transformers has its norms and its mix of sliding and full layers",
}
