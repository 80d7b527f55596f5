"""Load-balancing losses, each in its published convention, and the factors between their coefficients.

"alpha = 0.01" is not one number: the conventions differ in what they average and in what carries a gradient,
by a factor of the number of layers and more. So every loss here is unweighted and selected by the name of its
convention.

Axes: L layers, T tokens, E experts, K experts per token. A layer is a `Routing` recorded by
`btx.moe.hooks.Routed`. Means are over the tokens of one forward pass, all of which count, so batches are packed,
not padded; with `everywhere=over_processes` they are over that pass on all processes, and with a `StepMeans` over all
passes of an optimiser step. A step's loss is one number, however memory limits cut the step: means over a part of it
would be another loss, which keeps experts from specialising (Qiu et al., 2501.11873).

| form           | value per layer          | over layers | balanced | collapsed | gradient through      |
|----------------|--------------------------|-------------|----------|-----------|-----------------------|
| `btx`          | E Σ u_i p_i, u soft      | sum         | L        | L E / m   | u and p               |
| `switch`       | E Σ f_i p_i, Σ f_i = 1   | mean        | 1        | E / m     | p                     |
| `transformers` | E Σ f_i p_i, Σ f_i = K   | pooled      | K        | K E / m   | p                     |
| `none`         | 0                        |             | 0        | 0         | nothing               |

Balanced: f = u = p = 1/E (times K). Collapsed: every token of every layer spreads evenly over the same m >=
K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from btx.moe.routing import Routing

Form = Literal["btx", "switch", "transformers", "none"]
FORMS: tuple[str, ...] = get_args(Form)


Everywhere = Callable[[Tensor], Tensor]


def here(mean_LE: Tensor) -> Tensor:
    """The means of this process alone."""
    return mean_LE


def over_processes(mean_LE: Tensor) -> Tensor:
    """The mean over all processes of torch.distributed, each with equally many tokens; forward only, as a constant.

    The gradient is that of this process's own mean, unscaled, so that the mean of the processes' gradients, which is
    what data parallelism takes, is the gradient of the loss over all their tokens.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mean_LE
    total_LE = mean_LE.detach().clone()
    dist.all_reduce(total_LE)
    return mean_LE + (total_LE / dist.get_world_size() - mean_LE.detach())


class StepMeans:
    """Means over all tokens of an optimiser step that is cut into several passes, on all processes.

    The loss is a product of means, so the gradient of one pass's tokens needs the means over all tokens. Passes without
    gradients collect these first (`observe`); then each pass uses them, with gradients through its own tokens alone,
    and the passes' gradients, weighted by their shares, add up to that of the step's loss.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._local = True

    def observe(self, form: str, layers: Sequence[Routing], share: float) -> None:
        """Add the means of one pass, whose tokens are a `share` of the step's over all processes."""
        place = 0

        def add(mean_LE: Tensor) -> Tensor:
            nonlocal place
            term_LE = share * mean_LE.detach().double()
            if place == len(self._sums):
                self._sums.append(term_LE)
            else:
                self._sums[place] = self._sums[place] + term_LE
            place += 1
            return mean_LE

        balance_loss(form, layers, add)

    def everywhere(self) -> Everywhere:
        """The `everywhere` argument for one pass's loss; every pass needs a new one."""
        if self._local and dist.is_initialized() and dist.get_world_size() > 1:
            for sum_LE in self._sums:
                dist.all_reduce(sum_LE)
        self._local = False
        sums = iter(self._sums)
        return lambda mean_LE: mean_LE + (next(sums).to(mean_LE.dtype) - mean_LE.detach())


def balance_loss(form: str, layers: Sequence[Routing], everywhere: Everywhere = here) -> Tensor:
    """The unweighted balance loss of convention `form` over the layers of a forward pass, a scalar tensor."""
    if form not in FORMS:
        raise ValueError(f"unknown balance loss {form!r}; known: {', '.join(FORMS)}")
    if not layers:
        raise ValueError("no layer was given: a balance loss needs the record of at least one MoE layer")
    if form == "none":
        return torch.zeros((), device=layers[0].logits_TE.device)
    return {"btx": btx_loss, "switch": switch_loss, "transformers": transformers_loss}[form](layers, everywhere)


def btx_loss(layers: Sequence[Routing], everywhere: Everywhere = here) -> Tensor:
    """Σ_layers E Σ_i u_i p_i, to be weighted by the paper's α = 0.01 (arXiv 2403.07816, section 3.3).

    u_i is the mean over tokens of the gate weight after top-k, p_i that of the full softmax. Both carry
    gradient. Summed over layers: at 32 layers it is 32 times what a mean over layers would be.
    """
    return _experts(layers) * (everywhere(_means(layers, _gates)) * everywhere(_means(layers, _probs))).sum()


def switch_loss(layers: Sequence[Routing], everywhere: Everywhere = here) -> Tensor:
    """Mean over layers of E Σ_i f_i P_i (Fedus et al., 2101.03961, eq. 4-6), as in Megatron and MegaBlocks.

    f_i is the share of the T · K token-choices that expert i received, a count without gradient; P_i is the
    mean over tokens of the full softmax. For K = 1 it is exactly the Switch paper's loss.
    """
    share_LE = everywhere(_means(layers, _chosen)) / layers[0].index_TK.shape[1]
    return _experts(layers) * (share_LE * everywhere(_means(layers, _probs))).sum(1).mean()


def transformers_loss(layers: Sequence[Routing], everywhere: Everywhere = here) -> Tensor:
    """E Σ_i f_i P_i over the pooled tokens of all layers, transformers' `load_balancing_loss_func`.

    f_i is the number of choices of expert i per token, so Σ f_i = K. Pooling hides collapse: layers that
    each collapsed onto a different expert score as if balanced. The library counts the k largest of a softmax
    in the logits' dtype; here the actual choices are counted and the softmax is float32, which is the same for
    top-k routing and float32 logits.
    """
    load_E, prob_E = (everywhere(_means(layers, each)).mean(0) for each in (_chosen, _probs))
    return _experts(layers) * load_E @ prob_E


def z_loss(layers: Sequence[Routing]) -> Tensor:
    """Σ_layers mean over tokens of (log Σ_i exp z_i)², which keeps logits small; ST-MoE weighs it by 0.001.

    arXiv 2202.08906, equation 5. A mean over tokens, so the passes of a step add up by their shares.
    """
    squares = [torch.logsumexp(layer.logits_TE.float(), -1).square().mean() for layer in layers]
    return torch.stack(squares).sum()


def _experts(layers: Sequence[Routing]) -> int:
    return layers[0].logits_TE.shape[-1]


def _means(layers: Sequence[Routing], each: Callable[[Routing], Tensor]) -> Tensor:
    """Means over tokens of a (T, E) quantity, stacked: mean_LE."""
    return torch.stack([each(layer).mean(0) for layer in layers])


def _probs(layer: Routing) -> Tensor:
    """Full softmax prob_TE, float32 or better."""
    logits_TE = layer.logits_TE
    return logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))


def _gates(layer: Routing) -> Tensor:
    """Routing weight of every expert, gate_TE, zero where not chosen; by scatter, so sums keep their order."""
    gate_TE = torch.zeros_like(_probs(layer))
    return gate_TE.scatter(1, layer.index_TK, layer.weight_TK.to(gate_TE.dtype))


def _chosen(layer: Routing) -> Tensor:
    """1 where an expert was chosen, chosen_TE, without gradient."""
    chosen_TE = torch.zeros_like(_probs(layer)).detach()
    return chosen_TE.scatter(1, layer.index_TK, 1.0)
