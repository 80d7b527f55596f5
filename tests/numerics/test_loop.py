"""The training loop: exact resume, independence of micro-batching, frozen parameters, the schedule."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btx.errors import DivergedError, InterruptedRunError
from btx.recipe.settings import FinetuneSettings, TrainSettings
from btx.steps.finetune import Balanced, freeze
from btx.training.loop import Loop, groups
from btx.training.schedule import learning_rate
from tests.support.loops import SETTINGS, WHERE, loop_of, model_of, stop_after, stream, weights


@pytest.mark.parametrize("kind", ["dense", "top_k", "switch", "soft", "sample_top1"])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, kind: str) -> None:
    undisturbed = loop_of(kind, tmp_path, "a")
    undisturbed.run()
    often = WHERE.model_copy(update={"checkpoint_steps": 2})
    stop_after(loop_of(kind, tmp_path, "b", where=often), 5)
    torch.rand(7)  # whatever the process's generator state is
    resumed = loop_of(kind, tmp_path, "b", where=often)
    assert resumed.run().resumed_from == 4
    wanted, found = weights(undisturbed), weights(resumed)
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    assert (
        (tmp_path / "a/metrics.jsonl").read_text().count("\n")
        == (tmp_path / "b/metrics.jsonl").read_text().count("\n")
        == 8
    )


def test_a_damaged_newest_state_is_set_aside_and_training_starts_over_from_what_is_left(tmp_path: Path) -> None:
    often = WHERE.model_copy(update={"checkpoint_steps": 2})
    stop_after(loop_of("dense", tmp_path, "b", where=often), 5)
    file = next((tmp_path / "b/states").glob("*/optimizer.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert loop_of("dense", tmp_path, "b", where=often).run().resumed_from == 0
    assert list((tmp_path / "b/quarantine").iterdir())


@pytest.mark.parametrize("masked", [False, True])
def test_how_a_batch_is_cut_changes_nothing_but_rounding(tmp_path: Path, masked: bool) -> None:
    found = []
    for size in (1, 3, 4):
        loop = loop_of(
            "dense", tmp_path, str(size), where=WHERE.model_copy(update={"micro_batch": size}), masked=masked
        )
        loop._one_step()
        found.append(weights(loop))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", ["btx", "switch", "transformers", "none"])
@pytest.mark.parametrize("kind", ["top_k", "switch", "soft", "sample_top1"])
def test_how_a_batch_is_cut_changes_no_balance_loss(tmp_path: Path, kind: str, form: str) -> None:
    """Nor Sample Top-1's routing: the noise is drawn per sequence."""
    found = []
    for size in (1, 3, 4):
        where = WHERE.model_copy(update={"micro_batch": size})
        loop = loop_of(kind, tmp_path, str(size), where=where, balance={"type": form, "weight": 1.0})
        gradients: dict[str, torch.Tensor] = {}

        def keep(loop: Loop = loop, gradients: dict[str, torch.Tensor] = gradients) -> None:
            gradients |= {n: p.grad.clone() for n, p in loop.model.named_parameters()}

        loop.optimizer.step = keep
        found.append((loop._one_step(), gradients))
    whole = found[-1]
    for figures, tensors in found[:-1]:
        for name in ("loss", "balance", "grad_norm"):
            assert figures[name] == pytest.approx(whole[0][name], rel=1e-5), name
        assert figures["load"] == whole[0]["load"]
        assert tensors.keys() == whole[1].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, whole[1][name], atol=2e-6, rtol=0)


def test_one_step_is_that_of_a_bare_loop(tmp_path: Path) -> None:
    loop = loop_of("dense", tmp_path, "a")
    loop._one_step()
    bare = model_of("dense").train()
    optimizer = torch.optim.AdamW(groups(bare, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    batch = stream(tmp_path / "data").batch(range(4))
    loss = torch.nn.functional.cross_entropy(bare(input_ids=batch.inputs).logits.flatten(0, 1), batch.targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
    optimizer.step()
    for name, tensor in weights(loop).items():
        torch.testing.assert_close(bare.state_dict()[name], tensor, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    plain, saving = loop_of("top_k", tmp_path, "a"), loop_of("top_k", tmp_path, "b", gradient_checkpointing=True)
    plain.run()
    saving.run()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("trainable", "moves"), [("all", {"gate", "experts", "self_attn"}), ("router", {"gate"}),
                                                 ("no_experts", {"gate", "self_attn"})])  # fmt: skip
def test_only_what_is_trainable_moves(tmp_path: Path, trainable: str, moves: set[str]) -> None:
    loop = loop_of("top_k", tmp_path, "a", trainable=trainable)
    before = weights(loop)
    loop.run()
    moved = {n for n, t in weights(loop).items() if not torch.equal(t, before[n])}
    for part in ("gate", "experts", "self_attn"):
        names = {n for n in before if f".{part}." in n}
        assert names, part
        assert (names <= moved) if part in moves else not names & moved, part


def test_unknown_parameters_are_not_frozen_by_a_renamed_module() -> None:
    model = model_of("top_k")
    freeze(model, "router")
    assert sum(p.requires_grad for p in model.parameters()) == model.config.num_hidden_layers


def test_non_finite_steps_are_skipped_counted_and_end_the_job_when_they_go_on(tmp_path: Path) -> None:
    loop = loop_of("dense", tmp_path, "a", max_bad_steps=3)
    with torch.no_grad():
        loop.model.model.norm.weight[0] = float("nan")
    before = weights(loop)
    with pytest.raises(DivergedError, match="3 steps in a row"):
        loop.run()
    for name, tensor in weights(loop).items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    import os
    import signal

    loop = loop_of("dense", tmp_path, "a")
    inner = loop._one_step

    def one_step() -> dict[str, Any]:
        if loop.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner()

    loop._one_step = one_step  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        loop.run()
    assert loop_of("dense", tmp_path, "a").run().resumed_from == 3


def test_the_schedule_warms_up_and_falls_to_a_tenth() -> None:
    settings = TrainSettings(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(s, steps=100, settings=settings) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    middle = 10 + 89 / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx(0.55, abs=1e-3)


def test_processes_decide_together_to_stop_and_by_the_first_ones_clock_to_save(tmp_path: Path) -> None:
    """A signal or a clock may reach one process a step before the other, and a save by one alone would deadlock."""
    loop = loop_of("dense", tmp_path, "a")
    for main, others, asked, due, agreed in [
        (True, [1.0, 0.0], "", False, ("a signal to another process", False)),
        (True, [0.0, 0.0], "SIGTERM", True, ("SIGTERM", True)),
        (False, [0.0, 0.0], "", True, ("", False)),
        (False, [0.0, 1.0], "", False, ("", True)),
    ]:
        loop.accelerator = SimpleNamespace(
            num_processes=2, is_main_process=main, device="cpu", reduce=lambda t, _how, o=others: t + torch.tensor(o)
        )
        assert loop._agreed(asked, due) == agreed


def test_of_several_processes_none_frees_the_group_which_may_wait_without_end(tmp_path: Path) -> None:
    loop = loop_of("dense", tmp_path, "a")
    for processes, ended in [(2, ["tracker"]), (1, ["all"])]:
        seen: list[str] = []
        tracker = SimpleNamespace(finish=lambda seen=seen: seen.append("tracker"))
        loop.accelerator = SimpleNamespace(
            num_processes=processes, trackers=[tracker], end_training=lambda seen=seen: seen.append("all")
        )
        loop.close()
        assert seen == ended


def test_an_expert_is_called_dead_over_many_sequences_and_not_for_a_step_without_its_domain(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    model = model_of("top_k")
    settings = FinetuneSettings(**SETTINGS, routing="top_k", tokens=512)
    watch = Balanced(model, settings, "x", told.append, ["a", "b", "c"])
    with torch.no_grad():
        for layer in model.model.layers:  # the last expert gets nothing
            layer.mlp.gate.weight.copy_(torch.tensor([1.0, 1.0, -1.0])[:, None] * layer.mlp.gate.weight[:1].abs())
            layer.mlp.gate.register_forward_pre_hook(lambda _module, args: (args[0].abs(),))
    for step in range(3):
        watch.begin(step)
        model(input_ids=torch.randint(0, 300, (12, 16)))
        watch.loss()
        dead = watch.figures()["dead"]
        assert dead == ([[0, 2], [1, 2]] if step == 2 else [])
    assert [event.text for event in told] == [
        f"layer {layer}: the expert c is dead (0.0% of the routing choices)" for layer in (0, 1)
    ]
