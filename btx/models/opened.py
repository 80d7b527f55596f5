"""The interface through which probes, chats and comparisons use any model: log-probabilities, losses, decoding.

`Stock` is a checkpoint in its transformers class; a composed model (`btx/models/composed.py`) combines several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from btx.checkpoints.validate import read_config
from btx.models import model
from btx.models.families import mixture_family
from btx.models.mixture import own_in
from btx.models.native import native_config
from btx.moe.hooks import Routed
from btx.recipe.settings import RoutingRule, RunSettings

LOGITS = 2**24  # computed at once: 64 MiB in float32
WEIGHTS, HIDDEN_STATES, ROUTING = "weights", "hidden states", "routing"  # capabilities


class Opened(ABC):
    """A language model in eval mode. Axes: B sequences, S tokens, V vocabulary.

    `capabilities` says what else can be inspected; a probe that needs a missing one gives no result.
    """

    capabilities: frozenset[str] = frozenset()

    @property
    def positions(self) -> int | None:
        """The longest sequence that it takes, in tokens; None if it states none."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that ids must be on."""

    @abstractmethod
    def log_probs(self, ids_BS: Tensor, prompt: int = 0) -> Tensor:
        """Next-token log-probabilities (B, S, V) at each position: normalised, float32, causal.

        The first `prompt` tokens are the prompt, for methods that act on prompts; the others ignore it.
        """

    @abstractmethod
    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, Any]:
        """Log-probabilities (B, V) of the first new token, and an opaque cache for `decode`."""

    @abstractmethod
    def decode(self, ids_B: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Log-probabilities (B, V) of the token after `ids_B`, and the cache with `ids_B` added."""

    def losses(self, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Minus log p of each target, in nats, float32 (B, S); zero where the target is negative."""
        found = torch.zeros(targets_BS.shape, dtype=torch.float32, device=targets_BS.device)
        for n, (ids_S, targets_S) in enumerate(zip(ids_BS, targets_BS, strict=True)):  # (S, V) at a time
            log_p_SV = self.log_probs(ids_S[None])[0]
            found[n] = functional.nll_loss(log_p_SV, targets_S.clamp(min=0), reduction="none")
        return found.masked_fill(targets_BS < 0, 0.0)


class Stock(Opened):
    """A native model of transformers; `routed` is the routing rule installed on it, if it is a Mixture of Experts."""

    def __init__(self, net: Any, routed: Routed | None = None) -> None:
        self.net, self.routed = net, routed
        self.capabilities = frozenset({WEIGHTS, HIDDEN_STATES, *([ROUTING] if routed else [])})

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.net.device  # type: ignore[no-any-return]

    @property
    def positions(self) -> int | None:
        """The config's max_position_embeddings."""
        found = getattr(self.net.config, "max_position_embeddings", None)
        return None if found is None else int(found)

    @torch.inference_mode()
    def log_probs(self, ids_BS: Tensor, prompt: int = 0) -> Tensor:
        """Log-softmax of the model's logits, in float32."""
        logits: Tensor = self.net(input_ids=ids_BS, use_cache=False).logits
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def hidden_states(self, ids_BS: Tensor) -> list[Tensor]:
        """The residual stream (B, S, D), float32: before the first layer, then after each, the last one normalised."""
        found = self.net(input_ids=ids_BS, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        return [hidden.float() for hidden in found]

    @torch.inference_mode()
    def through_head(self, states_ND: Tensor, *, normalise: bool) -> Tensor:
        """Logits (N, V), float32, of the residual stream, or of what the final norm made of it, by its head."""
        states_ND = states_ND.to(self.net.dtype)
        body = self.net.base_model
        norm = body.norm if hasattr(body, "norm") else body.embedding_norm  # as LFM2 calls it
        normal_ND = norm(states_ND) if normalise else states_ND
        with _head_alone(self.net) as logits:
            return logits(normal_ND)

    @torch.inference_mode()
    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, Any]:
        """A forward pass that fills the KV cache."""
        return self._next(self.net(input_ids=ids_BS, use_cache=True, logits_to_keep=1))

    @torch.inference_mode()
    def decode(self, ids_B: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """A forward pass over one token per sequence, with the KV cache."""
        return self._next(self.net(input_ids=ids_B[:, None], past_key_values=cache, use_cache=True))

    @staticmethod
    def _next(output: Any) -> tuple[Tensor, Any]:
        return output.logits[:, -1].float().log_softmax(-1), output.past_key_values

    @torch.inference_mode()
    def losses(self, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Minus log p of each target, float32 (B, S), zero where it is negative; logits of a few rows at a time.

        The base model runs once, in a pass whose head sees the last position alone. Then the model's own `forward` is
        given some hidden states at a time, so that whatever its class does after the base model (scaling, capping) is
        done, and the logits of the whole batch, which may be larger than the model, never exist at once.
        """
        seen: list[Tensor] = []
        handle = self.net.base_model.register_forward_hook(lambda _m, _args, out: seen.append(out.last_hidden_state))
        try:
            self.net(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        kept = targets_BS >= 0
        found = torch.zeros(targets_BS.shape, dtype=torch.float32, device=targets_BS.device)
        found[kept] = _head_losses(self.net, seen[0][kept], targets_BS[kept])
        return found


class _Output:
    """The output of a base model of any class, of which hidden states alone are kept: whatever else it has is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _name: str) -> None:
        return None


class _Body(nn.Module):
    """Stands in for the base model and returns hidden states that it gave before."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = _Output(hidden)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@contextmanager
def _head_alone(net: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from hidden states (N, D) to logits (N, V), float32, through the model's own `forward`."""
    name, body = net.base_model_prefix, net.base_model

    def logits(hidden_ND: Tensor) -> Tensor:
        setattr(net, name, _Body(hidden_ND[None]))
        ids = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
        found: Tensor = net.forward(input_ids=ids, use_cache=False).logits[0]
        return found.float()

    try:
        yield logits
    finally:
        setattr(net, name, body)


def _head_losses(net: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) of hidden states (N, D)."""
    rows = max(1, LOGITS // net.config.vocab_size)
    losses = [torch.zeros(0, device=hidden.device)]
    with _head_alone(net) as logits:
        for some, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            losses.append(functional.cross_entropy(logits(some), wanted, reduction="none"))
    return torch.cat(losses)


@contextmanager
def opened_checkpoint(
    folder: Path, *, where: RunSettings, dtype: torch.dtype = torch.float32, rule: RoutingRule | None = None
) -> Iterator[Stock]:
    """A checkpoint folder on the device that `where` names; `rule` is how a Mixture of Experts is routed."""
    model.set_threads(where)
    each, visited = own_in(folder) if rule else (1, 1)
    per_token = ((rule.experts_per_token or 0) * visited or _experts(folder)) if rule else None
    net = model.load(folder, where=where, dtype=dtype, experts_per_token=per_token).to(model.device_of(where)).eval()
    if rule is None:
        yield Stock(net)
        return
    assert per_token is not None
    with Routed(net, rule.routing, per_token, soft_first_layer=rule.soft_first_layer, each=each) as routed:
        yield Stock(net, routed)


def _experts(folder: Path) -> int:
    """Number of experts per layer of a Mixture of Experts."""
    config = read_config(folder)
    family = mixture_family(config)
    assert family is not None
    return int(getattr(native_config(config, str(folder)), family.experts_field))
