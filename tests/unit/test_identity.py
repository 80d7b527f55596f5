"""The identity of a step: what re-keys it, and what does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest

from btx.cli.main import graph_of
from btx.events import Emit
from btx.graph.step import Step
from btx.recipe.fields import later
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.settings import EvaluateSettings, RunSettings, Settings, TrainSettings
from tests.support.world import World

LABELS = ("tokens:math", "branch", "train:math", "average", "merge", "finetune", "measure:finetuned",
          "evaluate", "export", "report")  # fmt: skip


def keys(world: World) -> dict[str, str]:
    """The keys of all steps."""
    return {label: world.key(label) for label in LABELS}


@pytest.mark.parametrize(
    "key",
    ["directory", "workers", "kernel", "micro_batch", "threads", "checkpoint_minutes", "checkpoint_steps", "launch",
     "report_to", "device", "max_memory"],
)  # fmt: skip
def test_how_a_run_is_done_changes_no_key(world: World, key: str) -> None:
    before = keys(world)
    values = {"directory": "elsewhere", "kernel": "eager", "launch": "x.yaml", "report_to": ["wandb"], "device": "auto"}
    world.set(f"run.{key}", values.get(key, 3))
    assert keys(world) == before
    assert key in RunSettings.model_fields


CHANGES: dict[str, tuple[Any, str]] = {
    "train.sequence_length": (8, "train:math"),
    "train.batch_tokens": (64, "train:math"),
    "train.learning_rate": (2e-4, "train:math"),
    "train.min_lr_ratio": (0.2, "train:math"),
    "train.warmup_steps": (1, "train:math"),
    "train.weight_decay": (0.2, "train:math"),
    "train.betas": ([0.8, 0.9], "train:math"),
    "train.epsilon": (1e-7, "train:math"),
    "train.max_grad_norm": (2.0, "train:math"),
    "train.precision": ("bf16", "train:math"),
    "train.gradient_checkpointing": (True, "train:math"),
    "train.dtype": ("bf16", "train:math"),
    "train.seed": (1, "train:math"),
    "train.max_bad_steps": (5, "train:math"),
    "domains.math.tokens": (128, "train:math"),
    "data.holdout": (0.1, "tokens:math"),
    "data.select": (0.1, "tokens:math"),
    "data.ignore": (["x"], "tokens:math"),
    "data.date": ("2026-01-31", "tokens:math"),
    "data.valid_bytes": (99, "tokens:math"),
    "data.loss_mask": ("completion", "tokens:math"),
    "merge.include_seed": (False, "average"),
    "merge.shared": ("linear", "average"),
    "merge.router_entropy": (0.5, "merge"),
    "merge.router": ("orthogonal", "merge"),
    "merge.experts": ("split", "merge"),
    "merge.chunks": (3, "merge"),
    "merge.router_tokens": (99, "merge"),
    "merge.seed": (1, "merge"),
    "merge.dtype": ("bf16", "average"),
    "merge.layers": ([0], "merge"),
    "merge.copies": (2, "merge"),
    "merge.reinitialize": (0.5, "merge"),
    "merge.shared_expert": ("seed", "merge"),
    "finetune.top_k": (1, "finetune"),
    "finetune.balance": ({"type": "switch"}, "finetune"),
    "finetune.mix": ({"math": 1, "law": 2}, "finetune"),
    "finetune.tokens": (96, "finetune"),
    "evaluate.tokens": (9, "measure:finetuned"),
    "evaluate.split": ("select", "measure:finetuned"),
    "evaluate.precision": ("bf16", "measure:finetuned"),
    "evaluate.bootstrap": (10, "evaluate"),
    "evaluate.seed": (1, "evaluate"),
    "evaluate.sequence_length": (8, "measure:finetuned"),
    "export.license": ("mit", "export"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_the_step_that_it_belongs_to_and_all_after_it_and_none_before(world: World, key: str) -> None:
    value, first = CHANGES[key]
    before = keys(world)
    world.set(key, value)
    after = keys(world)
    changed = [label for label in LABELS if before[label] != after[label]]
    assert changed[0] == first
    assert changed[-1] == "report"
    missing = [label for label in LABELS[LABELS.index(first) :] if label not in changed]
    assert missing in ([], ["branch"], ["average"])


def test_a_builtin_seed_depends_on_no_setting_that_it_overrides_or_has_no_use_for(world: World) -> None:
    """It has its own learning rate and batch, its loss covers every token, and training a tokenizer uses no date."""
    world.set("seed", {"checkpoint": "builtin", "data": ["data/math.jsonl"]})
    world.set("domains", {"math": {"data": ["data/law.jsonl"], "tokens": 64}})
    before = {label: world.key(label) for label in ("tokenizer", "tokens:seed", "seed", "train:math")}
    for key, value in {"train.learning_rate": 5e-5, "data.loss_mask": "completion"}.items():
        world.set(key, value)
        for label in ("tokenizer", "tokens:seed", "seed"):
            assert world.key(label) == before[label], (key, label)
    assert world.key("train:math") != before["train:math"]
    world.set("data.valid_bytes", 99)
    assert world.key("tokenizer") == before["tokenizer"]
    world.set("seed.builtin", {"learning_rate": 1e-3})
    assert world.key("seed") != before["seed"]
    world.set("seed.builtin", {"min_lr_ratio": 1.0})
    undecayed = world.key("seed")
    assert undecayed != before["seed"]
    world.set("train.min_lr_ratio", 0.5)
    assert world.key("seed") == undecayed


def test_every_setting_of_training_and_merge_is_tried() -> None:
    assert {f"train.{name}" for name in TrainSettings.model_fields} <= set(CHANGES)
    assert {f"merge.{name}" for name in MergeSettings.model_fields} <= set(CHANGES)
    assert {f"evaluate.{name}" for name in EvaluateSettings.model_fields} - {"evaluate.batch_tokens"} <= set(CHANGES)


def test_the_order_of_the_experts_counts(world: World) -> None:
    before = keys(world)
    world.recipe["domains"] = dict(reversed(world.recipe["domains"].items()))
    after = keys(world)
    assert after["train:math"] == before["train:math"]
    assert after["merge"] != before["merge"]


def test_the_same_content_under_another_path_has_the_same_keys(world: World, tmp_path: Path) -> None:
    before = keys(world)
    for part in ("data/math.jsonl", "law"):
        shutil.move(world.root / part, tmp_path / f"moved-{Path(part).name}")
    world.set("domains.math.data", ["moved-math.jsonl"])
    world.set("domains.law.checkpoint", "./moved-law/")
    assert keys(world) == before
    with (tmp_path / "moved-math.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert keys(world)["tokens:math"] != before["tokens:math"]
    assert keys(world)["branch"] == before["branch"]


def test_the_same_bytes_read_as_another_kind_are_another_content(world: World) -> None:
    before = world.key("tokens:math")
    shutil.copy(world.math, world.root / "math.txt")
    world.set("domains.math.data", ["math.txt"])
    assert world.key("tokens:math") != before


def test_the_tokenizer_of_a_builtin_seed_does_not_depend_on_where_its_data_lies(world: World) -> None:
    world.set("seed", {"checkpoint": "builtin", "data": ["data/math.jsonl"]})
    world.set("domains", {"math": {"data": ["data/law.jsonl"], "tokens": 64}})
    before = world.key("tokenizer")
    shutil.copy(world.math, world.root / "moved.jsonl")
    world.set("seed.data", ["moved.jsonl"])
    assert world.key("tokenizer") == before


def test_nested_execution_settings_are_no_identity() -> None:
    class Outer(Settings):
        where: RunSettings = RunSettings()
        n: int = 0

    assert Outer(where=RunSettings(threads=3)).identity() == Outer().identity() == {"where": {}, "n": 0}


class Grown(Step):
    """A step that got two fields after its first keys."""

    kind: ClassVar[str] = "grown"
    number: int
    more: bool = later(False)
    tasks: dict[str, int] = later({})

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Nothing."""
        return {}


def test_a_later_field_re_keys_only_where_it_is_used(tmp_path: Path) -> None:
    def grown(**more: Any) -> Grown:
        return Grown(number=1, root=tmp_path, where=RunSettings(), name="", **more)

    assert "more" not in grown().identity()
    assert grown(more=False, tasks={}).key == grown().key
    assert (
        len({grown().key, grown(more=True).key, grown(tasks={"a": 1}).key, grown(more=True, tasks={"a": 1}).key}) == 4
    )


def test_what_a_domain_is_called_decides_neither_its_experts_key_nor_the_order_of_its_data(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal keys mean equal results, so nothing that is not hashed may seed the sampler."""
    shutil.copy(world.math, world.root / "same.jsonl")
    world.recipe["domains"]["twin"] = {**world.recipe["domains"]["math"], "data": ["same.jsonl"]}
    steps = [graph_of(world.write(), ()).steps[f"train:{name}"] for name in ("math", "twin")]
    assert steps[0].key == steps[1].key
    streams: list[Any] = []
    monkeypatch.setattr("btx.steps.train.fit", lambda _step, **how: streams.append((*how["tokens"], how["weights"])))
    for step in steps:
        step.run(world.root, world.root, lambda _event: None)
    assert streams[0] == streams[1]
