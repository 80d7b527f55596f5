"""The embedded default's tokenizer: a byte-level BPE trained on the training part of the seed's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.corpus import Counts, held_out, read
from btx.settings import DataSettings
from btx.step import Step, Tell

END = "<|endoftext|>"


class Tokenizer(Step):
    """A folder with tokenizer.json, trained once; only a builtin seed needs it."""

    kind: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 2
    sources: list[str]
    content: list[str]  # digest of each source
    data: DataSettings
    vocab_size: int

    def identity(self) -> dict[str, Any]:
        """What the files hold decides, not where they lie."""
        return {**super().identity(), "sources": len(self.sources)}

    def run(self, out: Path, work: Path, tell: Tell) -> dict[str, Any]:
        """Train on what is not held out, and save as a transformers fast tokenizer."""
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        from btx.portable import portable_tokenizer

        texts = [d.text for d in read(self.sources, skip_bad=self.data.on_bad_line == "skip", counts=Counts())]
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=[END], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        fast.train_from_iterator((t for t in texts if not held_out(t, self.data.holdout)), trainer)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
        )
        wrapped.save_pretrained(str(out))
        portable_tokenizer(out)
        return {"vocabulary": fast.get_vocab_size()}
