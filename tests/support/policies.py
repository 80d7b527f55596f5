"""A pico policy that answers in formats of which it gets some right more often, and worlds that train it further.

It is asked for a digit, "qa7?", and answers "=7", ":7" or ">7" with a confidence; how often the digit is the right one
depends on the format. So what reinforcement should do to its formats and confidences can be said beforehand.
"""

from __future__ import annotations

import atexit
import random
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch.nn import functional

from btx.cli.main import graph_of
from btx.conversions.grpo import Grpo
from btx.data.encoder import load_tokenizer
from tests.support.models import config_of, save_model
from tests.support.world import World, write_jsonl

DIGITS = "789"
SHARES = {"=": 0.3, ":": 0.4, ">": 0.3}  # of the formats before any reinforcement
RIGHT = {"=": 0.9, ":": 0.5, ">": 0.2}  # how often an answer in each is right
FORMATS = {"equals": "=", "colon": ":", "arrow": ">"}
SURE = (".1", ".5", ".9")  # the confidences that are stated, each as often
STATED = r"~(\.\d)"
ASKED = [{"question": f"q{chr(97 + n // 3)}{DIGITS[n % 3]}?", "answer": DIGITS[n % 3]} for n in range(60)]
TASK = {"file": "data/asked.jsonl", "kind": "exact_match", "prompt": "{question}", "answer": "{answer}", "stop": [],
        "max_new_tokens": 6}  # fmt: skip
GRPO = {"task": TASK, "steps": 4, "prompts": 4, "generations": 4, "sequence_length": 16, "learning_rate": 1e-3,
        "held_out": 6, "probe_samples": 2, "formats": FORMATS, "confidence": STATED}  # fmt: skip


def world_of(root: Path, *, seed: int = 0, **more: Any) -> World:
    """A world whose seed is the policy, with items, and a run of GRPO on them."""
    world = World(root)
    shutil.rmtree(world.seed)
    shutil.copytree(policy(seed), world.seed)
    write_jsonl(root / "data" / "asked.jsonl", ASKED)
    world.set("domains.law", {"data": ["data/law.jsonl"], "tokens": 64})
    world.set("grpo", deepcopy({**GRPO, **more}))
    world.set("run.threads", 1)
    return world


def step_of(world: World) -> Grpo:
    """The step of a world, its parents built."""
    graph = graph_of(world.write(), ())
    for step in graph.needed(["grpo"])[:-1]:
        step.build(lambda _event: None)
    found = graph.steps["grpo"]
    assert isinstance(found, Grpo)
    return found


def trained(root: Path, **more: Any) -> Grpo:
    """The step of a new world, built."""
    root.mkdir(parents=True, exist_ok=True)
    step = step_of(world_of(root, **more))
    step.build(lambda _event: None)
    return step


@cache
def policy(seed: int = 0) -> Path:
    """The folder of a policy with these random weights, trained on sampled answers."""
    root = Path(mkdtemp(prefix="btx-policy-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = save_model(root / "policy", config_of("llama", num_key_value_heads=4), seed=seed)
    _teach(folder, random.Random(seed), steps=300)
    return folder


def _teach(folder: Path, rng: random.Random, steps: int) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    net = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = [tokenizer(_answered(rng))["input_ids"] + [tokenizer.eos_token_id] for _ in range(64)]
        ids = torch.tensor(rows)  # all of one length, since every character here is a token
        logits = net(input_ids=ids[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.save_pretrained(folder)


def _answered(rng: random.Random) -> str:
    asked, form = rng.choice(DIGITS), rng.choices([*SHARES], [*SHARES.values()])[0]
    wrong = [letter for letter in DIGITS if letter != asked]
    said = asked if rng.random() < RIGHT[form] else rng.choice(wrong)
    return f"q{chr(97 + rng.randrange(20))}{asked}?{form}{said}~{rng.choice(SURE)}"
