"""Estimates the bytes that training takes: weights, gradients, optimiser state and activations, from a config alone."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from btx.models.flops import Config, Shape, experts_in, parameters, shape_of
from btx.recipe.settings import RunSettings, TrainSettings

Precision = Literal["bf16", "fp32"]
PRECISIONS = ("bf16", "fp32")
COPIES = {f"{op}Backward0" for op in ("ToCopy", "T", "Transpose", "View")}  # autograd's names of casts and views
FUSED, OUTSIDE = "btx_watched", -1  # the name of the attention that is watched; what lies outside of all layers
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
        activations=activation_bytes(
            config, batch=batch, sequence=sequence, precision=precision, checkpointing=checkpointing
        ),
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


def activation_bytes(config: Config, *, batch: int, sequence: int, precision: Precision, checkpointing: bool) -> int:
    """Estimate of what the native classes save for the backward pass over `batch` · `sequence` tokens, without weights.

    A pass over one sequence is run on tensors without storage, and what autograd keeps of it is added up; attention is
    taken to be fused, where the class can have it, and keeps no S x S matrix. Experts are left out of that pass and
    reckoned in the training precision: SwiGLU's gate, up, activation and product, the input and output of each selected
    one, and 40 bytes of indices and weights. With `checkpointing`, every layer keeps its fp32 input alone, and one at a
    time everything. Transient buffers (gradients, workspaces) are not included.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if batch < 0 or sequence < 0:
        raise ValueError(f"batch {batch} or sequence {sequence} is negative")
    if not batch or not sequence:
        return 0
    shape = shape_of(config)
    layers, rest = _watched(shape, sequence, precision)
    kept = [seen + sequence * _experts(shape, layer, precision)
            for seen, layer in zip(layers, shape.model.base_model.layers, strict=True)]  # fmt: skip
    inputs = len(kept) * sequence * 4 * int(shape.native.hidden_size)
    return batch * (rest + (inputs + max(kept) if checkpointing else sum(kept)))


def _experts(shape: Shape, layer: nn.Module, precision: Precision) -> int:
    """Bytes per token that the experts of a layer save; 0 for a dense layer."""
    if shape.family is None or not experts_in(layer):
        return 0
    native, size, k = shape.native, 2 if precision == "bf16" else 4, shape.chosen
    width, inner = int(native.hidden_size), int(getattr(native, shape.family.width_field))
    found = k * (size * (4 * inner + 2 * width) + 40)
    if not shape.attention_experts:
        return found
    # instead of one dense block; and inputs, outputs, queries and attended values of each, keys and values repeated
    keys = shape.keys
    dense = 4 * size * inner
    attention = k * (size * (4 * width + 2 * keys) + 40) + 2 * (k - 1) * size * keys + 8 * shape.experts
    return found - dense + attention


@lru_cache(maxsize=16)
def _watched(shape: Shape, sequence: int, precision: Precision) -> tuple[list[int], int]:
    """Bytes that a pass over one sequence saves in each layer, without experts, and outside of all layers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(FUSED, _fused)
    config = copy.deepcopy(_without_experts_of_attention(shape))
    fused = getattr(type(shape.model), "_supports_sdpa", False)
    kept: dict[int, tuple[int, Tensor]] = {}
    inside, common = [OUTSIDE], set[int]()  # storages that all layers share, such as those of positions
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # of kernels that are slow here
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=FUSED if fused else "eager")
            weights = {p.untyped_storage()._cdata for p in model.parameters()}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()._cdata
                if storage not in weights and not _is_weight(tensor):
                    kept.setdefault(storage, (inside[0], tensor))
                return tensor

            def enter(number: int, _layer: nn.Module, args: Any, more: Any) -> None:
                inside[0] = number
                common.update(t.untyped_storage()._cdata for t in tree_leaves((args[1:], more)) if torch.is_tensor(t))

            for number, layer in enumerate(model.base_model.layers):
                layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
                layer.register_forward_hook(lambda *_args: inside.__setitem__(0, OUTSIDE))
            for experts in experts_in(model):
                experts.forward = _nothing  # which experts are chosen is not known without values
            ids = torch.zeros(1, sequence, dtype=torch.long)
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            ):
                model.train()(input_ids=ids, labels=ids, use_cache=False)
    finally:
        logging.disable(before)
    found = [0] * (len(model.base_model.layers) + 1)
    for storage, (number, tensor) in kept.items():
        found[OUTSIDE if storage in common else number] += tensor.untyped_storage().nbytes()
    return found[:-1], found[-1]


def _is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a weight's copy, as autocast makes them, or a view of one."""
    step: Any = tensor.grad_fn
    while step is not None and step.name() in COPIES:
        step = step.next_functions[0][0]
    return step is not None and "AccumulateGrad" in step.name()


def _without_experts_of_attention(shape: Shape) -> Any:
    """The config that is watched: of JetMoE, whose loops go by values, that of a Llama of its sizes."""
    if not shape.attention_experts:
        return shape.native
    from transformers import LlamaConfig

    native = shape.native
    return LlamaConfig(
        vocab_size=native.vocab_size, hidden_size=native.hidden_size, intermediate_size=native.intermediate_size,
        num_hidden_layers=native.num_hidden_layers, num_attention_heads=native.num_key_value_heads,
        num_key_value_heads=native.num_key_value_heads, head_dim=native.kv_channels,
        tie_word_embeddings=native.tie_word_embeddings,
    )  # fmt: skip


def _nothing(hidden: Tensor, *_args: Any) -> Tensor:
    return hidden


class _Attention(torch.autograd.Function):
    """What a fused attention saves: queries, keys, values, its output, and a log-sum-exp per head in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)  # in the order of the queries' memory
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("a watched pass has no backward pass")


def _fused(_module: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, None]:
    cast = (t.bfloat16() if torch.is_autocast_enabled("cpu") else t for t in (query, key, value))
    return _Attention.apply(*cast), None  # type: ignore[no-untyped-call]
