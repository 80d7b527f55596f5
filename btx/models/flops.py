"""The ledger of compute: parameters, FLOPs and bytes of a model, from its config alone.

Plain integers from the dict of a Hugging Face `config.json`; torch is not imported, so that a plan costs
nothing. Conventions, used for every figure of the project:

- A model's *active* parameters are those that one token's forward pass visits, the embedding table included,
  as in the BTX paper's 6.7B and 11.1B for top-1 and top-2 (arXiv 2403.07816). Training costs 6 · active ·
  tokens FLOPs.
- Attention's products of activations with activations are not in that figure; `attention_flops` states them
  apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Config = Mapping[str, Any]
Precision = Literal["bf16", "fp32"]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Family:
    """How one `model_type` is counted; a bias that is a str is the name of the config field that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["none", "head", "full"] = "none"  # over one head's width, or over all heads at once
    head_field: str = "head_dim"  # field with the width of a head
    head_dim: int | None = None  # of the config class, where the field is absent; None: hidden_size / heads
    kv_heads: int | None = None  # likewise; None: as many as attention heads
    expert_width: str | None = None  # field with the width of an expert; None: a dense family
    shared_expert: bool = False
    attention_experts: bool = False  # query and output projections are experts too, with a router, and two biases
    dense_layers: bool = False  # obeys mlp_only_layers and decoder_sparse_step


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(kv_heads=8),
    "mixtral": Family(kv_heads=8, expert_width="intermediate_size"),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", expert_width="moe_intermediate_size", shared_expert=True, dense_layers=True
    ),
    "qwen3": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", head_dim=128, kv_heads=32
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", kv_heads=4,
        expert_width="moe_intermediate_size", dense_layers=True,
    ),
    "olmo2": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="full"),
    "flex_olmo": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="full",
        expert_width="intermediate_size",
    ),
    "granite": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "granitemoe": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", expert_width="intermediate_size"
    ),
    "jetmoe": Family(head_field="kv_channels", expert_width="intermediate_size", attention_experts=True),
}  # fmt: skip


class Parameters(NamedTuple):
    """Parameter counts of a model."""

    total: int  # all that a checkpoint stores, a tied output head once
    active: int  # all but the experts that a token does not visit
    embedding: int  # the input embedding table, vocabulary times width
    lookup: int  # that table again if the head does not share it: active, but read and never multiplied


class Memory(NamedTuple):
    """Bytes of training state, for one replica that is not sharded."""

    weights: int  # fp32 master
    gradients: int  # fp32
    moments: int  # AdamW's two, fp32
    copies: int  # bf16 weights for the matrix products, if training in bf16
    activations: int  # estimate of what the backward pass needs, see `activation_bytes`

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


def parameters(config: Config) -> Parameters:
    """Exact counts for a causal language model of a known family.

    ValueError for another `model_type`, naming the known ones, or a field that is absent or out of range.
    """
    family = _family(config)
    width, layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    embedding = _count(config, "vocab_size") * width
    tied = bool(config.get("tie_word_embeddings", False))
    common = layers * (_attention(config, family) + 2 * width) + width + embedding * (1 if tied else 2)
    sparse = sum(_is_sparse(config, family, layer) for layer in range(layers))
    stored = used = 0
    if sparse < layers:
        stored = used = (layers - sparse) * _mlp(config, family, "intermediate_size")
    if sparse:
        extra = _router_and_shared(config, family)
        expert = _mlp(config, family, str(family.expert_width))
        if family.attention_experts:  # _attention has counted K of them
            one = 2 * width * _projections(config, family)[1]
            stored += sparse * (_experts(config) - _chosen(config)) * one
        stored += sparse * (extra + _experts(config) * expert)
        used += sparse * (extra + _chosen(config) * expert)
    return Parameters(common + stored, common + used, embedding, 0 if tied else embedding)


def _attention(config: Config, family: Family) -> int:
    width, (queries, keys) = _count(config, "hidden_size"), _projections(config, family)
    total = 2 * width * (queries + keys)
    total += (queries + 2 * keys) * _has(config, family.qkv_bias) + width * _has(config, family.output_bias)
    norms = {"none": 0, "head": 2 * _head_dim(config, family), "full": queries + keys}
    return total + norms[family.qk_norm]


def _projections(config: Config, family: Family) -> tuple[int, int]:
    """Widths of all query heads and of all key heads; values are as wide as keys."""
    head_dim, heads = _head_dim(config, family), _count(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads", family.kv_heads) or heads
    queries = int(kv_heads) * _chosen(config) if family.attention_experts else heads
    return queries * head_dim, int(kv_heads) * head_dim


def _head_dim(config: Config, family: Family) -> int:
    given = config.get(family.head_field, family.head_dim)
    return int(given) if given else _count(config, "hidden_size") // _count(config, "num_attention_heads")


def _mlp(config: Config, family: Family, field: str) -> int:
    """Gate, up and down projections of a SwiGLU block whose width is in `field`."""
    width, inner = _count(config, "hidden_size"), _count(config, field)
    return 3 * width * inner + (2 * inner + width) * _has(config, family.mlp_bias)


def _router_and_shared(config: Config, family: Family) -> int:
    width = _count(config, "hidden_size")
    router = _experts(config) * width
    if family.attention_experts:
        return 2 * (router + width)  # one for attention, one for the feed-forward; a bias beside each
    if not family.shared_expert:
        return router
    return router + _mlp(config, family, "shared_expert_intermediate_size") + width  # and its gate, width → 1


def _is_sparse(config: Config, family: Family, layer: int) -> bool:
    if family.expert_width is None:
        return False
    if not family.dense_layers:
        return True
    step = int(config.get("decoder_sparse_step", 1))
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


def training_flops(config: Config, tokens: int) -> int:
    """6 · active parameters · tokens: 2 forward and 4 backward for each parameter and token.

    Recomputation under gradient checkpointing is not counted, nor is attention (`attention_flops`). The
    embedding table counts whole; 6 · (active - lookup) · tokens is the figure without what is only read.
    """
    return 6 * parameters(config).active * _tokens(tokens)


def forward_flops(config: Config, tokens: int) -> int:
    """2 · active parameters · tokens: evaluation, or generation of `tokens` tokens, without attention."""
    return 2 * parameters(config).active * _tokens(tokens)


def attention_flops(config: Config, tokens: int, *, sequence: int, causal: bool = True) -> int:
    """Training FLOPs of Q Kᵀ and of the product with V: 12 · L · H · d_head · S a token, half if causal.

    `sequence` is S, the length attended over, in tokens. A forward pass alone is a third of it.
    """
    queries, _ = _projections(config, _family(config))
    whole = 12 * _count(config, "num_hidden_layers") * queries * sequence * _tokens(tokens)
    return whole // 2 if causal else whole


def checkpoint_bytes(config: Config, dtype: str) -> int:
    """Bytes of the tensors of a checkpoint in `dtype`: "bfloat16", "float16", "float32" or "float64"."""
    if dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(BYTES)}")
    return parameters(config).total * BYTES[dtype]


def memory(config: Config, *, batch: int, sequence: int, precision: Precision, checkpointing: bool) -> Memory:
    """Bytes to train every parameter with AdamW, in mixed bf16 or in fp32, on `batch` · `sequence` tokens.

    State is 16 bytes a parameter, 18 with bf16 copies. Activations are an estimate, see `activation_bytes`.
    """
    total = parameters(config).total
    return Memory(
        weights=4 * total,
        gradients=4 * total,
        moments=8 * total,
        copies=2 * total if precision == "bf16" else 0,
        activations=activation_bytes(config, tokens=batch * sequence, precision=precision, checkpointing=checkpointing),
    )


def activation_bytes(config: Config, *, tokens: int, precision: Precision, checkpointing: bool) -> int:
    """Estimate of what the native classes save for the backward pass over `tokens` tokens, weights left out.

    Counted per token, as autograd keeps it under autocast with fp32 master weights, a fused attention that
    keeps no S x S matrix, and experts computed in the training precision: see `_layer_bytes`, and for the
    head the final norm and fp32 log-probabilities over the vocabulary. With `checkpointing`, every layer
    keeps its fp32 input alone and one layer at a time is whole. Buffers that live for a moment only
    (gradients, workspaces) are not in it.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; known: bf16, fp32")
    family, width = _family(config), _count(config, "hidden_size")
    size = 2 if precision == "bf16" else 4
    depth = _count(config, "num_hidden_layers")
    layers = [_layer_bytes(config, family, layer, size) for layer in range(depth)]
    head = (8 + size) * width + 4 * _count(config, "vocab_size")
    body = depth * 4 * width + max(layers) if checkpointing else sum(layers)
    return _tokens(tokens) * (body + head)


def _layer_bytes(config: Config, family: Family, layer: int, size: int) -> int:
    """Bytes a token that one layer saves, `size` bytes to each element of a matrix product's operands.

    A norm keeps its input and its quotient in fp32, autocast one copy of a norm's output per product that
    reads it. Attention keeps Q, K, V, its output and a log-sum-exp a head; SwiGLU its gate, up, activation
    and product; each chosen expert moreover its input, its output and 40 bytes of indices and weights, and
    the router its probabilities.
    """
    width, (queries, keys) = _count(config, "hidden_size"), _projections(config, family)
    readers = 5 if size == 2 else 2  # q, k, v and gate, up; in fp32 each norm's readers share its output
    norms = 16 * width + readers * size * width
    attention = 2 * size * (queries + keys) + 4 * _count(config, "num_attention_heads")
    if family.attention_experts:  # inputs, outputs, queries and attended values of each, keys and values repeated
        k = _chosen(config)
        attention += k * (size * (4 * width + 2 * keys) + 40) + 2 * (k - 1) * size * keys + 4 * _experts(config)
    attention += {"none": 0, "head": 4 + size, "full": 8}[family.qk_norm] * (queries + keys)
    if not _is_sparse(config, family, layer):
        return norms + attention + 4 * size * _count(config, "intermediate_size")
    chosen = size * (4 * _count(config, str(family.expert_width)) + 2 * width) + 40
    experts = _chosen(config) * chosen + 4 * _experts(config)
    if family.shared_expert:
        experts += size * (4 * _count(config, "shared_expert_intermediate_size") + width)
    return norms + attention + experts


def _family(config: Config) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _count(config: Config, field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config field {field} is {value!r}; a {config.get('model_type')} needs a positive integer")
    return value


def _experts(config: Config) -> int:
    """The number of experts, under either of its published names."""
    return _count(config, "num_local_experts" if "num_local_experts" in config else "num_experts")


def _chosen(config: Config) -> int:
    chosen = _count(config, "num_experts_per_tok")
    if chosen > _experts(config):
        raise ValueError(f"config field num_experts_per_tok is {chosen}, more than the {_experts(config)} experts")
    return chosen


def _has(config: Config, bias: bool | str) -> int:
    absent = bias == "qkv_bias"  # the one such field that is on in its config class
    return int(bool(config.get(bias, absent) if isinstance(bias, str) else bias))


def _tokens(tokens: int) -> int:
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; a count of tokens is not negative")
    return tokens
