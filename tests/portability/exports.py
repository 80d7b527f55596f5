"""Write pico exports of every family and kind of rope into a folder, for the other scripts here to load elsewhere.

python -m tests.portability.exports FOLDER
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from btx.checkpoints.token_map import load_beside
from btx.export.portable import portable_tokenizer
from btx.export.work import Work, extract
from btx.graph.artifact import write_json
from btx.recipe.settings import ExportSettings
from btx.steps.export import write_model
from tests.support.merges import CARRIED, merge
from tests.support.models import FAMILIES, config_of, save_model
from tests.support.shapes import SPARSE, VARIANTS, sparse_config

PLAIN = ("mistral", "phi3", "gemma4_text")  # with the plain rope alone; the latter two have others of their own
ROPES = {"default": {}, **{name.split()[0]: CARRIED[name] for name in ("linear rope", "llama3 rope", "yarn rope")}}


def export(
    out: Path, family: str, *, layout: Any = "published", like: Path | None = None, experts: int = 3,
    dtype: torch.dtype = torch.float32, merging: dict[str, Any] | None = None, made: Any = None, **config: Any,
) -> Path:  # fmt: skip
    """An export with `experts` different experts of a family; `like` has other tokenizer files to use.

    `merging` are settings of the merge; `made` is a config instead of the family's.
    """
    work, made = out.with_name(f"{out.name}-parents"), made or config_of(family, **config)
    parents = [save_model(work / str(n), made, noise=0.02 * n, dtype=dtype) for n in range(experts)]
    for parent in parents:
        for path in [*like.iterdir()] if like else []:
            (parent / path.name).write_bytes(path.read_bytes())
        if not like:
            portable_tokenizer(parent)
        if family == "qwen2":  # for this model type transformers 5 makes every tokenizer a Qwen2Tokenizer
            load_beside(parent).save_pretrained(str(parent))
    out.mkdir()
    write_model(merge(work / "moe", parents, top_k=2, **(merging or {})), out, ExportSettings(layout=layout))
    return out


def extracted(out: Path, mixture: Path) -> Path:
    """One expert of an export as a dense model, as `btx moe extract` writes it."""
    with ExitStack() as stack:
        extract(Work(stack, mixture, out, {}, 64, print), "1")
    return out


def sentencepiece_into(folder: Path) -> Path:
    """A tokenizer.model of 300 pieces, as Llama 2 has one, and the fast tokenizer that transformers makes of it."""
    import sentencepiece
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaTokenizer

    folder.mkdir()
    words = [f"the quick brown fox {n} jumps over the lazy dog and def add(a, b): return" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    LlamaTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # as Llama 2 is published
    named = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    write_json(folder / "tokenizer_config.json", {**tokens, **named})
    return folder


def main(folder: Path) -> None:
    """All of them: by family and rope, number of experts and precision, then what makes a difference to somebody."""
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    for family in FAMILIES:
        # Of a model whose name has phi3 in it llama.cpp wants Phi-3's own tokens.
        called = "of-phi" if family == "phi3" else family
        for name, rope in ROPES.items():
            if name == "default" or family not in PLAIN:
                export(folder / f"{called}-{name}", family, **rope)
        export(folder / f"{called}-default-5-experts", family, experts=5)
        export(folder / f"{called}-default-8-experts-bf16", family, experts=8, dtype=torch.bfloat16)
        for name in ("default", "llama3"):
            if (folder / f"{called}-{name}").is_dir():
                extracted(folder / f"dense-{called}-{name}", folder / f"{called}-{name}")
    for name, rope in ROPES.items():
        attention = {"merging": {"experts": "ffn+attention"}, "num_key_value_heads": 4}
        export(folder / f"attention-experts-{name}", "llama", **attention, **rope)
    for name in (*SPARSE, *VARIANTS):
        if name != "jetmoe":  # a mixture as the seed
            kind = VARIANTS.get(name, {}).get("model_type", name)
            export(folder / f"of-mixtures-{name.replace(' ', '-')}", kind, experts=2, made=sparse_config(name))
    for family in ("qwen2", "qwen3"):
        export(folder / f"some-layers-{family}", family, merging={"layers": [1]})
    export(folder / "qwen2-shared-expert", "qwen2", merging={"shared_expert": "seed"})
    export(folder / "llama-copies", "llama", merging={"copies": 2, "reinitialize": 0.3})
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    extracted(folder / "dense-qwen2-window", export(folder / "qwen2-window", "qwen2", **window))
    export(folder / "llama-default-2-experts", "llama", experts=2)
    export(folder / "granite-default-2-experts", "granite", experts=2)
    export(folder / "mistral-no-window", "mistral", sliding_window=None)
    export(folder / "qwen2-untied", "qwen2", tie_word_embeddings=False)
    export(folder / "qwen2-untied-llama3", "qwen2", tie_word_embeddings=False, **ROPES["llama3"])
    export(folder / "llama-sentencepiece", "llama", like=sentencepiece_into(folder / "sentencepiece-parents"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
