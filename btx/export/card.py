"""The model card of an export: front matter that hubs read, and what a user of the model wants to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from btx import __version__
from btx.checkpoints.validate import read_config
from btx.export.portable import notes
from btx.models.families import mixture_family
from btx.models.flops import parameters


@dataclass(frozen=True)
class About:
    """Facts for a model card that the model's folder does not hold.

    `parents` are (name, kind of the step that made it, digest), `data` (name, training tokens at hand, held-out
    documents), `recipe` the sections that decide the model, `results` what the evaluation wrote, None without one.
    """

    title: str
    base_model: str
    license: str | None
    layout: str
    attention: bool  # experts in attention too
    experts: list[str]
    parents: list[tuple[str, str, str]]
    data: list[tuple[str, int, int]]
    recipe: dict[str, Any]
    results: dict[str, Any] | None


def table(rows: dict[str, dict[str, float]], corner: str, digits: int = 3) -> str:
    """A Markdown table of numbers: one line a row, the columns of the first row."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {n} | {' | '.join(f'{row[c]:.{digits}f}' for c in columns)} |" for n, row in rows.items()]
    return "\n".join(lines)


def _front(about: About) -> str:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": about.base_model,
        "tags": ["btx", "branch-train-mix", "mixture-of-experts", "merge"],
    }
    if about.license:
        front["license"] = about.license
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n"


def _experts(about: About) -> str:
    lines = ["| model | made by | SHA-256 |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {kind} | `{digest}` |" for name, kind, digest in about.parents)])


def _data(about: About) -> str:
    lines = ["| data | training tokens at hand | held-out documents |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {tokens:,} | {documents} |" for name, tokens, documents in about.data)])


def _measured(results: dict[str, Any] | None) -> str:
    if results is None:
        return "## Evaluation\n\nNothing was measured.\n"
    rows = {m: {**row, "mean": results["mean"][m]} for m, row in results["bits_per_byte"].items()}
    routing = results["routing"][results["exported"]]
    shares = {d: dict(zip(results["experts"], found["mean"], strict=True)) for d, found in routing.items()}
    return f"""## Evaluation

Bits per byte on held-out documents ({results["split"]}), lower is better.

{table(rows, "model")}
{_tasks(results)}{finetuning_note(results)}
## Routing

Share of the token-choices per expert, mean over layers, on held-out text.

{table(shares, "domain")}
"""


def _tasks(results: dict[str, Any]) -> str:
    """The accuracies of the exported model and of the seed on each task, if there are tasks."""
    said = []
    for task, found in results.get("tasks", {}).items():
        rows = ["| model | right | accuracy | 95 % interval |", "|---|---|---|---|"]
        for name in ("seed", results["exported"]):
            one = found["models"][name]
            low, high = one["interval_95"]
            rows.append(
                f"| {name} | {one['right']} of {one['items']} | {one['accuracy']:.3f} | {low:.3f} to {high:.3f} |"
            )
        seen = sum(about["found"] for about in found["contamination"].values())
        note = f"\n\nQuestions that stand word for word in the training text: {seen}." if seen else ""
        said.append(f"\nTask {task}:\n\n" + "\n".join(rows) + note + "\n")
    return "".join(said)


def finetuning_note(results: dict[str, Any]) -> str:
    """A sentence if the finetuning ended worse than it began."""
    found = results.get("finetuning")
    if not found or found["mean"][found["after"]] <= found["mean"][found["before"]]:
        return ""
    before, after = (f"{found[side]} {found['mean'][found[side]]:.3f}" for side in ("before", "after"))
    return f"\nOn the select split the finetuning ended worse than it began: {after}, {before}.\n"


def card(about: About, folder: Path) -> str:
    """The model card of `folder`: Markdown with front matter."""
    config = read_config(folder)
    count = parameters(config)
    family = mixture_family(config)
    per_token = config[family.top_k_field] if family else 1
    recipe = yaml.safe_dump(about.recipe, sort_keys=False)
    parts = "their feed-forward blocks" if not about.attention else (
        "their feed-forward blocks and their attention's query and output projections")  # fmt: skip
    return f"""{_front(about)}
# {about.title}

A Mixture of Experts ({config["model_type"]}, {len(about.experts)} experts, {per_token} per token; {count.total:,}
parameters, {count.active:,} active) made by Branch-Train-MiX (arXiv 2403.07816) with btx {__version__}: experts
that descend from one seed, {parts} kept apart, every other tensor averaged, the
whole finetuned with a learned token-level router.

```python
from transformers import pipeline
print(pipeline("text-generation", model="PATH")("Once", max_new_tokens=40)[0]["generated_text"])
```

{_measured(about.results)}

## Parents

{_experts(about)}

## Data

{_data(about)}

## Recipe

```yaml
{recipe}```

## Where it loads

{chr(10).join(notes(config, about.layout, folder))}

`SHA256SUMS` has the digest of every file but `btx.json`, which
has them too; `proof.json` has the logits of probe prompts; `btx check FOLDER` compares both.
"""


def changed_card(did: str, parent: str, rows: dict[str, dict[str, float]], loads: list[str]) -> str:
    """The model card of a mixture that a `btx moe` command changed; `loads` are the notes on where it loads."""
    front = yaml.safe_dump({"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": parent,
                            "tags": ["btx", "mixture-of-experts"]}, sort_keys=False)  # fmt: skip
    measured = f"Bits per byte on held-out documents:\n\n{table(rows, 'domain')}" if rows else "Nothing was measured."
    return f"""---
{front}---

# {parent}, changed

Made from {parent} by `{did}` (btx {__version__}). Tensors that the command does not change are bit for bit the same.

{measured}

## Where it loads

{chr(10).join(loads)}

`SHA256SUMS` has the digest of every file but `btx.json`, `proof.json` the logits of probe prompts; `btx check FOLDER`
compares both.
"""
