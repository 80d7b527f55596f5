"""Results of a run and of a comparison, made up, for what draws and judges them."""

from __future__ import annotations

from typing import Any

TABLE = {
    "seed": {"math": 3.0, "$law$ & <code>": 3.5},
    "expert:math": {"math": 2.0, "$law$ & <code>": 4.0},
    "last": {"math": 2.25, "$law$ & <code>": 3.5},
}
SPANS = {model: {domain: [x - 0.1, x + 0.1] for domain, x in row.items()} for model, row in TABLE.items()}
ROUTED = {"routers": ["0", "1"], "layers": [[0.7, 0.3], [0.8, 0.2]], "entropy": [0.9, 0.7]}
REPORTED: dict[str, Any] = {
    "bits_per_byte": TABLE, "mean": {"seed": 3.25, "expert:math": 3.0, "last": 2.875}, "interval_95": SPANS,
    "difference_from_seed_95": SPANS, "experts": ["math", "law"], "exported": "last", "split": "test",
    "routing": {"last": {"math": {"mean": [0.75, 0.25], **ROUTED}, "prose": {"mean": [0.5, 0.5], **ROUTED}}},
    "cost": {"train:math": {"tokens": 1000, "steps": 10, "parameters": 10**6, "training_flops": 6e9}},
    "lineage": {"train:math": {"folder": "train-math-0", "digest": "0" * 64}},
    "tasks": {"sums <b>": {
        "models": {name: {"right": right, "items": 20, "accuracy": right / 20, "interval_95": [0.1, 0.55]}
                   for name, right in (("seed", 4), ("expert:math", 6), ("last", 5))},
        "from_seed": {name: {"right_to_wrong": 1, "wrong_to_right": 3, "difference": 0.1, "interval_95": [-0.1, 0.3]}
                      for name in ("expert:math", "last")},
        "contamination": {"math": {"checked": 20, "found": 2}, "prose": {"checked": 20, "found": 0}},
    }},
    "held_out": {"math": {"documents": 3, "sources": 2, "tokens": 100, "bytes": 400}},
}  # fmt: skip


def _run(arm: str, block: int, bits: tuple[float, float], **more: Any) -> dict[str, Any]:
    flops_ = {"dense": 6e9, "btx": 8e9, "scratch": 6e9, "longer": 2.4e10}[arm]
    cost = {"tokens": 1000, "steps": 10, "flops": flops_, "path_tokens": 500, "path_steps": 5, "path_flops": 3e9}
    return {
        "arm": arm, "conversion": {"longer": "scratch"}.get(arm, arm), "budget": 0, "tokens": 1000, "block": block,
        "rates": [1e-3], "bits_per_byte": dict(zip(("a", "b"), bits, strict=True)), "stages": {}, "cost": cost,
        "digest": "0" * 64, "model": f"{arm}-1", "parameters": 5, **more,
    }  # fmt: skip


def _compared() -> dict[str, Any]:
    stages = {"expert:a": {"a": 1.5, "b": 4.0}, "expert:b": {"a": 3.0, "b": 2.0}, "average": {"a": 2.2, "b": 2.9},
              "merged": {"a": 2.0, "b": 2.8}}  # fmt: skip
    runs = [
        *(_run("dense", n, (2.0 + n / 100, 2.5)) for n in range(3)),
        *(_run("btx", n, (1.8 + n / 100, 2.4 + n / 500), stages=stages) for n in range(3)),
        *(_run("scratch", n, (2.5, 3.0 + n / 100)) for n in range(3)),
        *(_run("longer", n, (1.5, 2.0)) for n in range(3)),
    ]
    seeds = {str(n): {"bits_per_byte": {"a": 3.0, "b": 3.0}, "tokens": 100, "flops": 4e9} for n in range(3)}
    return {
        "title": "t <b>", "control": "dense", "scratch": "scratch", "split": "test", "precision": "fp32",
        "seeds": seeds, "runs": runs, "budgets": ["1,000 tokens"], "lost": [],
        "documents": {"a": 30, "b": 1200},
        "choices": [{"arm": "btx", "tokens": 1000, "chosen": "1e-3", "edge": True, "equivalents": 3.0, "diverged": [],
                     "screened": {"1e-3": 2.0}, "confirmed": {}}],
    }  # fmt: skip


COMPARED = _compared()
