"""Our Triton kernels compiled for Hopper and Ampere, which needs no GPU: every block shape that tuning may pick."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes of shared memory per program
BF16, F32, I64, I32 = "*bf16", "*fp32", "*i64", "i32"
HOW = {"PRECISION": "tf32", "WIDE": False}
PLAIN = {"PRECISION": "ieee", "WIDE": False}
ARGUMENTS = {
    "up": {"x": BF16, "weight": BF16, "hidden": BF16, "act": BF16, "choice": I64, "ends": I64, "E": I32, "D": I32,
           "F": I32, "K": 2, "KEEP": True, "GELU": False, **HOW},
    "out": {"a": BF16, "weight": BF16, "out": BF16, "scale": F32, "choice": I64, "ends": I64, "E": I32, "DEPTH": I32,
            "N": I32, "stride_k": 1, "stride_n": I32, "SCALED": True, **HOW},
    "act_grad": {"grad": BF16, "weight": BF16, "hidden": BF16, "scale": F32, "grad_hidden": BF16, "scaled_act": BF16,
                 "dots": F32, "choice": I64, "ends": I64, "E": I32, "D": I32, "F": I32, "K": 2, "GELU": False, **HOW},
    "weight_grad": {"p": BF16, "q": BF16, "out": BF16, "choice": I64, "ends": I64, "M": I32, "N": I32, "K": 2,
                    "GATHER_P": False, "GATHER_Q": True, **HOW},
}  # fmt: skip
VARIANTS = {  # name: kernel, and what differs from above
    **{name: (name, {}) for name in ARGUMENTS},
    "up without a backward pass": ("up", {"KEEP": False}),
    "up with GELU": ("up", {"GELU": True}),
    "act_grad with GELU": ("act_grad", {"GELU": True}),
    "gradient of the input": ("out", {"stride_k": I32, "stride_n": 1, "SCALED": False}),
    "gradient of down": ("weight_grad", {"GATHER_P": True, "GATHER_Q": False}),
    "up in float32": ("up", {**dict.fromkeys(("x", "weight", "hidden", "act"), F32), **PLAIN}),
    "act_grad in float32": ("act_grad", {
        **dict.fromkeys(("grad", "weight", "hidden", "grad_hidden", "scaled_act"), F32), **PLAIN}),
}  # fmt: skip
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from btx_kernels import _triton_kernels
capability, name, arguments = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
tuner = getattr(_triton_kernels, name)
names = tuner.fn.arg_names
for config in tuner.configs:
    given = {**arguments, **config.kwargs}
    fixed = {(names.index(n),): v for n, v in given.items() if not isinstance(v, str) or n == "PRECISION"}
    signature = {n: "constexpr" if (names.index(n),) in fixed else given[n] for n in names}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr" and n != "E"}
    source = ASTSource(fn=tuner.fn, signature=signature, constexprs=fixed, attrs=even)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    print(json.dumps([str(config), made.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("mma.sync")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_compiles_to_tensor_cores_within_the_shared_memory(variant: str, capability: int) -> None:
    name, changes = VARIANTS[variant]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    argv = [sys.executable, "-c", COMPILE, str(capability), name, json.dumps(ARGUMENTS[name] | changes)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 4
    fitting = [config for config, shared, _, _ in found if shared <= SHARED[capability]]
    assert len(fitting) >= (2 if "float32" in variant else len(found))  # tuning skips what does not fit
    for config, _, wgmma, mma in found:
        assert "float32" in variant or (wgmma if capability == 90 else mma), config  # ieee has no tensor cores
