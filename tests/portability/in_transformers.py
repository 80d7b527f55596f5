"""Load exports with the installed transformers, of whatever version, and compare the logits with those of proof.json.

    python tests/portability/in_transformers.py FOLDER...

Needs torch and transformers only, not btx.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

TOLERANCE = 1e-4
KNOWN = {  # expected to fail, by major version and name prefix; btx/export/portable.py says why
    "4": ("cohere2", "dense-gemma4", "dense-granite_swa", "dense-olmo2-llama3", "dense-qwen3_5", "gemma4",
          "granite_swa", "lfm2", "of-mixtures-cohere2", "of-mixtures-gemma4", "of-mixtures-granitemoe_swa",
          "of-mixtures-lfm2", "of-mixtures-qwen3_5", "qwen2-window", "qwen3_5"),
}  # fmt: skip


@torch.inference_mode()
def difference(folder: Path) -> float:
    """Largest difference of a logit or of their logsumexp from the proof, and of the token ids: infinite."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float32, output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        raise ValueError(f"does not fit its class: {wrong}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    differences = []
    for row in json.loads((folder / "proof.json").read_text(encoding="utf-8"))["prompts"]:
        encoded = tokenizer(row["prompt"], return_tensors="pt")
        if encoded["input_ids"][0].tolist() != row["ids"]:
            raise ValueError(f"its tokenizer gives other ids for {row['prompt']!r}")
        logits = model.eval()(**encoded).logits[0, -1]
        off = (logits[row["top"]] - torch.tensor(row["logits"])).abs().max()
        differences += [float(off), abs(float(logits.logsumexp(0)) - row["logsumexp"])]
    return float(torch.tensor(differences).max())  # a NaN stays one, which Python's max would lose


def main(folders: list[Path]) -> int:
    """Print a line per folder; returns 1 if one differs unexpectedly, or agrees although it is expected to fail."""
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    failed = 0
    for folder in folders:
        known = folder.name.startswith(KNOWN.get(transformers.__version__.split(".")[0], ()))
        try:
            off = difference(folder)
        except Exception as error:  # whatever it is, it is what a user would see
            good, text = False, f"FAILED {type(error).__name__}: {str(error).strip().splitlines()[-1]:.150}"
        else:
            good = off <= TOLERANCE  # false for a NaN
            text = f"{'ok' if good else 'DIFFERS'}, off by {off:.1e}"
        failed |= good == known
        print(f"{folder.name:32} {text}{' (as known)' if known and not good else ''}")
    return failed


if __name__ == "__main__":
    sys.exit(main([Path(p) for p in sys.argv[1:]]))
