"""Estimates the bytes that training takes: weights, gradients, optimiser state and activations, from a config alone."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from btx.models.flops import Config, Shape, checked_tokens, experts_in, parameters, shape_of
from btx.recipe.settings import RunSettings, TrainSettings

Precision = Literal["bf16", "fp32"]
SAVED_OVER = 128  # tokens of the pass in which a layer of linear attention is watched: two chunks
PASS = 16_384  # tokens per pass when run.micro_batch is auto


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
    return checked_tokens(tokens) * (body + head)


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
