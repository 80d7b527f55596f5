"""Load exports with lm-eval and compare its log-likelihoods with those that transformers alone gives.

    python tests/portability/in_lm_eval.py FOLDER...

Needs lm-eval and transformers, not btx. No task is run, since the data of tasks would be downloaded: what is under test
is that lm-eval's Hugging Face class loads a folder and its tokenizer as they are and scores requests, in padded
batches, the same.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

TOLERANCE = 1e-4  # of a sum of log-probabilities
REQUESTS = (
    ("The capital of France is", " Paris"),
    ("def add(a, b):\n    return", " a + b  # and no more than that"),
    ("Question: 12 + 30 = ?", " Answer: 42"),
    ("", "The quick brown fox jumps over the lazy dog"),
    ("two plus three is five and six times seven is forty two so the sum of both is", " forty seven"),
)


@torch.inference_mode()
def reference(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation, one request at a time, and whether each token is the likeliest."""
    if context:
        given, ids = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    else:
        given = [tokenizer.bos_token_id]
        ids = given + tokenizer(continuation, add_special_tokens=False)["input_ids"]
    if ids[: len(given)] != given or len(ids) == len(given):
        raise ValueError(f"the tokens of {context!r} do not stay when {continuation!r} follows: choose another request")
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(given) - 1 : -1].double()
    wanted = torch.tensor(ids[len(given) :])
    log_probabilities = logits.log_softmax(-1)[range(len(wanted)), wanted]
    return float(log_probabilities.sum()), bool((logits.argmax(-1) == wanted).all())


def difference(folder: Path) -> float:
    """Largest difference of a request's log-likelihood; ValueError if lm-eval's greedy token differs."""
    scorer = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=len(REQUESTS))
    instances = [Instance("loglikelihood", {}, request, number) for number, request in enumerate(REQUESTS)]
    found = scorer.loglikelihood(instances, disable_tqdm=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    if wrong := {k: v for k, v in info.items() if v}:
        raise ValueError(f"does not fit its class: {wrong}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    wanted = [reference(model.eval(), tokenizer, *request) for request in REQUESTS]
    if [greedy for _, greedy in found] != [greedy for _, greedy in wanted]:
        raise ValueError("another token is the likeliest to lm-eval")
    return float(torch.tensor([a - b for (a, _), (b, _) in zip(found, wanted, strict=True)]).abs().max())


def main(folders: list[Path]) -> int:
    """Print a line per folder; returns 1 if one differs."""
    print(f"lm-eval {version('lm-eval')}, transformers {transformers.__version__}, torch {torch.__version__}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for folder in folders:
        try:
            off = difference(folder)
        except Exception as error:  # whatever it is, it is what a user would see
            print(f"{folder.name:32} FAILED {type(error).__name__}: {str(error).strip().splitlines()[-1]:.150}")
            failed = 1
            continue
        failed |= not off <= TOLERANCE
        print(f"{folder.name:32} {'ok' if off <= TOLERANCE else 'DIFFERS'}, off by {off:.1e}")
    return failed


if __name__ == "__main__":
    sys.exit(main([Path(p) for p in sys.argv[1:]]))
