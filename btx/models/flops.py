"""Counts a model's parameters, FLOPs and bytes, from its config alone.

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
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from btx.models.families import DENSE, MOE, WITH_ATTENTION, Family
from btx.recipe.settings import RunSettings, TrainSettings

Config = Mapping[str, Any]
Precision = Literal["bf16", "fp32"]

SAVED_OVER = 128  # tokens of the pass in which a layer of linear attention is watched: two chunks
PASS = 16_384  # tokens per pass when run.micro_batch is auto
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # required in every config


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


class Shape:
    """A native model on the meta device, and the sizes read off it."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.native: Any = AutoConfig.for_model(**config)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(self.native)
        kind = str(config["model_type"])
        self.family: Family | None = MOE.get(kind)
        self.attention_experts = kind == WITH_ATTENTION.moe

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return int(getattr(self.native, self.family.experts_field)) if self.family else 1

    @property
    def chosen(self) -> int:
        """Experts per token."""
        return int(self.native.num_experts_per_tok) if self.family else 1

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        found = getattr(self.native, "head_dim", None) or getattr(self.native, "kv_channels", None)
        return int(found or self.native.hidden_size // self.native.num_attention_heads)

    @property
    def projections(self) -> tuple[int, int]:
        """Widths of all query heads and of all key heads; values are as wide as keys."""
        heads = int(self.native.num_attention_heads)
        kv_heads = int(getattr(self.native, "num_key_value_heads", None) or heads)
        queries = kv_heads * self.chosen if self.attention_experts else heads
        return queries * self.head_dim, kv_heads * self.head_dim

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
        return Parameters(total, total - idle, embedding, 0 if tied else embedding)

    def gates(self, layer: nn.Module) -> bool:
        """Whether attention's output has a gate, which the query projection makes beside the queries."""
        query = next((m.weight for name, m in layer.named_modules() if name.endswith("self_attn.q_proj")), None)
        return query is not None and query.shape[0] == 2 * self.projections[0]

    def norm_width(self, layer: nn.Module) -> int:
        """Width of the query norm: one head's, or all heads'; 0 where there is none."""
        return next((m.weight.numel() for name, m in layer.named_modules() if name.endswith("q_norm")), 0)


def experts_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a native model that hold experts."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


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
    if shape.chosen > shape.experts:
        raise ValueError(f"config field num_experts_per_tok is {shape.chosen}, more than the {shape.experts} experts")
    return shape


def parameters(config: Config) -> Parameters:
    """Exact counts for a causal language model of a known family; errors as in `shape_of`."""
    return shape_of(config).parameters


def training_flops(config: Config, tokens: int) -> int:
    """6 · active parameters · tokens: 2 forward and 4 backward for each parameter and token.

    Recomputation under gradient checkpointing is not counted, nor is attention (`attention_flops`). The
    embedding table counts whole; 6 · (active - lookup) · tokens is the figure without what is only read.
    """
    return 6 * parameters(config).active * _tokens(tokens)


def attention_flops(config: Config, tokens: int, *, sequence: int, causal: bool = True) -> int:
    """Training FLOPs of Q Kᵀ and of the product with V: 12 · L · H · d_head · S a token, half if causal.

    `sequence` is S, the length attended over, in tokens. A forward pass alone is a third of it. L counts the layers
    that attend; those of linear attention take 18 · H · d_k · d_v a token, whatever S is.
    """
    shape = shape_of(config)
    linear = len(shape.linear)
    attending = int(shape.native.num_hidden_layers) - linear
    whole = 12 * attending * shape.projections[0] * sequence * _tokens(tokens)
    states = 18 * linear * shape.state * _tokens(tokens) if linear else 0
    return (whole // 2 if causal else whole) + states


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


def sequences_per_pass(settings: TrainSettings, where: RunSettings, processes: int = 1) -> int:
    """Sequences of a step that one process takes through the model at once: what run.micro_batch says, by default about
    16k tokens, whose hidden states are a few GB in a model of usual width; and never more than its part of the step."""
    auto = where.micro_batch == "auto"
    wanted = max(1, PASS // settings.sequence_length) if auto else int(where.micro_batch)
    return min(wanted, max(1, settings.batch_tokens // settings.sequence_length // processes))


def training_memory(config: Config, settings: TrainSettings, where: RunSettings) -> Memory:
    """`memory` of a training by its settings, on one device, in the passes that the loop takes."""
    return memory(
        config, batch=sequences_per_pass(settings, where), sequence=settings.sequence_length,
        precision="bf16" if settings.precision == "bf16" else "fp32", checkpointing=settings.gradient_checkpointing,
    )  # fmt: skip


def activation_bytes(config: Config, *, tokens: int, precision: Precision, checkpointing: bool) -> int:
    """Estimate of what the native classes save for the backward pass over `tokens` tokens, weights left out.

    Counted per token, as autograd keeps it under autocast with fp32 master weights, a fused attention that
    keeps no S x S matrix, and experts computed in the training precision: see `_layer_bytes`, and for the
    head the final norm and fp32 log-probabilities over the vocabulary. With `checkpointing`, every layer
    keeps its fp32 input alone, and one layer at a time everything. Transient buffers (gradients, workspaces)
    are not included.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; known: bf16, fp32")
    shape = shape_of(config)
    width, size = int(shape.native.hidden_size), 2 if precision == "bf16" else 4
    layers = [_layer_bytes(shape, layer, size) for layer in shape.model.base_model.layers]
    head = (8 + size) * width + 4 * int(shape.native.vocab_size)
    body = len(layers) * 4 * width + max(layers) if checkpointing else sum(layers)
    return _tokens(tokens) * (body + head)


def _layer_bytes(shape: Shape, layer: nn.Module, size: int) -> int:
    """Bytes per token that one layer saves, `size` bytes per element of a matrix product's operands.

    A norm keeps its input and its quotient in fp32, autocast one copy of a norm's output per product that
    reads it. Attention keeps Q, K, V, its output and a log-sum-exp per head; SwiGLU its gate, up, activation
    and product; each selected expert also its input, its output and 40 bytes of indices and weights, and the
    router its probabilities.
    """
    native, (queries, keys), k = shape.native, shape.projections, shape.chosen
    width = int(native.hidden_size)
    linear = hasattr(layer, "linear_attn")
    readers = 5 if size == 2 and not linear else 2  # q, k, v and gate, up; in fp32 each norm's readers share its output
    norms = 16 * width + readers * size * width
    attention = 2 * size * (queries + keys) + 4 * int(native.num_attention_heads)
    if linear:  # whose input is a copy per product in bf16, and what the norm keeps already in fp32
        attention = _saved(shape, size) - (0 if size == 2 else size * width)
    elif shape.gates(layer):  # the gate's sigmoid, and the output with it
        attention += 2 * size * queries
    if shape.attention_experts:  # inputs, outputs, queries and attended values of each, keys and values repeated
        attention += k * (size * (4 * width + 2 * keys) + 40) + 2 * (k - 1) * size * keys + 4 * shape.experts
    if over := shape.norm_width(layer):
        attention += (8 if over == queries else 4 + size) * (queries + keys)
    if shape.family is None or not experts_in(layer):
        return norms + attention + 4 * size * int(native.intermediate_size)
    chosen = size * (4 * int(getattr(native, shape.family.width_field)) + 2 * width) + 40
    experts = k * chosen + 4 * shape.experts
    if shape.family.shared:
        experts += size * (4 * int(getattr(native, shape.family.shared.width_field)) + width)
    return norms + attention + experts


@lru_cache(maxsize=8)
def _saved(shape: Shape, size: int) -> int:
    """Bytes per token that autograd keeps of a layer of linear attention, its input but no weights among them.

    A pass is run and watched: the form that the class computes keeps a matrix per chunk, which no short formula tells.
    """
    layer = shape.model.base_model.layers[shape.linear[0]].linear_attn
    module = copy.deepcopy(layer).to_empty(device="cpu")
    weights = {p.shape for p in module.parameters()} | {p.mT.shape for p in module.parameters() if p.ndim == 2}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.zeros(1, SAVED_OVER, int(shape.native.hidden_size), requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=size == 2),
    ):
        module(hidden)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // SAVED_OVER


def _tokens(tokens: int) -> int:
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; a count of tokens is not negative")
    return tokens
