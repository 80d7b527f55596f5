"""bf16 training over float32 state: only the arithmetic is rounded, and routers and sums stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from btx.models.kernels import kernel_of, use_kernel
from btx.models.target import moe_config
from btx.moe.dialects import Sigmoid, dialect_of, matrix_of
from btx.moe.hooks import find_routers
from btx.recipe import precision
from btx.recipe.settings import FinetuneSettings, TrainSettings
from btx.steps.finetune import Balanced
from btx.training.cast_once import CastOnce
from btx.training.loop import Loop
from tests.support.loops import WHERE, loop_of, stop_after, stream, weights
from tests.support.models import config_of


def loop_in(family: str, folder: Path, kind: str, *, mixture: bool) -> Loop:
    """A loop over a fresh model of a family in a precision."""
    torch.manual_seed(3)
    config = config_of(family)
    watch: Any = None
    common: dict[str, Any] = {
        "sequence_length": 16, "batch_tokens": 64, "learning_rate": 1e-3, "precision": kind
    }  # fmt: skip
    settings = TrainSettings(**common)
    if mixture:
        config = moe_config(config.to_dict(), experts=3, top_k=2, width=48, where="seed")
    model = AutoModelForCausalLM.from_config(config)
    if mixture:
        use_kernel(model, kernel_of(config, "auto", torch.device("cpu")))
        settings = FinetuneSettings(**common, tokens=512)
        watch = Balanced(model, settings, "x", lambda _e: None, list("abc"))
    return Loop(model, stream(folder / "data"), settings, where=WHERE, work=folder / kind, label="x",
                emit=lambda _e: None, hook=watch)  # fmt: skip


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_bfloat16_trains_every_family_as_float32_does_up_to_its_rounding(
    family: str, mixture: bool, tmp_path: Path
) -> None:
    exact, rounded = (loop_in(family, tmp_path, kind, mixture=mixture) for kind in ("fp32", "bf16"))
    before = weights(exact)
    first = [loop._one_step()["loss"] for loop in (exact, rounded)]
    assert first[1] == pytest.approx(first[0], abs=0.03)
    assert first[1] != first[0]
    found = weights(rounded)
    assert all(t.dtype == torch.float32 for t in found.values())
    moved = {n: (weights(exact)[n] - t).flatten() for n, t in before.items()}
    also = {n: (found[n] - t).flatten() for n, t in before.items()}
    one, other = torch.cat(list(moved.values())), torch.cat(list(also.values()))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.8  # Adam's first step is a step of signs


def test_small_steps_are_not_lost_between_bfloat16_numbers(tmp_path: Path) -> None:
    loop = loop_of("dense", tmp_path, "a", precision="bf16", learning_rate=1e-6)
    before = weights(loop)
    loop.run()
    for name, tensor in weights(loop).items():
        assert not torch.equal(tensor, before[name]), name
    inside = loop.model.model.layers[0].mlp.up_proj.weight
    assert inside.dtype == torch.float32  # the copies are gone after the step


def test_a_killed_bfloat16_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed = loop_of("top_k", tmp_path, "a", precision="bf16")
    undisturbed.run()
    often = WHERE.model_copy(update={"checkpoint_steps": 2})
    stop_after(loop_of("top_k", tmp_path, "b", where=often, precision="bf16"), 5)
    resumed = loop_of("top_k", tmp_path, "b", where=often, precision="bf16")
    assert resumed.run().resumed_from == 4
    assert all(torch.equal(t, weights(resumed)[n]) for n, t in weights(undisturbed).items())


def test_bfloat16_goes_with_gradient_checkpointing(tmp_path: Path) -> None:
    plain, saving = (
        loop_of("top_k", tmp_path, str(on), precision="bf16", gradient_checkpointing=on) for on in (False, True)
    )
    plain.run()
    saving.run()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_routers_compute_in_float32(family: str, how: str) -> None:
    """Whether their neighbours are bfloat16 or autocast is on."""
    config = moe_config(config_of(family).to_dict(), experts=3, top_k=2, width=48, where="seed")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    use_kernel(model, kernel_of(config, "auto", torch.device("cpu")))
    settings = FinetuneSettings(sequence_length=16, batch_tokens=64, tokens=64)
    watch = Balanced(model, settings, "x", lambda _e: None, list("abc"))
    seen = {}
    for name, router in find_routers(model).items():
        matrix_of(router).register_forward_hook(lambda _m, args, _out, name=name: seen.update({name: args[0]}))
    if how == "weights":
        kept = {id(m) for r in find_routers(model).values() for m in r.modules()}
        cast = CastOnce(model, kept=kept)
        with cast.step():
            model(input_ids=torch.arange(16)[None])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.arange(16)[None])
    for layer, router, hidden in zip(watch.routed.layers, find_routers(model).values(), seen.values(), strict=True):
        weight = matrix_of(router).weight
        assert layer.logits_TE.dtype == torch.float32
        wanted = hidden.reshape(-1, hidden.shape[-1]).float() @ weight.T
        wanted = torch.nn.functional.logsigmoid(wanted) if isinstance(dialect_of(router), Sigmoid) else wanted
        torch.testing.assert_close(layer.logits_TE, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_automatic_precision_goes_by_the_processor(vendor: str, flags: str, fast: bool) -> None:
    about = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A: B\nflags\t\t: fpu {flags} vme\n\n"
    assert precision.fast_on_cpu(about * 2) == fast
    assert not precision.fast_on_cpu("")
