"""`btx init`: a commented recipe to start from."""

from __future__ import annotations

import re
from pathlib import Path

from btx.errors import RecipeError
from btx.recipe.fields import NAME

TEMPLATE = """\
# {name}: from one checkpoint and several domains to a Mixture of Experts.
#   btx plan {name}.yaml      estimate the cost
#   btx run {name}.yaml       run it (again: resume where it stopped)
# Paths of data and checkpoints are relative to this file, run.directory to the working directory.
# Every key has a default that `btx schema` documents; counts may be written 400k, 1.5M, 2B.
name: {name}

seed:
  checkpoint: seeds/my-model      # a Hugging Face folder (families: see the README), or `builtin`
  data: []                        # text like the seed's own, mixed into the finetuning: ["corpora/web/*.jsonl.gz"]

domains:                          # one expert each; .jsonl .json .txt .parquet, also .gz .bz2 .zst .lz4 .xz
  math:
    data: ["corpora/math"]        # a file, a folder or a glob; records with text, messages, or prompt + completion
    tokens: 20M                   # training tokens of this expert
    # experts: 2                  # several experts, the data divided among them
    # valid: ["corpora/math-valid.jsonl"]   # default: a share of the documents is held out
  code:
    data: ["corpora/code/*.jsonl"]
    tokens: 20M
  # law:
  #   checkpoint: experts/law     # an expert trained elsewhere from the same seed: only checked and merged
  #   data: ["corpora/law"]       # used in finetuning and evaluation

train:
  sequence_length: 1024
  batch_tokens: 65536
  learning_rate: 1e-4             # too high, and experts leave the seed's basin: averaging then fails
  gradient_checkpointing: false

merge:
  include_seed: true              # the untouched seed is one more expert
  # copies: 2                     # experts per model; reinitialize: 0.5 redraws half of their hidden units
  shared: mean                    # or linear, task_arithmetic, ties, dare_ties, slerp, model_stock (mergekit's)
  router: auto                    # from the domains' activations if two have data; or random, orthogonal, embeddings

finetune:                         # optimiser settings that are not given here are those of train
  tokens: 10M
  routing: top_k                  # top_k, switch, soft, sample_top1
  top_k: 2
  balance: {{type: btx, weight: 0.01}}   # a weight has no meaning without its type: btx, switch, transformers, none
  trainable: all                  # all, router, no_experts

# dense: {{}}                      # the control: continued pretraining of the dense seed on as many tokens
# upcycle: {{}}                    # sparse upcycling: copies of the seed as experts, also on as many tokens
# probes: {{kl_to_seed: {{}}}}       # measured besides bits per byte: each model's KL divergence from the seed
# tasks: {{gsm8k: {{file: gsm8k.jsonl, kind: exact_match}}}}    # items with answers, which every model is asked

# data:
#   holdout: 0.05                 # share of each domain's documents held out for reports (test), by hash
#   select: 0.05                  # and share held out for choosing settings

evaluate:
  split: test                     # select: while choosing settings
  tokens: 200k                    # held-out tokens per domain

export: {{}}

run:
  directory: runs
  device: auto                    # auto, cpu, cuda
  workers: auto                   # training jobs at once; auto: one per device
  # launch: accelerate.yaml       # an `accelerate config` file, for several GPUs per job or FSDP
"""


def write_template(name: str) -> Path:
    """Write NAME.yaml in the working directory; RecipeError for an invalid name or an existing file."""
    name = name.removesuffix(".yaml")
    if not re.fullmatch(NAME, name):
        raise RecipeError(f"{name!r} is not a valid recipe name: use letters, digits, '-', '_' and '.'.")
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(name=name))
    except FileExistsError:
        raise RecipeError(f"{path} exists already; btx does not overwrite it. Choose another name.") from None
    return path
