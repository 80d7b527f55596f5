"""`btx init`: a commented recipe to start from."""

from __future__ import annotations

import re
from pathlib import Path

from btx.errors import RecipeError
from btx.recipe.recipe import NAME

TEMPLATE = """\
# {name}: from one checkpoint and several domains to a Mixture of Experts.
#   btx plan {name}.yaml      what it will take
#   btx run {name}.yaml       do it (again: go on where it stopped)
# Paths of data and checkpoints are relative to this file, run.directory to where you call btx.
# Every key has a default that `btx schema` documents; counts may be written 400k, 1.5M, 2B.
name: {name}

seed:
  checkpoint: seeds/my-model      # a Hugging Face folder, see the README for families. `builtin` makes one
  data: []                        # text like the seed's own, mixed into the finetuning: ["corpora/web/*.jsonl.gz"]

domains:                          # one expert each; .jsonl .json .txt .parquet, also .gz .bz2 .zst .lz4 .xz
  math:
    data: ["corpora/math"]        # a file, a folder or a glob; records with text, messages, or prompt + completion
    tokens: 20M                   # training tokens of this expert
    # experts: 2                  # several, among whom the data is dealt
    # valid: ["corpora/math-valid.jsonl"]   # else a share of the documents is held out
  code:
    data: ["corpora/code/*.jsonl"]
    tokens: 20M
  # law:
  #   checkpoint: experts/law     # an expert trained elsewhere from the same seed: only checked and merged
  #   data: ["corpora/law"]       # used in finetuning and evaluation

train:
  sequence_length: 1024
  batch_tokens: 65536
  learning_rate: 1e-4             # too large a step takes experts out of the seed's basin, and the average breaks
  gradient_checkpointing: false

merge:
  include_seed: true              # the untouched seed is one more expert
  # copies: 2                     # experts of each model; reinitialize: 0.5 draws half of their units anew
  shared: mean                    # or linear, task_arithmetic, ties, dare_ties, slerp, model_stock (mergekit's)
  router: random                  # or orthogonal, activations, embeddings (these two from the domains' data)
  router_entropy: 0.99            # of the fresh router, as a share of log(experts)

finetune:                         # what is not said here of the optimiser is as in train
  tokens: 10M
  routing: top_k                  # top_k, switch, soft, sample_top1
  top_k: 2
  balance: {{type: btx, weight: 0.01}}   # a weight means nothing without its type: btx, switch, transformers, none
  trainable: all                  # all, router, no_experts

# dense: {{}}                      # the control: the dense seed continued on as many tokens as all of the above
# upcycle: {{}}                    # sparse upcycling: copies of the seed as experts, trained on as many tokens
# probes: {{kl_to_seed: {{}}}}       # measured beside bits per byte: how far each model has gone from the seed

# data:
#   holdout: 0.05                 # share of each domain's documents that reports are made on (test), by hash
#   select: 0.05                  # and of those that settings are chosen on

evaluate:
  split: test                     # select: while you choose settings
  tokens: 200k                    # held-out tokens per domain

export: {{}}

run:
  directory: runs
  device: auto                    # auto, cpu, cuda
  workers: auto                   # trainings at once; auto is one a device
  # launch: accelerate.yaml       # an `accelerate config` file, for several GPUs a training or FSDP
"""


def write_template(name: str) -> Path:
    """Write NAME.yaml in the working directory; RecipeError if the name cannot be one or the file is there."""
    name = name.removesuffix(".yaml")
    if not re.fullmatch(NAME, name):
        raise RecipeError(f"{name!r} is no recipe name: use letters, digits, '-', '_' and '.'.")
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(name=name))
    except FileExistsError:
        raise RecipeError(f"{path} exists already; btx does not overwrite it. Choose another name.") from None
    return path
