"""Convert exports to GGUF and compare llama.cpp's next-token log-probabilities with those of proof.json.

    python tests/portability/in_llama_cpp.py LLAMA_CPP WORK FOLDER...

LLAMA_CPP is the source of llama.cpp, from the source distribution of llama-cpp-python. Needs
llama-cpp-python and what the converter imports, not btx. The token ids are the proof's, so only models are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np

TOLERANCE = 1e-3  # its CPU kernels sum in another order and compute attention with keys and values in 16 bits
KNOWN = (  # expected to fail, by name prefix; btx/export/portable.py says why
    "attention-experts", "cohere2-linear", "cohere2-llama3", "cohere2-yarn", "dense-cohere2", "dense-ernie4_5",
    "dense-gemma4", "dense-granite-llama3", "dense-granite_swa", "dense-hunyuan_v1_dense-llama3", "dense-lfm2-llama3",
    "dense-mistral", "dense-of-phi", "dense-olmo2-llama3", "dense-qwen2-llama3", "dense-qwen2-window",
    "dense-qwen3-llama3", "dense-qwen3_5", "ernie4_5", "gemma4", "granite-llama3", "granite_swa", "hunyuan",
    "lfm2-llama3", "mistral-default", "of-mixtures-cohere2_moe-of", "of-mixtures-ernie4_5", "of-mixtures-flex_olmo",
    "of-mixtures-gemma4", "of-mixtures-hunyuan", "of-mixtures-qwen2_moe-beside", "of-mixtures-qwen3_5",
    "of-mixtures-qwen3_moe-in", "of-phi", "olmo2", "qwen2", "qwen3-llama3", "qwen3_5", "some-layers",
)  # fmt: skip
ALONE = ("of-mixtures-lfm2_moe", "of-mixtures-qwen2_moe")  # the same, but not what else begins so
NAMED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
UNKNOWN = "pre-tokenizer was not recognized"


def converted(source: Path, folder: Path, out: Path) -> str:
    """Write the export as a GGUF file of fp32 weights; ValueError with the converter's last line where it refuses.

    The converter recognises byte-level tokenizers by the ids that they give, so it refuses any trained for a test. It
    is then told that the pre-tokenizer is GPT-2's, as in btx and these tests; returns a remark in that case.
    """
    command = [str(source / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(out), "--outtype", "f32"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    named = UNKNOWN in done.stderr
    if named:
        done = subprocess.run([sys.executable, "-c", NAMED, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"converter: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return ", the converter told that the tokenizer is GPT-2's kind" if named else ""


def log_probabilities(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Of every token after `ids`, (vocabulary,)."""
    model.reset()
    model.eval(ids)
    logits = np.array(model.scores[len(ids) - 1], dtype=np.float64)
    return logits - np.logaddexp.reduce(logits)


def difference(file: Path, folder: Path) -> float:
    """Largest difference of a log-probability of the proof's top tokens."""
    model = llama_cpp.Llama(
        str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0, flash_attn=False
    )
    differences = []
    for row in json.loads((folder / "proof.json").read_text(encoding="utf-8"))["prompts"]:
        found = log_probabilities(model, row["ids"])[row["top"]]
        differences.append(np.abs(found - (np.array(row["logits"]) - row["logsumexp"])).max())
    return float(np.max(differences))  # a NaN stays one, which Python's max would lose


def main(source: Path, work: Path, folders: list[Path]) -> int:
    """Print a line per folder; returns 1 if one differs unexpectedly, or agrees although it is expected to fail."""
    print(f"llama-cpp-python {llama_cpp.__version__}")
    work.mkdir(parents=True, exist_ok=True)
    failed = 0
    for folder in folders:
        known = folder.name.startswith(KNOWN) or folder.name in ALONE
        try:
            file = work / f"{folder.name}.gguf"
            remark = converted(source, folder, file)
            off = difference(file, folder)
        except Exception as error:  # whatever it is, it is what a user would see
            good, text = False, f"FAILED {type(error).__name__}: {error!s:.150}"
        else:
            good = off <= TOLERANCE  # false for a NaN
            text = f"{'ok' if good else 'DIFFERS'}, off by {off:.1e}{remark}"
        failed |= good == known
        print(f"{folder.name:32} {text}{' (as known)' if known and not good else ''}")
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]]))
