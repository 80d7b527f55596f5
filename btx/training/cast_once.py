"""bfloat16 arithmetic over float32 state: the weights are cast once per step, not once per product.

Under autocast the residual stream, the norms and every cast of a weight stay in float32 and cost as much as the
products save (SmolLM2-135M on two cores with fast bfloat16: 356 tokens/s, where a model of bfloat16 weights reached
540). So for a step the model is given bfloat16 copies of its weights; the gradients of each pass are added up in
float32, and optimiser, clipping and saved states see the float32 weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CastOnce:
    """bfloat16 copies of a model's weights, put in their place for a step.

    Embeddings, the output head and routers stay float32: a bfloat16 sum would swallow an embedding's gradients of a
    frequent token, the loss casts the head itself, and routers compute in float32.
    """

    def __init__(self, model: nn.Module, *, kept: set[int]) -> None:
        """`kept` are the ids of modules whose weights, and whose children's, stay float32."""
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        left = {id(p) for m in model.modules() if id(m) in kept for p in m.parameters()}
        twins: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in left or parameter.dtype != torch.float32:
                    continue
                if id(parameter) not in twins:
                    twins[id(parameter)] = nn.Parameter(
                        parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad
                    )
                    self.pairs.append((parameter, twins[id(parameter)]))
                self.places.append((module, name, parameter, twins[id(parameter)]))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Cast the current weights; inside the context the model computes with the copies."""
        with torch.no_grad():
            torch._foreach_copy_([twin for _, twin in self.pairs], [parameter for parameter, _ in self.pairs])
        for module, name, _, twin in self.places:
            module._parameters[name] = twin
        try:
            yield
        finally:
            for module, name, parameter, _ in self.places:
                module._parameters[name] = parameter

    def collect(self) -> None:
        """Add the copies' gradients to those of the float32 weights, and clear them; called after a backward pass."""
        for parameter, twin in self.pairs:
            if twin.grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = twin.grad.to(torch.float32)
            else:
                parameter.grad += twin.grad
            twin.grad = None


def embed_in_bfloat16(embedding: nn.Module) -> Any:
    """Make an embedding look rows up in float32 and return them in bfloat16; returns the hook's handle."""

    def cast(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.to(torch.bfloat16)

    return embedding.register_forward_hook(cast)
