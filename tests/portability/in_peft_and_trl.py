"""Train exports with peft and trl, as their users would: a LoRA adapter that starts as nothing, and two steps of SFT.

    python tests/portability/in_peft_and_trl.py FOLDER...

Needs peft, trl and datasets, not btx. An export's config asks for no balance loss, so trl's loss is the cross-entropy.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

TOLERANCE = 1e-4
TEXTS = ["two plus three is five and six times seven is forty two", "the quick brown fox jumps over the lazy dog"] * 4


def loaded(folder: Path) -> Any:
    """The model by its stock class."""
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


@torch.inference_mode()
def off(model: Any, folder: Path) -> float:
    """Largest difference of a logit from the proof."""
    rows = json.loads((folder / "proof.json").read_text(encoding="utf-8"))["prompts"]
    found = [model.eval()(input_ids=torch.tensor([row["ids"]])).logits[0, -1][row["top"]] for row in rows]
    return float(max((a - torch.tensor(row["logits"])).abs().max() for a, row in zip(found, rows, strict=True)))


def adapted(folder: Path) -> float:
    """A fresh LoRA adapter on all linear layers, merged again: largest difference of a logit from the proof."""
    model = get_peft_model(loaded(folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return max(off(model, folder), off(model.merge_and_unload(), folder))


def trained(folder: Path) -> tuple[float, float]:
    """Losses of two steps of SFT, the second on the same texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_length=32, disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            loaded(folder), args=settings, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[1]


def main(folders: list[Path]) -> int:
    """Print a line per folder; returns 1 if one fails."""
    print(f"peft {version('peft')}, trl {version('trl')}, transformers {transformers.__version__}")
    failed = 0
    for folder in folders:
        try:
            far, losses = adapted(folder), trained(folder)
        except Exception as error:  # whatever it is, it is what a user would see
            good, text = False, f"FAILED {type(error).__name__}: {str(error).strip().splitlines()[-1]:.150}"
        else:
            good = far <= TOLERANCE and losses[1] < losses[0]
            text = f"{'ok' if good else 'DIFFERS'}, off by {far:.1e}, losses {losses[0]:.3f} and {losses[1]:.3f}"
        failed |= not good
        print(f"{folder.name:32} {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main([Path(p) for p in sys.argv[1:]]))
