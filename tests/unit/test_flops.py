"""Counts of parameters and FLOPs against built models, what torch counts, and published sizes."""

from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btx.models import flops
from btx.report.figures import human, human_count
from tests.support.shapes import DENSE, LLAMA2_7B, PICO, SPARSE, TOP_K, build

torch.set_num_threads(1)

BTX = LLAMA2_7B | {"model_type": "mixtral", "num_local_experts": 4}
MIXTRAL_8X7B = BTX | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip


def numel(model: Any, without: str = "\n") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if without not in name)


# --- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 7},
        {"attention_bias": True},
    ],
    ids=["plain", "tied", "grouped", "one layer", "bias"],
)
@pytest.mark.parametrize("model_type", DENSE + SPARSE)
def test_totals_are_those_of_the_built_model(model_type: str, changes: dict[str, Any]) -> None:
    if "num_hidden_layers" in changes and model_type.startswith(("lfm2", "gemma4")):
        changes = {**changes, "layer_types": ["full_attention"]}
    model, config = build(model_type, **changes)
    assert flops.parameters(config).total == numel(model)
    assert flops.parameters(config).embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_heads_may_be_wider_or_narrower_than_the_model(model_type: str) -> None:
    for head_dim in (6, 20):
        model, config = build(model_type, head_dim=head_dim, num_key_value_heads=2)
        assert flops.parameters(config).total == numel(model)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 1, 2]}],
    ids=["one dense", "every second", "all dense"],
)
def test_dense_layers_among_sparse_ones_are_counted_as_dense(model_type: str, changes: dict[str, Any]) -> None:
    model, config = build(model_type, **changes)
    assert flops.parameters(config).total == numel(model)


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {"mlp_bias": True}), ("qwen2_moe", {"qkv_bias": False})])
def test_the_biases_of_one_family_alone_are_counted(model_type: str, changes: dict[str, Any]) -> None:
    model, config = build(model_type, **changes)
    assert flops.parameters(config).total == numel(model)


@pytest.mark.parametrize("model_type", DENSE)
def test_absent_fields_mean_what_the_config_class_means(model_type: str) -> None:
    settings = {k: v for k, v in PICO.items() if k != "num_key_value_heads"} | {"num_attention_heads": 32}
    settings |= {"num_key_value_heads": None} if model_type == "olmo2" else {}
    settings |= {"head_dim": 8} if model_type == "hunyuan_v1_dense" else {}  # whose class takes no null
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    assert flops.parameters({"model_type": model_type} | settings).total == numel(model)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("model_type", SPARSE)
def test_active_leaves_out_exactly_the_experts_that_are_not_chosen(model_type: str, k: int) -> None:
    model, config = build(model_type, **{TOP_K.get(model_type, "num_experts_per_tok"): k})
    experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "conv" not in name)
    assert experts > 0
    assert flops.parameters(config).active == numel(model) - experts * (5 - k) // 5


@pytest.mark.parametrize("model_type", DENSE)
def test_every_parameter_of_a_dense_model_is_active(model_type: str) -> None:
    counts = flops.parameters(build(model_type)[1])
    assert counts.active == counts.total


def test_only_an_untied_embedding_is_mere_lookup() -> None:
    assert flops.parameters(build("llama")[1]).lookup == 51 * 32
    assert flops.parameters(build("llama", tie_word_embeddings=True)[1]).lookup == 0


def test_published_sizes_are_met() -> None:
    assert flops.parameters(LLAMA2_7B).total == 6_738_415_616
    assert flops.parameters(MIXTRAL_8X7B)[:2] == (46_702_792_704, 12_879_925_248)
    assert flops.parameters(QWEN3).total == 596_049_920  # Qwen3-0.6B
    counts = flops.parameters(QWEN3_30B_A3B)
    assert (human_count(counts.total), human_count(counts.active)) == ("30.5B", "3.35B")


def test_the_papers_active_parameters_for_four_experts_of_llama_2_7b() -> None:
    active = [flops.parameters(BTX | {"num_experts_per_tok": k}).active for k in (1, 2)]
    assert [round(count / 1e9, 1) for count in active] == [6.7, 11.1]
    assert active[0] - flops.parameters(LLAMA2_7B).total == 32 * 4 * 4096  # its routers


# --- FLOPs -------------------------------------------------------------------------------------------------


def test_training_costs_six_a_parameter_and_token() -> None:
    assert flops.training_flops(LLAMA2_7B, 1000) == 6 * 6_738_415_616 * 1000
    assert flops.training_flops(LLAMA2_7B, 0) == 0


def test_the_moe_stages_share_of_the_papers_compute() -> None:
    """23 % of BTX's compute was in the MoE stage: three experts trained, then 80B tokens of top-2."""
    experts = flops.training_flops(LLAMA2_7B, (201 + 210 + 42) * 10**9)
    finetune = flops.training_flops(BTX | {"num_experts_per_tok": 2}, 80 * 10**9)
    assert finetune / (experts + finetune) == pytest.approx(0.23, abs=0.006)


def test_attention_is_twelve_l_h_d_s_a_token_and_half_of_it_if_causal() -> None:
    whole = flops.attention_flops(LLAMA2_7B, 10, sequence=4096, causal=False)
    assert whole == 12 * 32 * 32 * 128 * 4096 * 10
    assert flops.attention_flops(LLAMA2_7B, 10, sequence=4096) == whole // 2
    grouped = flops.attention_flops(LLAMA2_7B | {"num_key_value_heads": 8}, 10, sequence=4096, causal=False)
    assert grouped == whole  # shared keys are multiplied as often


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("model_type", DENSE + SPARSE)
def test_a_third_of_training_without_lookup_is_what_torch_counts_of_a_forward_pass(
    model_type: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products take two FLOPs per parameter and token; norms and biases are not products.

    Linear attention runs as its recurrence, in which torch sees no products, and its convolution over its padding too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    for family in ("qwen3_5", "qwen3_5_moe"):
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)
    chosen = {TOP_K.get(model_type, "num_experts_per_tok"): k} if model_type in SPARSE else {}
    model, config = build(model_type, attn_implementation="eager", experts_implementation="eager", **chosen)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(16)[None], use_cache=False)
    counts, vectors = (
        flops.parameters(config),
        sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("correction_bias")),
    )
    products = 2 * (counts.active - counts.lookup - vectors) * 16
    assert flops.training_flops(config, 16) == 3 * (products + 2 * 16 * (counts.lookup + vectors))
    linear = 2 * model_type.startswith("qwen3_5")  # such layers
    states = linear * 3 * 2 * (4 * 6 * 10) * 16  # read, written and queried
    attention = flops.attention_flops(config, 16, sequence=16, causal=False) // 3 - states
    padding = linear * 2 * (2 * 2 * 6 + 4 * 10) * 4 * 3
    rope = counter.get_total_flops() - products - attention - padding  # rotary angles: one product per pass
    assert 0 <= rope <= 2 * 16 * config["hidden_size"]


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_bytes_are_those_of_a_saved_checkpoint(model_type: str, dtype: str, tmp_path: Any) -> None:
    from safetensors import safe_open

    model, config = build(model_type, tie_word_embeddings=model_type == "llama")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert flops.checkpoint_bytes(config, dtype) == stored


# --- figures for people, and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "si", "count"),
    [
        (0, "0 B", "0"),
        (7, "7 B", "7"),
        (999, "999 B", "999"),
        (999.6, "1 kB", "1k"),
        (1234, "1.23 kB", "1.23k"),
        (999_600, "1 MB", "1M"),
        (6_738_415_616, "6.74 GB", "6.74B"),
        (46_702_792_704, "46.7 GB", "46.7B"),
        (1.83e22, "18.3 ZB", "1.83e+10T"),
        (-2_500_000, "-2.5 MB", "-2.5M"),
    ],
)
def test_figures_have_three_digits_and_a_prefix(number: float, si: str, count: str) -> None:
    assert human(number, "B") == si
    assert human(number) == si.removesuffix("B").replace(" ", "")
    assert human_count(number) == count
