"""GRPO by trl on a pico policy: an ordinary checkpoint, the same bytes after an interruption, and what it changes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pyarrow import parquet

pytest.importorskip("trl")

from btx.cli.main import graph_of, main
from btx.cli.plan import rows as planned
from btx.conversions.grpo import Grpo
from btx.conversions.registry import load_recipe, open_model
from btx.errors import DivergedError
from btx.recipe.settings import RunSettings
from btx.rl import trainer
from btx.rl.policy import Policy
from btx.rl.rewards import optimum
from tests.support.policies import ASKED, FORMATS, GRPO, step_of, trained, world_of
from tests.support.world import World, refused, setting


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_it_is_trained_measured_and_reported_beside_the_others(tmp_path: Path) -> None:
    world = world_of(tmp_path, variants={"sure": {"reward": "calibrated"}})
    done = CliRunner().invoke(main, ["run", str(world.write())])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    graph = graph_of(world.write(), ())
    results = json.loads((graph.steps["report"].folder / "results.json").read_text(encoding="utf-8"))
    assert {"grpo", "grpo-sure"} < set(results["bits_per_byte"])
    assert results["cost"]["grpo"]["tokens"] == results["spent"]["grpo"]["tokens"] > 0
    for name, reward in (("grpo", "binary"), ("grpo-sure", "calibrated")):
        published = json.loads((graph.steps[name.replace("-", ":")].folder / "policy.json").read_text())
        policy = {"reward": reward, "kl": 0.0, "first": published["0"], "last": published["4"]}
        assert results["policies"][name] == policy
    assert "RL's format collapse" in done.output
    assert "Binary rewards hurt calibration" in (graph.steps["report"].folder / "report.html").read_text("utf-8")
    step = graph.steps["grpo"]
    assert isinstance(step, Grpo)
    with open_model(step.folder, where=RunSettings(device="cpu", threads=1)) as model:  # loads again
        assert torch.isfinite(model.log_probs(torch.tensor([[1, 2, 3]]))).all()
    assert json.loads((step.folder / "config.json").read_text()) == {
        **json.loads((world.seed / "config.json").read_text()), "dtype": "float32"
    }  # fmt: skip
    row = next(row for row in planned(load_recipe(world.write(), []), tmp_path) if row.label == "grpo")
    assert row.tokens == GRPO["steps"] * GRPO["prompts"] * GRPO["generations"] * GRPO["sequence_length"]  # type: ignore[operator]
    assert "Everything is done already" in CliRunner().invoke(main, ["run", str(world.write())]).output


def test_what_is_seen_of_the_held_out_items(tmp_path: Path) -> None:
    step = trained(tmp_path, probe_every=2, kl=0.5)
    numbers, rows = step.numbers(), parquet.read_table(step.folder / "policy.parquet").to_pylist()
    assert list(numbers) == ["0", "2", "4"]
    for at, found in numbers.items():
        mine = [row for row in rows if row["step"] == int(at)]
        assert len(mine) == 6 * 2
        assert found["accuracy"] == sum(row["right"] for row in mine) / len(mine)
        for name in (*FORMATS, "other"):
            assert found[f"share_{name}"] == sum(row["format"] == name for row in mine) / len(mine)
        assert {"entropy", "distinct_2", "repeated", "pass_at_k", "stated", "stated_ece"} < set(found)
        for row in mine:  # the answer is the digit after the format's sign, not the confidence after it
            if row["completion"][1:2].isdigit():
                assert row["answer"] == row["completion"][1]
    asked = {row["prompt_sha256"] for row in rows}
    assert len(asked) == 6
    first = numbers["0"]
    start = {name: first[f"share_{name}"] for name in FORMATS}
    mine = [row for row in rows if not row["step"]]
    right = {name: [row["right"] for row in mine if row["format"] == name] for name in FORMATS}
    assert {name: first[f"optimum_{name}"] for name in FORMATS if right[name]} == pytest.approx(
        optimum({name: start[name] for name in FORMATS if right[name]},
                {name: sum(one) / len(one) for name, one in right.items() if one}, 0.5)
    )  # fmt: skip


def test_no_item_that_is_looked_at_is_trained_on_and_each_is_asked_once_an_epoch(tmp_path: Path) -> None:
    step = step_of(world_of(tmp_path))
    made = step._made(step.items())
    assert len(made.items) == 54
    assert not {one.digest for one in made.items} & {one.digest for one in made.held}
    for epoch in range(3):
        asked = [made.item(slot).digest for slot in range(54 * epoch, 54 * (epoch + 1))]
        assert len(set(asked)) == 54
    assert [made.item(slot) for slot in range(54)] != [made.item(slot) for slot in range(54, 108)]


# ---- trl does what the settings say ----


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_advantages_are_those_of_the_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    """A lone success in a group of G has (G − 1)/√G over the deviation, and (G − 1)/G without it."""
    import trl

    seen: list[tuple[list[float], torch.Tensor]] = []

    class Seen(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            seen.append(([*self.callback_handler.callbacks[-1].policy.rewards], found["advantages"].clone()))
            return found

    monkeypatch.setattr(trl, "GRPOTrainer", Seen)
    real = Policy.reward
    lone = iter([True, *[False] * 3, *[False] * 12] * 99)  # one right answer in the first group of each step
    monkeypatch.setattr(Policy, "reward", lambda self, row: real(self, {**row, "right": next(lone)}))
    trained(tmp_path, scale_rewards=scale)
    assert len(seen) == GRPO["steps"]
    for rewards, advantages in seen:
        assert rewards == [1.0, *[0.0] * 15]
        over = 1e-4 + math.sqrt(((3 / 4) ** 2 + 3 / 16) / 3) if scale == "group" else 1
        assert advantages[:4].tolist() == pytest.approx([0.75 / over, *[-0.25 / over] * 3], rel=1e-5)
        assert not advantages[4:].any()
        if scale == "group":
            assert float(advantages[0]) == pytest.approx(3 / math.sqrt(4), rel=1e-3)


def test_without_a_difference_of_rewards_no_weight_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "reward", lambda _self, _row: 1.0)
    step = trained(tmp_path)
    with open_model(step.folder, where=step.where) as one, open_model(tmp_path / "seed", where=step.where) as other:
        ids = torch.arange(12)[None]
        assert torch.equal(one.log_probs(ids), other.log_probs(ids))


def test_passes_of_any_size_give_the_same_policy(tmp_path: Path) -> None:
    found = []
    for size in (16, 4):
        world = world_of(tmp_path / str(size)) if (tmp_path / str(size)).mkdir() is None else None
        assert world
        world.set("run.micro_batch", size)
        step = step_of(world)
        step.build(lambda _event: None)
        with open_model(step.folder, where=step.where) as model:
            found.append(model.log_probs(torch.arange(12)[None]))
    assert torch.allclose(found[0], found[1], atol=1e-4)
    with open_model(tmp_path / "4" / "seed", where=RunSettings(device="cpu", threads=1)) as model:
        assert not torch.allclose(found[0], model.log_probs(torch.arange(12)[None]), atol=1e-3)


def test_a_policy_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="learning_rate"):
        trained(tmp_path, learning_rate=1e30, warmup_steps=0)


# ---- refusals ----


@pytest.mark.parametrize(("key", "value", "words"), [
    ("grpo.variants", {"math": {"kl": 0.5}}, ("grpo.variants", "math", "expert")),
    ("grpo.variants", {"x": {}}, ("grpo.variants", "x", "same")),
    ("grpo.variants", {"x": {"klee": 1}}, ("grpo.variants.x", "klee")),
    ("grpo.variants", {"x y": {"kl": 1}}, ("grpo.variants",)),
    ("grpo.task.file", "data/none.jsonl", ("grpo.task.file", "does not exist")),
    ("grpo.task.answer", "none", ("asked.jsonl:1", "no number")),
    ("grpo.task.prompt", "{quest}", ("asked.jsonl:1", "'quest'")),
    ("grpo.task.chat", True, ("no chat template",)),
    ("grpo.task.limit", 3, ("grpo.task", "too few")),
    ("grpo.sequence_length", 8, ("grpo", "positions")),
    ("grpo.sequence_length", 4096, ("grpo.sequence_length",)),
    ("grpo.reward", "brier", ("grpo.reward",)),
    ("grpo.passrate", "data/none.jsonl", ("data/none.jsonl",)),
    ("grpo.precision", "bf16", ("grpo.precision", "GPU")),
    ("run.launch", "x.yaml", ("run.launch",)),
    ("tasks", {"same": {"file": "data/asked.jsonl", "kind": "exact_match"}}, ("tasks.same", "grpo trains on")),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, key: str, value: Any, words: tuple[str, ...]
) -> None:
    world = world_of(tmp_path)
    setting(key, value)(world)
    if key == "grpo.passrate":
        world.set("grpo.bands", ["hard"])
    refused(world.write(), world.runs, 2, words)


def test_without_trl_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    world = world_of(tmp_path)
    refused(world.write(), world.runs, 5, ("trl", "pip install 'btx[rl]'"))
    with pytest.raises(Exception, match="rl"):
        trainer.require_trl()


def test_a_seed_whose_config_names_no_class_has_a_reference_too(tmp_path: Path) -> None:
    world = world_of(tmp_path, kl=0.5, steps=1)
    config = json.loads((world.seed / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]  # as a builtin seed's
    (world.seed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    step = step_of(world)
    step.build(lambda _event: None)
    assert step.numbers()["1"]


def test_a_variant_is_the_run_with_its_changes_and_re_keys_nothing_else(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    alone = world.key("grpo")
    world.set("grpo.variants", {"held": {"kl": 0.5}, "few": {"task": {"limit": 30}}})
    assert world.key("grpo") == alone
    held, few = (world.key(f"grpo:{name}") for name in ("held", "few"))
    world.set("grpo.variants", {})
    world.set("grpo.kl", 0.5)
    assert world.key("grpo") == held
    world.set("grpo.kl", 0.0)
    world.set("grpo.task.limit", 30)
    assert world.key("grpo") == few


def test_what_re_keys_a_run(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    first = world.key("grpo")
    shutil.move(tmp_path / "data" / "asked.jsonl", tmp_path / "data" / "others.jsonl")
    world.set("grpo.task.file", "data/others.jsonl")
    assert world.key("grpo") == first  # the content decides, not the path
    for key, value in {"kl": 0.1, "steps": 5, "reward": "calibrated", "task.max_new_tokens": 5, "seed": 1}.items():
        other = World.__new__(World)
        other.__dict__ = {**world.__dict__, "recipe": json.loads(json.dumps(world.recipe))}
        other.set(f"grpo.{key}", value)
        assert other.key("grpo") != first, key
    assert len(ASKED) == 60
