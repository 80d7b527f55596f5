"""An export has the tensors that the loaders of vLLM 0.33.0 read, under their names and in their shapes.

Nothing is run in vLLM. What is written here is what the source of that version asks for, in vllm/model_executor/models
(mixtral.py, qwen2_moe.py, qwen3_moe.py, qwen3_5.py, granitemoe.py, granitemoeshared.py, ernie45_moe.py, cohere2_moe.py,
lfm2_moe.py, gemma4.py) and, for experts, in layers/fused_moe (layer.py and routed_experts.py) beside them: three
tensors an expert, or all of a layer as (experts, 2 * width, hidden), halved along axis 1 into gate and up, and
(experts, hidden, width). registry.py finds the model by `architectures` and runs FlexOlmo and Hunyuan by the class of
transformers, whose experts it reads under either kind of names.

D hidden, F width of an expert, E experts, V vocabulary, H and K heads of queries and keys, each of h. In layers of
linear attention: N value heads, each of v; M widths of its values together, C of all that its convolution mixes. In
full layers of Gemma 4 a head is 2h wide; I what every layer adds to its input, P that of all layers, B the dense block.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.validate import read_config
from btx.export.portable import notes
from tests.portability.exports import export
from tests.support.models import config_of

ATTENTION = {
    "self_attn.q_proj.weight": "Hh D",
    "self_attn.k_proj.weight": "Kh D",
    "self_attn.v_proj.weight": "Kh D",
    "self_attn.o_proj.weight": "D Hh",
}
NORMS = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
BY_PROJECTION = {
    "mlp.gate.weight": "E D",
    "mlp.experts.{e}.gate_proj.weight": "F D",
    "mlp.experts.{e}.up_proj.weight": "F D",
    "mlp.experts.{e}.down_proj.weight": "D F",
}
LINEAR = {
    f"linear_attn.{name}": axes
    for name, axes in {
        "A_log": "N", "dt_bias": "N", "conv1d.weight": "C 1 conv", "norm.weight": "v", "out_proj.weight": "D M",
        "in_proj_qkv.weight": "C D", "in_proj_z.weight": "M D", "in_proj_b.weight": "N D", "in_proj_a.weight": "N D",
    }.items()
}  # fmt: skip
SHARED = {
    "mlp.shared_expert_gate.weight": "1 D",
    "mlp.shared_expert.gate_proj.weight": "S D",
    "mlp.shared_expert.up_proj.weight": "S D",
    "mlp.shared_expert.down_proj.weight": "D S",
}
MIXTRAL = ATTENTION | NORMS | {
    "block_sparse_moe.gate.weight": "E D",
    "block_sparse_moe.experts.{e}.w1.weight": "F D",
    "block_sparse_moe.experts.{e}.w3.weight": "F D",
    "block_sparse_moe.experts.{e}.w2.weight": "D F",
}  # fmt: skip
GATHERED = {
    "block_sparse_moe.router.weight": "E D",
    "block_sparse_moe.experts.gate_up_proj": "E 2F D",
    "block_sparse_moe.experts.down_proj": "E D F",
}
CONVOLUTION = {"conv.conv.weight": "D 1 cut", "conv.in_proj.weight": "3D D", "conv.out_proj.weight": "D D"}
OF_LFM2 = {name.replace("o_proj", "out_proj"): axes for name, axes in ATTENTION.items()} | {
    "self_attn.q_layernorm.weight": "h",
    "self_attn.k_layernorm.weight": "h",
}
NORMED = ATTENTION | {"self_attn.q_norm.weight": "h", "self_attn.k_norm.weight": "h"}
GEMMA_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
OF_GEMMA = (
    {f"{name}_layernorm.weight": "D" for name in GEMMA_NORMS}
    | {f"{name}.weight": "D" for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
                                          "pre_feedforward_layernorm_2", "post_per_layer_input_norm")}
    | {"mlp.gate_proj.weight": "B D", "mlp.up_proj.weight": "B D", "mlp.down_proj.weight": "D B"}
    | {"experts.gate_up_proj": "E 2F D", "experts.down_proj": "E D F"}
    | {"router.proj.weight": "E D", "router.scale": "D", "router.per_expert_scale": "E", "layer_scalar": "1"}
    | {"per_layer_input_gate.weight": "I D", "per_layer_projection.weight": "D I"}
)  # fmt: skip
LAYERS = {
    "ernie4_5": ATTENTION | NORMS | BY_PROJECTION | {"mlp.moe_statics.e_score_correction_bias": "1 E"},
    "cohere2": ATTENTION | BY_PROJECTION | {"input_layernorm.weight": "D"},
    "granite_swa": ATTENTION | NORMS | GATHERED | {"self_attn.sinks": "H"},
    "lfm2": {
        "operator_norm.weight": "D",
        "ffn_norm.weight": "D",
        "feed_forward.gate.weight": "E D",
        "feed_forward.expert_bias": "E",
        "feed_forward.experts.{e}.w1.weight": "F D",
        "feed_forward.experts.{e}.w3.weight": "F D",
        "feed_forward.experts.{e}.w2.weight": "D F",
    },
    "gemma4_text": OF_GEMMA,
    "hunyuan_v1_dense": ATTENTION | NORMS | {
        name.replace("gate.weight", "gate.wg.weight"): axes for name, axes in BY_PROJECTION.items()
    } | {
        "self_attn.query_layernorm.weight": "h",
        "self_attn.key_layernorm.weight": "h",
        "mlp.shared_mlp.gate_proj.weight": "F D",
        "mlp.shared_mlp.up_proj.weight": "F D",
        "mlp.shared_mlp.down_proj.weight": "D F",
    },
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "phi3": MIXTRAL,
    "qwen2": ATTENTION | NORMS | BY_PROJECTION | SHARED | {
        "self_attn.q_proj.bias": "Hh",
        "self_attn.k_proj.bias": "Kh",
        "self_attn.v_proj.bias": "Kh",
    },
    "qwen3_5_text": NORMS | BY_PROJECTION | SHARED,
    "qwen3": ATTENTION | NORMS | BY_PROJECTION | {"self_attn.q_norm.weight": "h", "self_attn.k_norm.weight": "h"},
    "olmo2": ATTENTION | BY_PROJECTION | {
        "self_attn.q_norm.weight": "Hh",
        "self_attn.k_norm.weight": "Kh",
        "post_attention_layernorm.weight": "D",
        "post_feedforward_layernorm.weight": "D",
    },
    "granite": ATTENTION | NORMS | {
        "block_sparse_moe.router.layer.weight": "E D",
        "block_sparse_moe.input_linear.weight": "E 2F D",
        "block_sparse_moe.output_linear.weight": "E D F",
    },
}  # fmt: skip
MIXERS = {  # by layer, where layers differ
    "lfm2": [CONVOLUTION, OF_LFM2],
    "gemma4_text": [NORMED, {name: axes.replace("h", "h'") for name, axes in NORMED.items()}],
    "qwen3_5_text": [
        LINEAR,
        ATTENTION
        | {"self_attn.q_proj.weight": "2Hh D", "self_attn.q_norm.weight": "h", "self_attn.k_norm.weight": "h"},
    ],
}
AROUND = {"model.embed_tokens.weight": "V D", "model.norm.weight": "D"}
MORE = {
    "gemma4_text": {
        "model.embed_tokens_per_layer.weight": "V P",
        "model.per_layer_model_projection.weight": "P D",
        "model.per_layer_projection_norm.weight": "I",
    }
}
ARCHITECTURE = {
    "llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "phi3": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM", "qwen3_5_text": "Qwen3_5MoeForCausalLM", "olmo2": "FlexOlmoForCausalLM",
    "granite": "GraniteMoeForCausalLM", "ernie4_5": "Ernie4_5_MoeForCausalLM", "cohere2": "Cohere2MoeForCausalLM",
    "granite_swa": "GraniteMoeSWAForCausalLM", "lfm2": "Lfm2MoeForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
    "hunyuan_v1_dense": "HunYuanMoEV1ForCausalLM",
}  # fmt: skip
BY_TRANSFORMERS = ("olmo2", "hunyuan_v1_dense")
UNTIED = ("llama", "mistral", "phi3", "olmo2")  # in tests/support/models.py; the others need no lm_head.weight
D, F, V, H, K, S, LAYER_COUNT = 32, 48, 300, 4, 2, 128, 2


def wanted(family: str, experts: int, head: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that the loader of a family's model reads, with its shape."""
    size = {
        "D": D,
        "F": F,
        "2F": 2 * F,
        "V": V,
        "E": experts,
        "S": S,
        "1": 1,
        "h": head,
        "Hh": H * head,
        "2Hh": 2 * H * head,
        "Kh": K * head,
        "N": 4,
        "v": 12,
        "M": 48,
        "C": 80,
        "conv": 4,
        "cut": 3,
        "3D": 3 * D,
        "H": H,
        "h'": 2 * head,
        "Hh'": 2 * H * head,
        "Kh'": 2 * K * head,
        "I": 8,
        "P": 8 * LAYER_COUNT,
        "B": 128,
    }
    found = AROUND | MORE.get(family, {}) | ({"lm_head.weight": "V D"} if family in UNTIED else {})
    if family == "lfm2":
        found["model.embedding_norm.weight"] = found.pop("model.norm.weight")
    for layer in range(LAYER_COUNT):
        for name, axes in (LAYERS[family] | MIXERS.get(family, [{}, {}])[layer]).items():
            found |= {f"model.layers.{layer}.{name.format(e=e)}": axes for e in range(experts)}
    return {name: tuple(size[axis] for axis in axes.split()) for name, axes in found.items()}


@pytest.mark.parametrize("family", sorted(LAYERS))
@pytest.mark.parametrize("experts", [2, 5])
def test_an_export_has_what_vllm_reads(tmp_path: Path, family: str, experts: int) -> None:
    folder = export(tmp_path / "export", family, experts=experts)
    head = {"mistral": 12, "qwen3": 12, "qwen3_5_text": 16, "ernie4_5": 12, "hunyuan_v1_dense": 12}.get(family, 8)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert found == wanted(family, experts, head)
    config = read_config(folder)
    assert config["architectures"] == [ARCHITECTURE[family]]
    said = " ".join(notes(config, "published", folder))
    assert ("vLLM 0.33.0 reads tensors of these names" in said) == (family not in BY_TRANSFORMERS)
    assert ("runs by transformers" in said) == (family in BY_TRANSFORMERS)


PROJECTIONS = [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
STACKED = {
    "granite": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "granite_swa": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    "gemma4_text": ("experts.gate_up_proj", "experts.down_proj"),
}


@pytest.mark.parametrize("family", sorted({*LAYERS} - {"phi3"}))  # which holds gate and up as one
def test_gate_up_and_down_are_where_vllm_looks_for_them(tmp_path: Path, family: str) -> None:
    folder = export(tmp_path / "export", family)
    moe = load_file(folder / "model.safetensors")
    dense = [load_file(tmp_path / f"export-parents/{n}/model.safetensors") for n in range(3)]
    prefix = "model.layers.1."
    for e, parent in enumerate(dense):
        names = [f"feed_forward.{w}" for w in ("w1", "w3", "w2")] if family == "lfm2" else PROJECTIONS
        gate, up, down = (parent[f"{prefix}{name}.weight"] for name in names)
        if family in STACKED:
            both, last = STACKED[family]
            found = [*(half[e] for half in moe[prefix + both].chunk(2, dim=1)), moe[prefix + last][e]]
        else:
            names = [name for name in LAYERS[family] if "{e}" in name]
            kinds = (
                ("w1", "w3", "w2") if family in ("llama", "mistral", "lfm2") else ("gate_proj", "up_proj", "down_proj")
            )
            found = [moe[prefix + n.format(e=e)] for k in kinds for n in names if n.endswith(f"{{e}}.{k}.weight")]
        assert all(torch.equal(a, b) for a, b in zip(found, (gate, up, down), strict=True))


@pytest.mark.parametrize("dense", ["qwen2", "granite", "granite_swa", "lfm2"])
def test_the_card_says_where_vllm_has_no_head_dim_of_its_own(tmp_path: Path, dense: str) -> None:
    folder = export(tmp_path / "export", dense, head_dim=12)
    assert "do not fit vLLM 0.33.0" in " ".join(notes(read_config(folder), "published", folder))


def test_the_card_says_what_vllm_ties_and_how_wide_it_takes_a_window(tmp_path: Path) -> None:
    for dense in ("cohere2", "lfm2"):
        folder = export(tmp_path / dense, dense, tie_word_embeddings=False)
        assert "vLLM 0.33.0 computes something else: it ties the head" in " ".join(
            notes(read_config(folder), "published", folder)
        )
    said = " ".join(notes(read_config(tmp_path / "cohere2"), "published", tmp_path / "cohere2"))
    assert "one token more" in said


def test_the_card_says_that_vllm_leaves_out_a_window_of_some_layers(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 16}
    for first, left_out in ((0, False), (1, True), (2, False)):
        config = config_of("qwen2", max_window_layers=first, **window).to_dict() | {"model_type": "qwen2_moe"}
        assert ("leaves out a sliding window" in " ".join(notes(config, "published", tmp_path))) == left_out
