"""A pico project: a seed, two corpora and a recipe over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.models import config_of, save_model
from tests.support.shapes import sparse_config

WORDS = {
    "math": "two plus three is five and seven times six is forty two so the sum of both is forty seven ",
    "code": "def add(a, b): return a + b  # and for x in range(3): print(add(x, x)) while True: break ",
}


def write_corpus(path: Path, domain: str, *, documents: int = 40) -> Path:
    """A JSON-lines file of documents that differ, some of them longer than others."""
    import random

    chance = random.Random(domain)
    words = WORDS[domain].split()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(chance.choice(words) for _ in range(60 + number))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    return path


# Both precisions are named, since auto is bf16 on some processors and tests compare exactly.
RECIPE = """\
name: pico
seed: {checkpoint: seed, data: ["corpora/*.jsonl"]}
domains:
  math: {data: ["corpora/math.jsonl"], tokens: 3072}
  code: {data: ["corpora/code.jsonl"], tokens: 3072}
train: {sequence_length: 64, batch_tokens: 256, learning_rate: 1e-3, precision: fp32}
data: {holdout: 0.2}
finetune: {tokens: 1024, top_k: 2}
evaluate: {tokens: 2000, bootstrap: 50, precision: fp32}
run: {device: cpu, threads: 1}
"""


def write_project(folder: Path, *, family: str = "llama", mixture: str = "") -> Path:
    """A pico seed, two corpora and a recipe over them; returns the recipe's path. The seed may be a `mixture`."""
    save_model(folder / "seed", sparse_config(mixture) if mixture else config_of(family))
    for domain in WORDS:
        write_corpus(folder / "corpora" / f"{domain}.jsonl", domain)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.yaml"


SMALL: dict[str, Any] = {"name": "r", "seed": {"checkpoint": "s"}, "domains": {"a": {"data": ["a"], "tokens": 5}}}
