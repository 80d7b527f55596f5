"""The embedded default's tokenizer: a byte-level BPE trained on the training part of the seed's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit
from btx.steps.tokens import Reads

END = "<|endoftext|>"


class Tokenizer(Reads):
    """A folder with tokenizer.json, trained once; only a builtin seed needs it."""

    kind: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 3
    vocab_size: int

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train on what is not held out, and save as a transformers fast tokenizer."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        from btx.export.portable import portable_tokenizer

        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=[END], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        fast.train_from_iterator((document.text for document in self.split().train()), trainer)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
        )
        wrapped.save_pretrained(str(out))
        portable_tokenizer(out)
        return {"vocabulary": fast.get_vocab_size()}
