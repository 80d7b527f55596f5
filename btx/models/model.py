"""Native transformers models: loaded with every check on, written under the published names.

Only classes of transformers are used, from local files, without remote code; loading must report no missing, unexpected
or mismatched keys.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from btx.checkpoints.token_map import carry_dense
from btx.checkpoints.validate import read_config
from btx.checkpoints.writer import whole, write_weights
from btx.errors import ArtifactError, ResourceError
from btx.models.families import mixture_family
from btx.models.family import DOWN, GATE, LAYER, UP, Family
from btx.models.kernels import kernel_of, use_kernel
from btx.moe.dialects import BIAS
from btx.recipe.settings import RunSettings


def device_of(where: RunSettings) -> torch.device:
    """The torch device that run.device stands for on this machine; ResourceError when there is none."""
    if where.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("run.device is cuda, but this machine has no usable GPU. Set run.device: auto or cpu.")
    return torch.device("cuda" if where.device != "cpu" and torch.cuda.is_available() else "cpu")


def set_threads(where: RunSettings) -> None:
    """Set this process's CPU threads: the recipe's number, or all cores that it may run on."""
    torch.set_num_threads(where.threads if where.threads != "auto" else len(os.sched_getaffinity(0)))


def load(
    folder: Path, *, where: RunSettings, dtype: torch.dtype = torch.float32, experts_per_token: int | None = None
) -> Any:
    """A causal language model from a Hugging Face folder, in `dtype`, on the CPU, on the kernel asked for.

    `experts_per_token` overrides the number that the folder's config states.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    family = mixture_family(read_config(folder))
    chosen = {family.top_k_field: experts_per_token} if family and experts_per_token else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **chosen,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder} cannot be loaded as a causal language model: {str(error).splitlines()[0]}"
        ) from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        named = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(v[:3])}" for kind, v in wrong.items() if v)
        raise ArtifactError(f"{folder} does not fit the class {type(model).__name__}: {named}.")
    for output in ("output_attentions", "output_hidden_states"):  # only logits, whatever config.json requests
        setattr(model.config, output, False)
    model.config.return_dict = True
    if kernel := kernel_of(model.config, where.kernel, device_of(where)):
        use_kernel(model, kernel)
    return model


def save(out: Path, *, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, like: Path) -> None:
    """Write a model's state dict as a Hugging Face folder in `dtype`, tokenizer files carried over from `like`."""
    family = mixture_family(config)
    state = {n: t for n, t in state.items() if not (config.tie_word_embeddings and n == "lm_head.weight")}
    named = published(family, state) if family else state
    write_weights(out, [whole(n, t, dtype) for n, t in named.items()])
    config.dtype = dtype
    config.save_pretrained(out)
    carry_dense(like, out)


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameters."""
    return sum(p.numel() for p in model.parameters())


def fresh(config: Any, *, where: RunSettings) -> Any:
    """A model of a native config with random fp32 weights, drawn from torch's random state, on the recipe's kernel."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kernel := kernel_of(config, where.kernel, device_of(where)):
        use_kernel(model, kernel)
    return model


def published(family: Family, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A native MoE model's state dict under the published names.

    transformers 5 keeps the experts of a layer fused in memory as gate_up_proj (E, 2F, D) and down_proj (E, D, F). The
    names on disk, one tensor per expert (GraniteMoE: stacked), load in transformers 4 and 5, vLLM and llama.cpp. Views,
    no copies.
    """
    out: dict[str, torch.Tensor] = {}
    constants = {of.memory or constant: constant for constant, of in family.constants.items()}
    for name, tensor in state.items():
        if name.endswith(f".{BIAS}"):
            continue  # acts in training alone
        match = LAYER.fullmatch(name)
        rest = match[2] if match else ""
        prefix = name.removesuffix(rest) if rest else ""
        if rest in constants:
            out[prefix + constants[rest]] = tensor
        elif rest == family.router_in_memory:
            out[prefix + family.router] = tensor
        elif rest == f"{family.experts}gate_up_proj":
            out |= _unstacked(family, prefix, GATE, tensor)
        elif rest == f"{family.experts}down_proj":
            out |= _unstacked(family, prefix, DOWN, tensor)
        else:
            out[name] = tensor
    return out


def _unstacked(family: Family, prefix: str, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts of one layer, (E, rows, columns), one tensor each unless the family stores them stacked."""
    if family.stacked:
        return {prefix + family.expert[kind]: tensor}
    if kind == DOWN:
        return {prefix + family.expert[DOWN].format(e=e): down for e, down in enumerate(tensor)}
    names = (family.expert[GATE], family.expert[UP])
    return {
        prefix + name.format(e=e): part
        for e, both in enumerate(tensor)
        for name, part in zip(names, both.chunk(2, dim=0), strict=True)
    }
