"""What the FLOP and memory formulas refuse, by name."""

from typing import Any

import pytest

from btx.models import flops, memory
from tests.support.shapes import LLAMA2_7B

BTX = LLAMA2_7B | {"model_type": "mixtral", "num_local_experts": 4}
MIXTRAL_8X7B = BTX | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "unknown model_type 'gemma'; known: llama, phi3, mistral"),
        ({"model_type": None}, "unknown model_type None"),
        ({"hidden_size": None}, "field hidden_size is None; a mixtral needs a positive integer"),
        ({"vocab_size": 0}, "field vocab_size is 0"),
        ({"num_hidden_layers": 2.0}, "field num_hidden_layers is 2.0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flops.parameters(MIXTRAL_8X7B | change)


def test_other_arguments_out_of_range_are_refused_by_value() -> None:
    with pytest.raises(ValueError, match="tokens is -1"):
        flops.training_flops(LLAMA2_7B, -1)
    with pytest.raises(ValueError, match="unknown dtype 'int4'; known: float64, float32"):
        flops.checkpoint_bytes(LLAMA2_7B, "int4")
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: bf16, fp32"):
        memory.activation_bytes(LLAMA2_7B, batch=1, sequence=1, precision="fp8", checkpointing=True)  # type: ignore[arg-type]
