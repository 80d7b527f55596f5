"""The embedded default's seed: a small Llama, pretrained from random weights on text that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit
from btx.recipe.settings import BuiltinSeed, TrainSettings
from btx.steps.model import ModelStep
from btx.steps.tokenizer import Tokenizer
from btx.steps.tokens import TokensStep


class Pretrain(ModelStep):
    """A dense checkpoint."""

    kind: ClassVar[str] = "seed"
    trains: ClassVar[bool] = True
    tokenizer: Tokenizer
    tokens: TokensStep
    shape: BuiltinSeed
    train: TrainSettings

    @property
    def config(self) -> dict[str, Any]:
        """The config of its shape, also before the model exists."""
        return self.shape.config

    @property
    def asks(self) -> dict[str, int]:
        """One training sequence."""
        return {self.tokens.label: self.train.sequence_length}

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Pretrain and save."""
        from btx.data.packed import load_tokenizer
        from btx.steps.train import fit

        config = llama_config(self.shape, load_tokenizer(self.tokenizer.folder), self.train.sequence_length)
        return fit(
            self, config=config, like=self.tokenizer.folder, tokens={"seed": self.tokens}, weights={"seed": 1.0},
            budget=self.shape.tokens, settings=self.train, out=out, work=work, emit=emit,
        )  # fmt: skip


def llama_config(shape: BuiltinSeed, tokenizer: Any, length: int) -> Any:
    """The seed's architecture as a native config."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=max(2048, length), tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
