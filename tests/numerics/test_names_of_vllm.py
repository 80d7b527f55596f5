"""An export has the tensors that the loaders of vLLM 0.33.0 read, under their names and in their shapes.

Nothing is run in vLLM. What is written here is what the source of that version asks for, in vllm/model_executor/models
(mixtral.py, qwen2_moe.py, qwen3_moe.py, qwen3_5.py, granitemoe.py) and, for experts, in layers/fused_moe (layer.py and
routed_experts.py) beside them: three tensors an expert, or all of a layer as (experts, 2 * width, hidden), halved along
axis 1 into gate and up, and (experts, hidden, width). registry.py finds the model by `architectures` and runs FlexOlmo
by the class of transformers, whose experts it reads under either kind of names.

D hidden, F width of an expert, E experts, V vocabulary, H and K heads of queries and keys, each of h. In layers of
linear attention: N value heads, each of v; M widths of its values together, C of all that its convolution mixes.
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
LAYERS = {
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
    "qwen3_5_text": [
        LINEAR,
        ATTENTION
        | {"self_attn.q_proj.weight": "2Hh D", "self_attn.q_norm.weight": "h", "self_attn.k_norm.weight": "h"},
    ]
}
AROUND = {"model.embed_tokens.weight": "V D", "model.norm.weight": "D"}
ARCHITECTURE = {
    "llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "phi3": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM", "qwen3_5_text": "Qwen3_5MoeForCausalLM", "olmo2": "FlexOlmoForCausalLM",
    "granite": "GraniteMoeForCausalLM",
}  # fmt: skip
TIED = ("qwen2", "qwen3", "qwen3_5_text", "granite")  # in tests/support/models.py; these need no lm_head.weight
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
    }
    found = AROUND | ({} if family in TIED else {"lm_head.weight": "V D"})
    for layer in range(LAYER_COUNT):
        for name, axes in (LAYERS[family] | MIXERS.get(family, [{}, {}])[layer]).items():
            found |= {f"model.layers.{layer}.{name.format(e=e)}": axes for e in range(experts)}
    return {name: tuple(size[axis] for axis in axes.split()) for name, axes in found.items()}


@pytest.mark.parametrize("family", sorted(LAYERS))
@pytest.mark.parametrize("experts", [2, 5])
def test_an_export_has_what_vllm_reads(tmp_path: Path, family: str, experts: int) -> None:
    folder = export(tmp_path / "export", family, experts=experts)
    head = {"mistral": 12, "qwen3": 12, "qwen3_5_text": 16}.get(family, 8)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert found == wanted(family, experts, head)
    config = read_config(folder)
    assert config["architectures"] == [ARCHITECTURE[family]]
    said = " ".join(notes(config, "published", folder))
    assert ("vLLM 0.33.0 reads tensors of these names" in said) == (family != "olmo2")
    assert ("runs by transformers" in said) == (family == "olmo2")


@pytest.mark.parametrize("family", sorted({*LAYERS} - {"phi3"}))  # which holds gate and up as one
def test_gate_up_and_down_are_where_vllm_looks_for_them(tmp_path: Path, family: str) -> None:
    folder = export(tmp_path / "export", family)
    moe = load_file(folder / "model.safetensors")
    dense = [load_file(tmp_path / f"export-parents/{n}/model.safetensors") for n in range(3)]
    prefix = "model.layers.1."
    for e, parent in enumerate(dense):
        gate, up, down = (parent[f"{prefix}mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        if family == "granite":
            halves = moe[f"{prefix}block_sparse_moe.input_linear.weight"].chunk(2, dim=1)
            found = [*(half[e] for half in halves), moe[f"{prefix}block_sparse_moe.output_linear.weight"][e]]
        else:
            names = LAYERS[family].keys() & {*BY_PROJECTION, *MIXTRAL}
            kinds = ("w1", "w3", "w2") if family in ("llama", "mistral") else ("gate_proj", "up_proj", "down_proj")
            found = [moe[prefix + n.format(e=e)] for k in kinds for n in names if n.endswith(f"{{e}}.{k}.weight")]
        assert all(torch.equal(a, b) for a, b in zip(found, (gate, up, down), strict=True))


@pytest.mark.parametrize("dense", ["qwen2", "granite"])
def test_the_card_says_where_vllm_has_no_head_dim_of_its_own(tmp_path: Path, dense: str) -> None:
    folder = export(tmp_path / "export", dense, head_dim=12)
    assert "do not fit vLLM 0.33.0" in " ".join(notes(read_config(folder), "published", folder))


def test_the_card_says_that_vllm_leaves_out_a_window_of_some_layers(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 16}
    for first, left_out in ((0, False), (1, True), (2, False)):
        config = config_of("qwen2", max_window_layers=first, **window).to_dict() | {"model_type": "qwen2_moe"}
        assert ("leaves out a sliding window" in " ".join(notes(config, "published", tmp_path))) == left_out
