"""The optimiser's moments of finished trainings, carried over into the finetuning of what is merged of them.

AdamW (arXiv 1711.05101) keeps, for each parameter, exponential means m of the gradient and v of its square, both too
small by 1 - β^t after t steps. They are averaged without that bias: a shared tensor gets the mean over the experts of
m̂ = m / (1 - β₁^t), likewise v̂; an expert's feed-forward blocks keep their own; what no expert has trained, such as the
seed's blocks and the routers, has zeros. The finetuning goes on at the least of the experts' step counts, so its first
step weighs the past as that expert's last did. Where an expert had a parameter frozen, it does not count in the mean.

Axes: E experts, F feed-forward width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from btx.models.families import mixture_family, parts_within
from btx.models.family import DOWN, GATE, LAYER, UP, Family, part_rows

FILE = "optimizer/moments.safetensors"
KINDS = ("exp_avg", "exp_avg_sq")  # torch's names of m and v


def write_moments(out: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the moments of an AdamW that has trained `model`, by parameter name, unbiased and in fp32."""
    found: dict[str, Tensor] = {}
    steps = 0
    betas = dict(zip(KINDS, optimizer.param_groups[0]["betas"], strict=True))
    for name, parameter in model.named_parameters():
        if state := optimizer.state.get(parameter):
            steps = int(state["step"])
            found |= {
                f"{name}|{kind}": (state[kind].float() / (1 - betas[kind] ** steps)).contiguous() for kind in KINDS
            }
    (out / FILE).parent.mkdir()
    save_file(found, out / FILE, {"steps": str(steps)})


class Moments:
    """The moments of several experts' trainings, by expert; `owners` names the expert of each MoE expert, in order.

    An owner without moments, such as the seed, has none.
    """

    def __init__(self, folders: Mapping[str, Path], owners: Sequence[str]) -> None:
        opened: Any = safe_open  # has no types
        self.files = {name: opened(folder / FILE, framework="pt") for name, folder in folders.items()}
        self.names = {name: set(file.keys()) for name, file in self.files.items()}
        self.owners = owners

    @property
    def steps(self) -> int:
        """The least of the experts' step counts."""
        return min(int(file.metadata()["steps"]) for file in self.files.values())

    def carry(self, model: nn.Module, optimizer: Any) -> None:
        """Set the state of an AdamW over a native MoE model's parameters that has made no step yet."""
        family, config = mixture_family(model.config), model.config.to_dict()  # type: ignore[union-attr,operator]
        assert family is not None
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = {kind: self.of(family, config, names[id(parameter)], parameter, kind) for kind in KINDS}
                if not any(bool(moment.any()) for moment in moments.values()):
                    continue  # nobody has trained it: it starts as a fresh one
                for (kind, moment), beta in zip(moments.items(), group["betas"], strict=True):
                    moments[kind] = moment.mul_(1 - beta**self.steps)
                step = torch.tensor(float(self.steps), device=parameter.device)  # where a fused optimiser has it
                optimizer.state[parameter] = {"step": step, **moments}

    def of(self, family: Family, config: dict[str, Any], name: str, parameter: Tensor, kind: str) -> Tensor:
        """An unbiased moment of one parameter, in its shape and on its device."""
        found = torch.zeros_like(parameter)
        match = LAYER.fullmatch(name)
        rest = match[2] if match else ""
        prefix = name.removesuffix(rest) if rest else ""
        for e, owner in enumerate(self.owners if rest.startswith(family.experts) else ()):
            down = rest.endswith("down_proj")  # (E, D, F); gate_up_proj is (E, 2F, D)
            for one, part in [(DOWN, found[e])] if down else zip((GATE, UP), found[e].chunk(2), strict=True):
                own = self._stored(owner, family, config, prefix + one, kind)
                if own is not None:
                    part.copy_(own)
        idle = {*family.copies.values(), *(family.shared.names.values() if family.shared else ())}
        if rest in idle:
            return found  # it does nothing, even where the dense tensor of this name does
        name = prefix + family.copies.get(rest, rest) if rest else name
        all_ = [self._stored(owner, family, config, name, kind) for owner in self.files]
        with_it = [own for own in all_ if own is not None]
        for own in with_it:
            found += own.to(found.device) / len(with_it)
        return found

    def _stored(self, owner: str, family: Family, config: dict[str, Any], name: str, kind: str) -> Tensor | None:
        """A moment that an expert's training left, under the names of the table of families; None if it left none."""
        names = self.names.get(owner, ())
        if f"{name}|{kind}" in names:
            own: Tensor = self.files[owner].get_tensor(f"{name}|{kind}")
            return own
        match = LAYER.fullmatch(name)
        for stored, parts in parts_within(family.moe).items() if match else ():
            if match and match[2] in parts and (whole := f"{name.removesuffix(match[2])}{stored}|{kind}") in names:
                joined: Tensor = self.files[owner].get_tensor(whole)
                pieces = torch.split(joined, part_rows(parts, len(joined), config))
                return pieces[parts.index(match[2])]
        return None
