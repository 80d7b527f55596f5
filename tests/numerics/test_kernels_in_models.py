"""Native models on every kernel: the same logits, the same training; what cannot run is refused by name."""

from __future__ import annotations

from functools import cache
from importlib.metadata import distributions
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btx.errors import RecipeError, ResourceError
from btx.models.kernels import HUB, absent, choose, known, ours, use_kernel
from tests.support.moe_models import FAMILIES, build, forward, use_checkpointing

CPU = torch.device("cpu")
HERE = [name for name in known() if name not in HUB]
ALL = (*FAMILIES, "granitemoe")


def on(model: Any, name: str) -> Any:
    """A model on a kernel; skipped if the kernel cannot run here."""
    if why := absent(name, CPU):
        pytest.skip(why)
    use_kernel(model, name)
    assert model.config._experts_implementation == name
    return model


@pytest.mark.parametrize("name", [name for name in HERE if name != "eager"])
@pytest.mark.parametrize("family", ALL)
def test_every_family_gives_the_same_logits_on_every_kernel(family: str, name: str) -> None:
    model = build(family, num_hidden_layers=1).eval()
    with torch.inference_mode():
        wanted = forward(on(model, "eager")).logits
        found = forward(on(model, name)).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def train(family: str, name: str, *, steps: int) -> list[float]:
    """Losses of a mixture trained on the same tokens again and again."""
    model = on(build(family, num_hidden_layers=1), name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = forward(model).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@cache
def eager_losses(family: str) -> list[float]:
    """Losses of the stock expert loop."""
    return train(family, "eager", steps=10)


@pytest.mark.parametrize("name", [name for name in HERE if name != "eager"])
@pytest.mark.parametrize("family", ALL)
def test_ten_steps_of_training_come_to_the_same_loss_on_every_kernel(family: str, name: str) -> None:
    wanted = eager_losses(family)
    assert wanted[-1] < wanted[0] - 0.2
    torch.testing.assert_close(train(family, name, steps=10), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ours())
def test_under_autocast_our_kernels_compute_in_its_precision_and_give_gradients_in_the_weights(name: str) -> None:
    model = on(build("mixtral", num_hidden_layers=1), name)
    experts: Any = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    x = torch.randn(6, 16)
    index, weight = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, index, weight)
    whole = experts(x, index, weight).detach()
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())
    torch.testing.assert_close(out, whole, atol=0.05 * float(whole.abs().max()), rtol=0)
    out.sum().backward()
    assert experts.gate_up_proj.grad.dtype == torch.float32


def test_a_model_under_accelerates_bf16_trains_on_sorted_with_finite_gradients() -> None:
    model = on(build("qwen3_moe"), "sorted")
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(model).loss
    loss.backward()
    grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("name", ours())
def test_gradient_checkpointing_changes_no_gradient_on_our_kernels(name: str) -> None:
    plain, checkpointed = (on(build("mixtral", num_hidden_layers=1).train(), name) for _ in range(2))
    assert use_checkpointing(checkpointed) == 1
    for model in (plain, checkpointed):
        forward(model).loss.backward()
    for (path, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, path=path: f"{path}: {text}")


def test_unknown_kernels_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="grouped_mm"):
        choose("groupedmm", CPU)
    assert choose("auto", CPU) == "sorted"
    gpu = torch.device("cuda")
    assert choose("auto", gpu) == ("sorted" if absent("triton", gpu) else "triton")


@pytest.mark.parametrize("name", ["sparse", "triton"])
def test_a_gpu_kernel_on_a_cpu_is_refused_unless_it_is_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent(name, CPU):
        pytest.skip("its packages are absent")
    assert choose(name, CPU) == name
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ResourceError, match=f"{name} runs on a GPU"):
        choose(name, CPU)


@pytest.mark.parametrize("name", HUB)
def test_hub_kernels_are_known_and_need_a_gpu_and_their_package(name: str) -> None:
    with pytest.raises(ResourceError, match="GPU"):
        choose(name, CPU)
    there = "kernels" in {found.name for found in distributions()}  # not our folder of that name, on the path here
    assert bool(absent(name, torch.device("cuda"))) == (not there)


def test_experts_of_another_kind_are_refused_not_computed_wrongly() -> None:
    with pytest.raises(RecipeError, match="activation GELU"):
        use_kernel(build("mixtral", hidden_act="gelu"), "sorted")
    model = build("mixtral")
    next(m for m in model.modules() if hasattr(m, "gate_up_proj")).has_bias = True
    with pytest.raises(RecipeError, match="without bias"):
        use_kernel(model, "sorted")


def test_experts_with_a_gate_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, x: x.chunk(2, -1)[0].clamp(max=7))
    with pytest.raises(RecipeError, match="another kind"):
        use_kernel(model, "sorted")


def test_a_dense_model_is_left_as_it_is() -> None:
    use_kernel(nn.Linear(2, 2), "sorted")


@pytest.mark.parametrize("name", ["sorted", "grouped_mm"])
def test_experts_with_a_loop_of_their_own_are_refused_not_left_on_it_in_silence(name: str) -> None:
    experts = nn.Linear(2, 2)
    experts.num_experts = 4  # as GraniteMoE's in transformers 5.10
    model = nn.Sequential(experts)
    use_kernel(model, "eager")
    with pytest.raises(RecipeError, match="kernel: eager"):
        use_kernel(model, name)


def test_a_kernel_whose_packages_are_absent_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("stk", "megablocks"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **more)

    for module in [m for m in sys.modules if m.startswith(("stk", "megablocks", "btx_kernels.sparse"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match="make megablocks"):
        choose("sparse", CPU)
