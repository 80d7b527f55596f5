"""Chooses the expert kernel of a native MoE model; the one place where transformers meets btx_kernels.

The kernels of transformers (`eager`, `grouped_mm`, `batched_mm`, ...) and of btx_kernels are selected by name. Nothing
falls back silently: an unavailable kernel is an error, and `auto` says what it chose.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import btx_kernels
import torch
from torch import Tensor, nn

from btx.errors import RecipeError, ResourceError, nearest
from btx.models.families import mixture_family

NATIVE = ("eager", "grouped_mm", "batched_mm")
HUB = ("deepgemm", "sonicmoe")  # kernels that transformers fetches from its hub by the package `kernels`
INTERPRETED = "TRITON_INTERPRET"
ACTIVATIONS = {  # those that btx_kernels computes: names in configs, by its own
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
CLASSES = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}


def ours() -> list[str]:
    """Names of the kernels in btx_kernels: the listing of its folder is the registry."""
    return sorted(m.name for m in pkgutil.iter_modules(btx_kernels.__path__) if not m.name.startswith("_"))


def known() -> list[str]:
    """Every kernel that a recipe may name, besides `auto`."""
    return [*NATIVE, *HUB, *ours()]


def absent(name: str, device: torch.device) -> str:
    """Why a kernel cannot run here, as a sentence with the remedy; empty when it can."""
    if name in HUB:
        if device.type != "cuda":
            return f"{name} runs on a GPU only. Use kernel: auto."
        from transformers.utils import is_kernels_available

        need = "`pip install kernels` first, in a version that transformers accepts"
        return "" if is_kernels_available() else f"{name} is a hub kernel: {need}."
    if name not in ours():
        return ""
    try:
        module = importlib.import_module(f"btx_kernels.{name}")
    except ImportError as error:
        return str(error)
    if getattr(module, "TRITON", False) and device.type != "cuda" and os.environ.get(INTERPRETED) != "1":
        return f"{name} runs on a GPU; on a CPU only in Triton's interpreter ({INTERPRETED}=1). Use kernel: auto."
    return ""


def choose(name: str, device: torch.device) -> str:
    """The kernel that `auto` stands for on a device, or the named one.

    RecipeError for an unknown name, ResourceError for a kernel that cannot run here. `auto` is `triton` on a GPU: the
    fastest at every size measured but one, where `grouped_mm` is 5 % ahead and keeps twice the memory. Elsewhere it is
    `sorted`: on CPUs the fastest or within 3 % of it, with half the memory (`btx bench kernels`, docs/benchmarks).
    """
    if name == "auto":
        return "triton" if device.type == "cuda" and not absent("triton", device) else "sorted"
    if name not in known():
        raise RecipeError(f"run.kernel: there is no kernel {name!r} for {device}; {nearest(name, ['auto', *known()])}")
    if why := absent(name, device):
        raise ResourceError(f"run.kernel: {why}")
    return name


def kernel_of(config: Any, name: str, device: torch.device) -> str | None:
    """The kernel that a model with this config, parsed or native, runs on by `run.kernel: name`; None if it is dense.

    RecipeError where the class runs its experts in a loop of its own and another kernel is named.
    """
    family = mixture_family(config)
    if family is None or not family.attention:
        if family and name == "auto" and activation_of(config) not in ACTIVATIONS:
            return "grouped_mm"  # ours refuse it
        return choose(name, device) if family else None
    if name in ("auto", "eager"):
        return "eager"
    raise RecipeError(f"run.kernel: {family.moe} runs its experts in a loop of its own, not on {name}. Use auto.")


def activation_of(config: Any) -> str:
    """Name of the activation in a model's feed-forward blocks, by its config, parsed or native."""
    values = config if isinstance(config, dict) else config.to_dict()
    return str(values.get("hidden_act") or values.get("hidden_activation") or "silu")


def use_kernel(model: nn.Module, name: str) -> None:
    """Run a native MoE model's experts on a kernel by name; does nothing to a dense model.

    RecipeError when the kernel does not support the model's experts, or no kernel can be set for them.
    """
    found = [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")]
    if not found:
        if name != "eager" and any(hasattr(m, "num_experts") for m in model.modules()):
            raise RecipeError(
                f"run.kernel: the experts of {type(model).__name__} cannot run on {name}, since this transformers "
                "runs them in a loop of their own (GraniteMoE before transformers 5.13). Use kernel: eager."
            )
        return
    if name in ours():
        for module in found:
            check_kind(module, name)
        _register(name)
    model.set_experts_implementation(name)  # type: ignore[operator]


def check_kind(module: nn.Module, name: str) -> None:
    """RecipeError unless a module holds gated experts in our kernels' layout, (E, 2F, D) and (E, D, F), without bias,
    and has an activation that they compute."""
    from transformers.integrations.moe import _default_apply_gate

    act = type(getattr(module, "act_fn", None)).__name__
    usual = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False,
             "has_post_expert_norm": False}  # fmt: skip
    own_gate = getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate
    unusual = own_gate or any(getattr(module, k, v) != v for k, v in usual.items())
    if not _activation(module) or unusual:
        raise RecipeError(
            f"run.kernel: {name} computes experts with a gate of SiLU or GELU's tanh form, without bias; those of "
            f"{type(module).__name__} are of another kind (activation {act}). Use kernel: grouped_mm."
        )


def _activation(module: nn.Module) -> str:
    """The activation of a module of experts, by our kernels' name; empty for one that they do not compute."""
    found = getattr(module, "act_fn", None)
    return "silu" if found is nn.functional.silu else CLASSES.get(type(found).__name__, "")


def _register(name: str) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    kernel = importlib.import_module(f"btx_kernels.{name}")

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.gate_up_proj.dtype
        tensors = (t.to(dtype) for t in (hidden_states, self.gate_up_proj, self.down_proj))
        with torch.autocast(kind, enabled=False):
            out: Tensor = kernel.experts(*tensors, top_k_index, top_k_weights, activation=_activation(self))
        return out.to(hidden_states.dtype)

    ALL_EXPERTS_FUNCTIONS.register(name, forward)
