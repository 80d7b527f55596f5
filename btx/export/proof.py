"""The golden logits that an export carries: probe prompts with the logits they gave, and the check that they still do.

`proof.json` holds, per prompt, the token ids, the highest logits at the last position and the logarithm of the
summed exponentials of all of them, computed in fp32 by the stock class on a CPU. (JSON, because some loaders take
every *.safetensors file of a folder for weights.)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from btx.checkpoints.layouts import refuse_no_config, refuse_pointer
from btx.checkpoints.validate import places, refuse_link
from btx.data.packed import load_tokenizer
from btx.errors import ArtifactError
from btx.graph import artifact
from btx.models import model
from btx.models.families import mixture_family
from btx.recipe.settings import RunSettings

PROOF, SUMS = "proof.json", "SHA256SUMS"
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Question: 12 + 30 = ? Answer:")
CARD = "README.md"  # which people edit; it does not affect the model
READ = re.compile(  # files that transformers or another loader picks up, so that an extra one changes the model
    r"(^|/)[^/.][^/]*(\.safetensors|\.bin|\.pth?|\.py|\.jinja|\.gguf|\.model|\.index\.json)$"
    r"|(^|/)(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|chat_template|vocab|tekken|preprocessor_config|processor_config|experts)\.json$|(^|/)(merges|vocab)\.txt$"
)
TOP = 50
TOLERANCE = 1e-3  # of a logit; other CPUs and libraries sum in another order
STOCK = RunSettings(device="cpu", kernel="eager")


def load_stock(folder: Path) -> Any:
    """The exported model by its stock class, in fp32 on a CPU, with stock experts."""
    return model.load(folder, where=STOCK).eval()


@torch.inference_mode()
def logits_of(net: Any, ids: list[int]) -> torch.Tensor:
    """Logits at the last position, (vocabulary,)."""
    logits: torch.Tensor = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return logits


def make_proof(folder: Path) -> dict[str, Any]:
    """The contents of `proof.json`: for each prompt, the stock model's ids and logits."""
    tokenizer, net = load_tokenizer(folder), load_stock(folder)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        logits = logits_of(net, ids)
        top = logits.topk(min(TOP, len(logits)))
        rows.append(
            {
                "prompt": prompt,
                "ids": ids,
                "top": top.indices.tolist(),
                "logits": top.values.tolist(),
                "logsumexp": float(logits.logsumexp(0)),
            }
        )
    return {"class": type(net).__name__, "dtype": "float32", "tolerance": TOLERANCE, "prompts": rows}


def write_sums(folder: Path) -> None:
    """SHA256SUMS over all files of the folder, as `sha256sum -c` reads it."""
    names = [n for n in artifact.list_files(folder) if n != SUMS]
    text = "".join(f"{artifact.file_digest(folder / n)}  {n}\n" for n in names)
    (folder / SUMS).write_text(text, encoding="utf-8")


def check_sums(folder: Path) -> int:
    """Compare every file but the card with SHA256SUMS; returns their number; ArtifactError names those that differ.

    Extra files that no loader reads, such as those of git, of a hub or of a desktop, are allowed.
    """
    path = folder / SUMS
    if not path.is_file():
        if (folder / "snapshots").is_dir() or list(folder.glob("models--*")):
            refuse_no_config(folder)
        missing = f"{folder} has no {SUMS}" if folder.is_dir() else f"there is no folder {folder}"
        raise ArtifactError(f"{missing}; name an export of btx, such as runs/NAME/export, or what btx moe wrote.")
    rows = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row[-1] != CARD]
    wrong = [row[-1] for row in rows if len(row) != 2 or not _same(folder, row[1], row[0])]
    for name in wrong:
        refuse_pointer(folder / name)
    if wrong:
        raise ArtifactError(
            f"{folder}: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or not what "
            f"{SUMS} says. Export again, or fetch the folder again."
        )
    listed = {row[1] for row in rows}
    extra = [n for n in artifact.list_files(folder) if n not in (*listed, SUMS) and READ.search(n) and n[0] != "."]
    if extra:
        raise ArtifactError(
            f"{folder}: {', '.join(extra[:5])} {'is' if len(extra) == 1 else 'are'} not listed in {SUMS}, so nothing "
            "verifies them. Remove what was added, or fetch the folder again."
        )
    return len(rows)


def _same(folder: Path, name: str, digest: str) -> bool:
    path = folder / name
    refuse_link(path, folder)
    inside = any(path.resolve().is_relative_to(place) for place in places(folder))
    return inside and path.is_file() and artifact.file_digest(path) == digest


def check_keys(folder: Path, net: Any) -> str:
    """ArtifactError unless the tensors on disk are exactly the stock class's, published or fused; returns a summary."""
    from btx.checkpoints.reader import Checkpoint

    state = {
        n: t for n, t in net.state_dict().items() if not (net.config.tie_word_embeddings and n == "lm_head.weight")
    }
    family = mixture_family(net.config)
    wanted = set(model.published(family, state) if family else state)
    found = set(Checkpoint(folder).entries)
    if found == set(state) != wanted:
        return f"{len(found)} tensors, the experts fused as transformers 5 holds them"
    if wanted != found:
        raise ArtifactError(
            f"{folder}: missing tensors {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]}. "
            "Export again."
        )
    return f"{len(found)} tensors under their published names"


def check_proof(folder: Path, net: Any) -> float:
    """Largest difference of a logit from the golden one; ArtifactError when it is above the tolerance."""
    path = folder / PROOF
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["prompts"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read ({error!r}). Export again.") from error
    differences = []
    for row in rows:
        logits = logits_of(net, row["ids"])
        off = (logits[row["top"]] - torch.tensor(row["logits"])).abs().max()
        differences += [float(off), abs(float(logits.logsumexp(0)) - row["logsumexp"])]
    worst = float(torch.tensor(differences).max())  # of torch, since Python's max(0.0, nan) is 0.0
    if not worst <= TOLERANCE:
        raise ArtifactError(
            f"{folder} gives other logits than when it was exported: off by {worst:.3g}, allowed is "
            f"{TOLERANCE:g}. The weights or the libraries that run them have changed."
        )
    return worst


def check(folder: Path) -> list[str]:
    """All checks on an exported folder; returns a line for each, raises ArtifactError at the first that fails."""
    lines = [f"{check_sums(folder)} files have the digests of {SUMS}"]
    net = load_stock(folder)
    lines.append(f"{type(net).__name__} of transformers loads it: no key missing, unexpected or mismatched")
    lines.append(check_keys(folder, net))
    lines.append(f"the logits of {len(PROMPTS)} prompts are those of the proof (off by {check_proof(folder, net):.1e})")
    return lines
