"""Counts a model's parameters, FLOPs and checkpoint bytes, from its config alone.

The native model is built on torch's meta device, without memory, and its own parameters are counted. Conventions, used
for every figure of the project:

- A model's *active* parameters are those that one token's forward pass visits, the embedding table included,
  as in the BTX paper's 6.7B and 11.1B for top-1 and top-2 (arXiv 2403.07816). Training costs 6 · active ·
  tokens FLOPs.
- Attention's products of activations with activations are not in that figure; `attention_flops` counts them
  separately.
- A layer of linear attention (a gated delta rule, arXiv 2412.06464) counts as its recurrence: per token and value head
  the state (keys x values) is read, written and queried, each 2 · d_k · d_v FLOPs forward; not as the chunked form that
  computes the same with more products.

What training takes in memory is in `btx.models.memory`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from btx.models.families import DENSE, MOE, mixture_family
from btx.models.family import Family
from btx.models.table import WITH_ATTENTION

Config = Mapping[str, Any]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # required in every config


class Parameters(NamedTuple):
    """Parameter counts of a model."""

    total: int  # all that a checkpoint stores, a tied output head once
    active: int  # all but the experts that a token does not visit
    embedding: int  # the input embedding table, vocabulary times width
    lookup: int  # tables that the head does not share: active, but read and never multiplied


class Shape:
    """A native model on the meta device, and the sizes read off it."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.native: Any = AutoConfig.for_model(**config)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(self.native)
        kind = str(config["model_type"])
        self.family: Family | None = mixture_family(self.native)
        self.attention_experts = kind == WITH_ATTENTION.moe

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return int(getattr(self.native, self.family.experts_field)) if self.family else 1

    @property
    def chosen(self) -> int:
        """Experts per token."""
        return int(getattr(self.native, self.family.top_k_field)) if self.family else 1

    @property
    def attended(self) -> int:
        """Widths of all query heads, added up over the layers that attend: of a token's queries, or of their values."""
        if self.attention_experts:
            return int(self.native.num_hidden_layers) * self.chosen * self.keys
        outputs = ("self_attn.o_proj", "self_attn.out_proj")
        return sum(m.in_features for name, m in self.model.named_modules() if name.endswith(outputs))

    @property
    def keys(self) -> int:
        """Width of all key heads of attention experts, each of which has as many query heads."""
        return int(self.native.num_key_value_heads * self.native.kv_channels)

    @cached_property
    def linear(self) -> list[int]:
        """The layers of linear attention."""
        kinds = getattr(self.native, "layer_types", None) or []
        return [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]

    @property
    def state(self) -> int:
        """Elements of the state of a layer of linear attention: value heads · key width · value width."""
        native = self.native
        return int(native.linear_num_value_heads * native.linear_key_head_dim * native.linear_value_head_dim)

    @cached_property
    def parameters(self) -> Parameters:
        """Counted on the model; experts are modules of a `...Experts` class, as in every native one."""
        total = sum(p.numel() for p in self.model.parameters())
        experts = sum(p.numel() for module in experts_in(self.model) for p in module.parameters())
        embedding = self.model.get_input_embeddings().weight.numel()
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        idle = experts * (self.experts - self.chosen) // self.experts
        of_layers = getattr(self.model.base_model, "embed_tokens_per_layer", None)  # a second table, for all layers
        looked_up = of_layers.weight.numel() if of_layers is not None else 0
        return Parameters(total, total - idle, embedding, looked_up + (0 if tied else embedding))


def experts_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a native model that hold experts."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def modules_in(config: Config) -> list[str]:
    """The names of all modules of a config's native model that have a weight, such as model.layers.0.mlp.down_proj."""
    from btx.models.native import native_config

    named = Shape(native_config(dict(config), "the model").to_dict()).model.state_dict()
    return [name.removesuffix(".weight") for name in named if name.endswith(".weight")]


def shape_of(config: Config) -> Shape:
    """The model of a config; ValueError for an unknown `model_type`, or a field that is absent or out of range."""
    return _shape(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _shape(text: str) -> Shape:
    config = json.loads(text)
    kind = config.get("model_type")
    if kind not in DENSE and kind not in MOE:
        raise ValueError(f"unknown model_type {kind!r}; known: {', '.join((*DENSE, *MOE))}")
    for field in FIELDS:
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config field {field} is {value!r}; a {kind} needs a positive integer")
    shape = Shape(config)
    if shape.family and shape.chosen > shape.experts:
        raise ValueError(
            f"config field {shape.family.top_k_field} is {shape.chosen}, more than the {shape.experts} experts"
        )
    return shape


def parameters(config: Config) -> Parameters:
    """Exact counts for a causal language model of a known family; errors as in `shape_of`."""
    return shape_of(config).parameters


def training_flops(config: Config, tokens: int) -> int:
    """6 · active parameters · tokens: 2 forward and 4 backward for each parameter and token.

    Recomputation under gradient checkpointing is not counted, nor is attention (`attention_flops`). The
    embedding table counts whole; 6 · (active - lookup) · tokens is the figure without what is only read.
    """
    return 6 * parameters(config).active * checked_tokens(tokens)


def attention_flops(config: Config, tokens: int, *, sequence: int, causal: bool = True) -> int:
    """Training FLOPs of Q Kᵀ and of the product with V: 12 · L · H · d_head · S a token, half if causal.

    `sequence` is S, the length attended over, in tokens. A forward pass alone is a third of it. L · H · d_head is taken
    over the layers that attend; those of linear attention take 18 · H · d_k · d_v a token, whatever S is.
    """
    shape = shape_of(config)
    linear = len(shape.linear)
    whole = 12 * shape.attended * sequence * checked_tokens(tokens)
    states = 18 * linear * shape.state * checked_tokens(tokens) if linear else 0
    return (whole // 2 if causal else whole) + states


def checkpoint_bytes(config: Config, dtype: str) -> int:
    """Bytes of the tensors of a checkpoint in `dtype`: "bfloat16", "float16", "float32" or "float64"."""
    if dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(BYTES)}")
    return parameters(config).total * BYTES[dtype]


def checked_tokens(tokens: int) -> int:
    """A count of tokens; ValueError for a negative one."""
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; a count of tokens is not negative")
    return tokens
