"""LoReFT: its formula and identities, where it acts, exact resume, and a run whose seed keeps every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from btx.cli.main import main
from btx.conversions.pipeline import Graph
from btx.conversions.reft import Editing, ReftRule
from btx.conversions.registry import load_recipe, open_model
from btx.data.sampler import places_in_runs
from btx.models.generation import generate
from btx.models.opened import Opened, Stock
from btx.models.reft import Intervened, Intervention, edited
from btx.recipe.settings import RunSettings, TrainSettings
from btx.training.loop import Loop
from tests.support.command import btx
from tests.support.loops import SETTINGS, stop_after, stream, weights
from tests.support.models import FAMILIES, config_of
from tests.support.project import write_project

CHANCE = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 31, (2, 12), generator=CHANCE)
WHERE = RunSettings(device="cpu", threads=1)


def net_of(family: str = "llama") -> Any:
    """A pico model with fixed weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, attn_implementation="eager")).eval()


def tensors(rank: int = 3) -> Any:
    """R with orthonormal rows, W and b of a random edit."""
    rows = torch.linalg.qr(torch.randn(32, rank, generator=CHANCE))[0].T.contiguous()
    return rows, torch.randn(rank, 32, generator=CHANCE), torch.randn(rank, generator=CHANCE)


def at(net: Any, layers: Any, *, prefix: int | None = None, suffix: int | None = None) -> Intervened:
    """A model with random edits after some layers."""
    return Intervened(net, {n: tensors() for n in layers}, prefix=prefix, suffix=suffix)


def test_an_edit_is_the_papers_formula() -> None:
    R, W, b = tensors()
    h = torch.randn(2, 5, 32, generator=CHANCE)
    for row in h.flatten(0, 1):
        wanted = row + R.T @ (W @ row + b - R @ row)
        found = edited(row[None, None], (R, W, b), None)[0, 0]
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(R @ found, W @ row + b)  # inside of the subspace it is W h + b
        away = torch.eye(32) - R.T @ R
        torch.testing.assert_close(away @ found, away @ row, atol=1e-5, rtol=0)  # outside of it nothing changes


def test_rows_stay_orthonormal_in_training_and_begin_as_the_identity() -> None:
    one = Intervention(32, 5)
    h = torch.randn(1, 4, 32, generator=CHANCE)
    assert torch.equal(edited(h, one.tensors, None), h)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        edited(h, one.tensors, None).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    R, W, _ = one.tensors
    torch.testing.assert_close(R @ R.T, torch.eye(5), atol=1e-5, rtol=0)
    assert (W - R).abs().max() > 0.1


@pytest.mark.parametrize("family", [*FAMILIES])
def test_what_edits_nothing_is_the_model_of_every_family(family: str) -> None:
    net = net_of(family)
    plain = Stock(net).log_probs(IDS)
    R, _, b = tensors()
    same = Intervened(net, {0: (R, R.clone(), torch.zeros_like(b))}, prefix=None, suffix=None)
    assert torch.equal(same.log_probs(IDS), plain)
    same.edits.handles[0].remove()
    changed = at(net, [0, 1])
    assert not torch.allclose(changed.log_probs(IDS), plain, atol=1e-3)
    states = changed.hidden_states(IDS)  # the edit is what the next layer sees, and what probes do
    logits = torch.stack([changed.through_head(row, normalise=False) for row in states[-1]])
    assert torch.allclose(logits.log_softmax(-1), changed.log_probs(IDS), atol=1e-5)


def test_positions_before_an_edit_keep_their_logits() -> None:
    net = net_of()
    plain = Stock(net).log_probs(IDS)
    last = at(net, [0, 1], prefix=0, suffix=2)
    found = last.log_probs(IDS, prompt=9)
    assert torch.equal(found[:, :7], plain[:, :7])
    assert (found[:, 7:] - plain[:, 7:]).abs().amax(-1).min() > 1e-4  # those after see it through attention
    assert torch.equal(last.log_probs(IDS), plain)  # no prompt, no edit


def test_prefix_and_suffix_that_meet_edit_every_token_of_the_prompt_once() -> None:
    net = net_of()
    whole = {n: tensors() for n in (0, 1)}
    models = [Intervened(net, whole, prefix=prefix, suffix=suffix) for prefix, suffix in ((9, 9), (None, None), (5, 4))]
    found = []
    for model in models:
        others = [other for other in models if other is not model]
        switches = [(other, other.edits.everywhere) for other in others]
        for other in others:
            other.edits.everywhere = False
        found.append(model.log_probs(IDS[:, :9], prompt=9))
        for other, before in switches:
            other.edits.everywhere = before
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("prefix", "suffix"), [(None, None), (2, 3)])
def test_generation_with_the_cache_is_the_full_computation(prefix: int | None, suffix: int | None) -> None:
    model = at(net_of(), [1], prefix=prefix, suffix=suffix)
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, model.log_probs(ids, prompt=12)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, IDS, most=6), ids[:, 12:])


def test_prompts_are_runs_without_a_loss_also_beyond_the_window() -> None:
    mask = np.array([0, 0, 1, 0, 0, 0, 1, 1, 0, 0], dtype="u1")
    whole = places_in_runs(mask, 0, 10).tolist()
    assert whole == [[0, 1], [1, 0], [-1, -1], [0, 2], [1, 1], [2, 0], [-1, -1], [-1, -1], [0, 1], [1, 0]]
    for start in range(10):
        for length in range(1, 10 - start + 1):
            assert places_in_runs(mask, start, length).tolist() == whole[start : start + length]


def test_prompts_of_a_run_are_those_of_its_sequences(tmp_path: Path) -> None:
    made = stream(tmp_path / "data", masked=True)
    found = made.prompts(range(3, 9))
    targets = made.batch(range(3, 9)).targets
    assert torch.equal(found[:, 1:, 0] >= 0, targets[:, :-1] < 0)
    assert (stream(tmp_path / "plain").prompts(range(2)) == -1).all()


def loop_of(folder: Path, work: str, *, precision: str = "fp32", **rule: Any) -> Loop:
    """The training of edits of a pico model."""
    net, made = net_of(), stream(folder / "data", masked=True)
    torch.manual_seed(1)
    hook = Editing(net, made, ReftRule(rank=2, layers=[1], **{"prefix": None, "suffix": None, **rule}), [1])
    settings = TrainSettings(**{**SETTINGS, "precision": precision, "weight_decay": 0.0})
    return Loop(net, made, settings, where=WHERE.model_copy(update={"checkpoint_steps": 4}), work=folder / work,
                label="x", emit=lambda _e: None, hook=hook)  # fmt: skip


@pytest.mark.parametrize("rule", [{}, {"prefix": 1, "suffix": 2}])
def test_a_resumed_training_of_edits_ends_with_the_same_bytes(tmp_path: Path, rule: Any) -> None:
    whole = loop_of(tmp_path, "a", **rule)
    before = weights(whole)
    whole.run()
    stop_after(loop_of(tmp_path, "b", **rule), 5)
    again = loop_of(tmp_path, "b", **rule)
    assert again.run().resumed_from == 4
    wanted, found = weights(whole), weights(again)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    moved = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert {name.split(".")[0] for name in moved} == {"reft"}  # and nothing of the seed


def test_edits_stay_in_float32_where_the_rest_computes_in_bfloat16(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, "a", precision="bf16")
    seen = []
    one = loop.accelerator.unwrap_model(loop.model).reft["1"]
    with loop.cast.step():  # type: ignore[union-attr]
        seen = [tensor.dtype for tensor in one.tensors]
    assert seen == [torch.float32] * 3
    loop.run()
    R = one.tensors[0]
    torch.testing.assert_close(R @ R.T, torch.eye(2), atol=1e-5, rtol=0)


def opened(folder: Path) -> Any:
    """The log-probabilities of a published model."""
    with open_model(folder, where=WHERE) as model:
        assert isinstance(model, Opened)
        return model.log_probs(IDS)


def test_a_run_trains_edits_beside_an_untouched_seed_and_they_load_again(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "seed").iterdir()}
    said = ["reft={rank: 2, layers: [1], tokens: 4096, learning_rate: 2e-2}"]
    flags = [part for one in said for part in ("--set", one)]
    btx("run", "recipe.yaml", *flags, "--until", "reft", cwd=tmp_path)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "seed").iterdir()}
    step = Graph(load_recipe(recipe, [*said, f"run.directory={tmp_path / 'runs'}"]), tmp_path).steps["reft"]
    assert not (step.folder / "model.safetensors").exists()
    assert not torch.allclose(opened(step.folder), opened(tmp_path / "seed"), atol=1e-3)
    talk = CliRunner().invoke(main, ["chat", str(step.folder), "--device", "cpu", "--most", "3"], input="two plus\n")
    assert talk.exit_code == 0, talk.output


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{layers: [2]}", "reft.layers names 2, but the seed has layers 0 to 1. Correct it."),
        ("{rank: 33}", "reft.rank is 33, above the seed's hidden width 32. Correct it."),
        ("{positions: prompt}", "reft.positions: prompt needs data.loss_mask: completion"),
        ("{layers: []}", "reft edits nothing"),
        ("{mix: {maths: 1}}", "reft.mix: there is no domain 'maths'"),
    ],
)
def test_it_refuses_what_the_seed_has_not(tmp_path: Path, said: str, why: str) -> None:
    write_project(tmp_path)
    assert why in btx("run", "recipe.yaml", "--set", f"reft={said}", cwd=tmp_path, code=2).stderr
