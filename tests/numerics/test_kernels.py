"""Every kernel of btx_kernels against `reference`, and `reference` against a sum written out; Triton's interpreted."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from btx_kernels import _order, _products, reference
from btx_kernels._activations import NAMES
from hypothesis import example, given, settings
from torch import Tensor

from btx.models.kernels import absent, ours
from tests.support.kernel_cases import Case, Experts, cases, compare, results, tensors

OTHERS = [name for name in ours() if name != "reference"]
SLOW = ("sparse", "triton")  # interpreted here
WANTED = Case(tokens=9, k=2, experts=3, width=12, half=7)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def kernel(name: str) -> Experts:
    """A backend's function; skipped if it cannot run on the CPU: `make test` installs what it needs on Linux.

    With a GPU, Triton compiles, and `test_kernels_on_gpu.py` runs instead.
    """
    if why := absent(name, torch.device("cpu")):
        pytest.skip(why)
    found: Experts = importlib.import_module(f"btx_kernels.{name}").experts
    return found


def written_out(gate: Tensor, activation: str) -> Tensor:
    """An activation by its formula."""
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))


def plain(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Token by token, choice by choice."""
    rows, half = [], down.shape[2]
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if e < len(down):
                gate, up = gate_up[e, :half] @ x[t], gate_up[e, half:] @ x[t]
                row = row + weight[t, k] * (down[e] @ (written_out(gate, activation) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("routing", ["mixed", "one", "few", "away"])
def test_the_reference_is_the_sum_written_out(routing: str, activation: str) -> None:
    asked = tensors(WANTED._replace(routing=routing), torch.float64)
    both = (results(kernel_, *asked, activation) for kernel_ in (reference.experts, plain))
    for ours_, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours_, theirs)


@pytest.mark.parametrize("name", ours())
def test_an_activation_that_there_is_not_is_refused(name: str) -> None:
    inputs, index, grad = tensors(WANTED, torch.float32)
    with pytest.raises(ValueError, match=r"no activation 'relu' here; known: silu, gelu_tanh"):
        results(kernel(name), inputs, index, grad, "relu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
@example(case=Case(0, 2, 3, 8, 8))
@example(case=Case(1, 1, 1, 1, 1))
@example(case=Case(37, 3, 3, 33, 17, "all away"))
@example(case=Case(1100, 2, 3, 8, 8))
@example(case=Case(30, 2, 3, 12, 8, strided=True))
@example(case=Case(30, 2, 3, 12, 8, activation="gelu_tanh"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sorted_equals_the_reference(dtype: torch.dtype, case: Case) -> None:
    compare(kernel("sorted"), case, dtype)


ONEDNN = [
    Case(300, 2, 3, 96, 130),
    Case(301, 1, 4, 65, 67, "one", strided=True),
    Case(257, 3, 5, 129, 33, "away"),
    Case(120, 2, 3, 40, 64, "few", strided=True),
]


@pytest.mark.parametrize("case", ONEDNN, ids=str)
def test_sorted_equals_the_reference_by_onednns_products(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def onednn(a: Tensor, *others: Any) -> Tensor:
        asked.append(a)
        return torch.ops.mkldnn._linear_pointwise(a, *others)

    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no such product")
    monkeypatch.setattr(_products, "SMALL", 0)
    monkeypatch.setattr(_products, "_onednn", lambda: onednn)
    compare(kernel("sorted"), case, torch.float32)
    assert len(asked) % 6 == 0
    assert asked


@pytest.mark.parametrize(
    ("capability", "vendor", "onednn"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False)],
)
def test_float32_products_leave_mkl_where_it_lacks_avx512_alone(
    capability: str, vendor: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_products, "_processor", lambda: f"vendor_id : {vendor}")
    found = _products._onednn.__wrapped__()
    assert (found is not None) == (onednn and torch.backends.mkldnn.is_available())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=cases(most=36))
@example(case=Case(0, 2, 3, 8, 8))
@example(case=Case(1, 1, 1, 1, 1))
@example(case=Case(37, 3, 5, 33, 41, "away"))
@example(case=Case(40, 2, 3, 24, 72, "one"))
@example(case=Case(5, 2, 3, 128, 128, "mixed", strided=True))
@example(case=Case(37, 3, 5, 33, 41, "away", activation="gelu_tanh"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OTHERS if name in SLOW])
def test_triton_kernels_equal_the_reference(name: str, dtype: torch.dtype, case: Case) -> None:
    compare(kernel(name), case, dtype)


def test_every_kernel_is_under_one_of_these_tests() -> None:
    assert set(OTHERS) == {"sorted", *SLOW}


@pytest.mark.parametrize("activation", NAMES)
def test_sorted_has_the_gradient_of_finite_differences(activation: str) -> None:
    inputs, index, _ = tensors(WANTED._replace(routing="away"), torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    function = kernel("sorted")
    assert torch.autograd.gradcheck(lambda x, g, d, w: function(x, g, d, index, w, activation), leaves)


def swapped(gate_up: Tensor) -> Tensor:
    """Up and gate projections swapped."""
    return torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)


MUTATIONS = {
    "gate and up swapped": lambda f: lambda x, g, d, i, w, a: f(x, swapped(g), d, i, w, a),
    "routing weight dropped": lambda f: lambda x, g, d, i, w, a: f(x, g, d, i, w.detach() * 0 + 1, a),
    "weight's gradient dropped": lambda f: lambda x, g, d, i, w, a: f(x, g, d, i, w.detach(), a),
    "another activation": lambda f: lambda x, g, d, i, w, a: f(x, g, d, i, w, "gelu_tanh"),
    "another expert's down": lambda f: lambda x, g, d, i, w, a: f(x, g, d.roll(1, 0), i, w, a),
    "one choice lost": lambda f: lambda x, g, d, i, w, a: f(x, g, d, i[:, :1], w[:, :1], a),
    "a token's input taken for another's": lambda f: lambda x, g, d, i, w, a: f(x.roll(1, 0), g, d, i, w, a),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_is_caught(name: str, mutation: str) -> None:
    function = kernel(name)
    with pytest.raises(AssertionError, match="off by"):
        compare(MUTATIONS[mutation](function), WANTED, torch.float32)


@pytest.mark.parametrize("name", OTHERS)
def test_a_routing_weight_five_percent_off_is_caught_in_bfloat16(name: str) -> None:
    function = kernel(name)
    with pytest.raises(AssertionError, match=r"output: off by .* in all"):
        compare(lambda x, g, d, i, w, a: function(x, g, d, i, 1.05 * w, a), WANTED._replace(tokens=40), torch.bfloat16)


@pytest.mark.parametrize("name", ["sorted", "triton"])
def test_a_wrong_expert_offset_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = kernel(name)

    def shifted(index_TK: Tensor, experts: int) -> _order.Order:
        found = _order.order(index_TK, experts)
        return found._replace(ends_E=torch.cat([found.ends_E[:1] - 1, found.ends_E[1:]]))

    monkeypatch.setattr(inspect.getmodule(function), "order", shifted)
    with pytest.raises(AssertionError, match="off by"):
        compare(function, WANTED, torch.float32)


def test_a_wrong_expert_offset_is_caught_in_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    function = kernel("sparse")
    module: Any = inspect.getmodule(function)
    right = module._columns

    def shifted(ends_E: Tensor, rows: int, columns: int) -> Tensor:
        return (right(ends_E, rows, columns) + columns) % (columns * len(ends_E))

    monkeypatch.setattr(module, "_columns", shifted)
    with pytest.raises(AssertionError, match="off by"):
        compare(function, WANTED, torch.float32)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("wanted", range(4), ids=["x", "gate_up", "down", "weight"])
def test_a_gradient_alone_is_what_it_is_among_all(name: str, wanted: int) -> None:
    function = kernel(name)
    inputs, index, grad = tensors(WANTED, torch.float32)
    everything = results(function, inputs, index, grad)
    inputs[wanted].requires_grad_()
    function(*inputs[:3], index, inputs[3]).backward(grad)
    torch.testing.assert_close(inputs[wanted].grad, everything[1 + wanted])


@pytest.mark.parametrize("name", ["sorted", "triton"])
def test_no_more_is_kept_for_the_backward_pass_than_by_a_dense_layer_of_the_active_width(name: str) -> None:
    from btx.bench.kernels import kept_bytes

    t, k, e, d, f = 64, 2, 4, 32, 96
    (x, gate_up, down, weight), index, _ = tensors(Case(t, k, e, d, f), torch.float32)
    for leaf in (x, gate_up, down, weight):
        leaf.requires_grad_()
    function = kernel(name)
    ours_ = kept_bytes(lambda: function(x, gate_up, down, index, weight), [x, gate_up, down, weight])
    wide_gate, wide_up, wide_down = (torch.randn(n, m, requires_grad=True) for n, m in
                                     ((k * f, d), (k * f, d), (d, k * f)))  # fmt: skip

    def dense() -> Tensor:
        act: Any = torch.nn.functional.silu(x @ wide_gate.T) * (x @ wide_up.T)
        return act @ wide_down.T

    assert ours_ <= 1.1 * kept_bytes(dense, [x, wide_gate, wide_up, wide_down])
