"""Every kernel on a CUDA device, compiled, at sizes that fill it: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from btx.models.kernels import absent, ours
from tests.support.kernel_cases import Case, compare, results, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = [
    Case(1000, 2, 8, 256, 352),
    Case(4096, 8, 64, 512, 256),
    Case(777, 2, 4, 1000, 1001),
    Case(3, 1, 4, 512, 512, "one"),
    Case(2048, 2, 4, 768, 2048, "away"),
    Case(500, 2, 4, 512, 384, strided=True),
    Case(64, 2, 4, 128, 128, "all away"),
    Case(0, 2, 4, 64, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in ours() if name != "reference"])
def test_a_kernel_equals_the_reference(name: str, dtype: torch.dtype, case: Case) -> None:
    if why := absent(name, torch.device("cuda")):
        pytest.skip(why)
    if name == "sparse" and dtype == torch.float32:
        pytest.skip("stk takes products of float32 in TF32")
    compare(importlib.import_module(f"btx_kernels.{name}").experts, case, dtype, "cuda")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["up", "out", "act_grad", "weight_grad"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_block_shape_that_tuning_may_pick_is_right(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btx_kernels import _triton_kernels, triton

    tuner = getattr(_triton_kernels, name)
    for config in list(tuner.configs):
        monkeypatch.setattr(tuner, "configs", [config])
        tuner.cache.clear()
        compare(triton.experts, CASES[2], dtype, "cuda")
    tuner.cache.clear()


@pytest.mark.parametrize("name", ["sorted", "triton"])
def test_two_calls_give_the_same_bits(name: str) -> None:
    inputs, index, grad = tensors(CASES[1], torch.bfloat16, "cuda")
    function = importlib.import_module(f"btx_kernels.{name}").experts
    results(function, inputs, index, grad)  # tunes
    first, second = (results(function, inputs, index, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
