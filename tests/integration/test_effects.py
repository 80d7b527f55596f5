"""What the conversions that leave the seed's weights alone do, over three seed models: directions, wide margins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.command import btx

pytestmark = pytest.mark.slow
SEED: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 96, "layers": 2, "heads": 2, "tokens": "60k",
    "learning_rate": 3e-3, "batch_tokens": 1024,
}  # fmt: skip
LARGE: dict[str, Any] = {**SEED, "hidden_size": 64, "intermediate_size": 192, "layers": 3}
RECIPE: dict[str, Any] = {
    "domains": {name: {"data": [f"builtin:{name}"], "tokens": "30k"} for name in ("math", "code")},
    "train": {"sequence_length": 128, "batch_tokens": 1024, "precision": "fp32", "learning_rate": 3e-3},
    "finetune": {"tokens": "10k"},
    "evaluate": {"tokens": "6k", "precision": "fp32"},
    "run": {"device": "cpu", "workers": 2, "threads": 1},
}
MADE = {"reft": {"rank": 16, "learning_rate": 5e-2}, "adapter": {"options": {"r": 8}, "learning_rate": 3e-2}}


def recipe(folder: Path, name: str, shape: dict[str, Any], **more: Any) -> str:
    """A recipe with a seed of a shape."""
    said = {"name": name, "seed": {"checkpoint": "builtin", "builtin": shape}, **RECIPE, **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(said))
    return f"{name}.yaml"


def scores(folder: Path, name: str, *said: str) -> dict[str, dict[str, float]]:
    """Bits per byte by model and domain."""
    flags = [part for one in said for part in ("--set", one)]
    done = btx("run", recipe(folder, name, SEED, **MADE), *flags, "--until", "evaluate", cwd=folder, seconds=900)
    report = Path(done.stdout.strip().splitlines()[-1].partition(": ")[2])
    found: dict[str, dict[str, float]] = json.loads((report / "results.json").read_text())["bits_per_byte"]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_learn_and_an_expert_steers_a_larger_model_toward_its_domain(tmp_path: Path, seed: int) -> None:
    drawn = f"train.seed={seed}"
    large = recipe(tmp_path, "large", LARGE)
    btx("branch", large, "--set", drawn, cwd=tmp_path, seconds=900)
    base = btx("path", large, "seed", "--set", drawn, cwd=tmp_path).stdout.strip()
    steered, alone = (
        scores(tmp_path, "small", drawn, f"proxy.base={base}", f"proxy.weights.math={weight}") for weight in (1, 0)
    )
    assert steered["proxy"]["math"] < alone["proxy"]["math"] - 0.03
    for name in ("reft", "adapter"):
        before, after = (np.mean([*steered[one].values()]) for one in ("seed", name))
        assert after < before - 0.003, name
