"""Adapters of the library peft around a native model, for training, and as saved by peft for its users.

Only methods that change what modules compute are taken, since the result is a model like any other: those that add
tokens to prompts (prompt, prefix, P-tuning) or parts of an input of their own are refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btx.errors import ArtifactError, RecipeError, nearest
from btx.models.flops import experts_in
from btx.moe.hooks import find_routers
from btx.recipe.joint_settings import AdapterRule

ALL = "all-linear"  # peft's word for every linear layer but the head
TARGETS = "target_modules"
FEED_FORWARD = "feedforward_modules"  # a method with these (IA3) has defaults by family for both
SAME = 1e-4  # as a share of the largest logit


def methods() -> dict[str, Any]:
    """The config class of every method of the installed peft, by its name in lower case."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def config_of(method: str, options: Mapping[str, Any], where: str) -> Any:
    """peft's config of a method with options of that class; RecipeError, naming `where`, for what peft does not take.

    `dora` is LoRA with `use_dora`. By default all linear layers but the head are adapted.
    """
    known = methods()
    said = dict(options)
    if method.lower() == "dora":
        method, said = "lora", {"use_dora": True, **said}
    if method.lower() not in known:
        raise RecipeError(f"{where}.method: peft has no {method!r}; {nearest(method.lower(), ['dora', *known])}")
    kind = known[method.lower()]
    for name in said:
        if name not in kind.__dataclass_fields__:
            raise RecipeError(f"{where}.options: {kind.__name__} has no {name!r}; {nearest(name, _own(kind))}")
    if TARGETS in _own(kind) and FEED_FORWARD not in _own(kind) and "target_parameters" not in said:
        said.setdefault(TARGETS, ALL)
    try:
        config = kind(task_type="CAUSAL_LM", **said)
    except Exception as error:  # each method has checks of its own
        why = " ".join(str(error).split())
        raise RecipeError(f"{where}.options: peft refuses them for {method} ({why}). Correct them.") from error
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise RecipeError(
            f"{where}.method: {method} learns parts of an input, not changes of modules, so that nothing can be merged "
            "or scored token by token. Use lora, dora or another."
        )
    return config


def require_targets(config: Any, modules: Iterable[str], where: str) -> None:
    """RecipeError for a target that no module of a network has; peft would adapt the others and say nothing.

    `modules` are the names of all modules that have a weight, such as model.layers.0.mlp.down_proj.
    """
    said, known = getattr(config, TARGETS, None), list(modules)
    if isinstance(said, str) and said != ALL and not any(re.fullmatch(said, one) for one in known):
        raise RecipeError(f"{where}.options: no module of the model fits the pattern {TARGETS} ({said}). Correct it.")
    if isinstance(said, str) or said is None:
        return
    ends = sorted({one.rpartition(".")[2] for one in known})
    for name in sorted(said):
        if not any(one == name or one.endswith(f".{name}") for one in known):
            raise RecipeError(f"{where}.options: no module of the model is called {name!r} ({TARGETS}); "
                              f"{nearest(name, ends)}")  # fmt: skip


def _own(kind: Any) -> list[str]:
    return [name for name in kind.__dataclass_fields__ if name not in ("task_type", "peft_type", "peft_version")]


def wrapped(net: Any, config: Any, where: str) -> Any:
    """peft's model over a network, whose modules are changed in place; only the adapter has gradients.

    RecipeError for a method that cannot adapt this network, or that the training loop would train in part only.
    """
    from peft import get_peft_model

    try:
        with _quietly():
            found = get_peft_model(net, config)
        probed(net)
    except Exception as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"{where}: peft cannot adapt this model so ({why}). Correct method and options.") from error
    kind = config.peft_type.value.lower()
    if hasattr(found.base_model, "update_and_allocate"):
        raise RecipeError(f"{where}.method: {kind} has to be told of every step of the training. Use another method.")
    inside = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    if not inside:
        raise RecipeError(f"{where}: the adapter leaves nothing to train in this model. Name other {TARGETS}.")
    if inside != {id(parameter) for parameter in found.parameters() if parameter.requires_grad}:
        raise RecipeError(f"{where}.method: {kind} keeps weights outside of the modules. Use another method.")
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings that peft causes itself: old names of transformers, and patterns that it adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern", RuntimeWarning)
        yield


@torch.no_grad()
def probed(net: Any) -> Tensor:
    """Logits of a few fixed ids, for telling whether two networks compute the same."""
    training = net.training
    ids = torch.arange(1, 9, device=net.device)[None] % net.config.vocab_size
    found: Tensor = net.eval()(input_ids=ids, use_cache=False).logits.float()
    net.train(training)
    return found


def save(model: Any, out: Path) -> None:
    """Write an adapter as peft does, without the path of the model that it was trained on."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = None
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # peft's card is a form to fill in


def require_saved(net: Any, folder: Path, wanted: Tensor, where: str) -> None:
    """RecipeError unless a saved adapter, on a plain network, gives the logits that it had (`probed`)."""
    try:
        load(net, folder)
        far = float((probed(net) - wanted.to(net.device)).abs().max())
    except ArtifactError as error:
        why = str(error.__cause__)
        raise RecipeError(f"{where}: peft cannot load what it saved ({why}). Use another method.") from error
    if not far <= SAME * max(1.0, float(wanted.abs().max())):
        raise RecipeError(
            f"{where}: what peft saved is another adapter than the one that was trained (logits differ by {far:.2g}). "
            "Use another method or other options."
        )


def load(net: nn.Module, folder: Path) -> Any:
    """A network with a saved adapter, its modules changed in place."""
    from peft import PeftModel

    try:
        with _quietly():
            return PeftModel.from_pretrained(net, str(folder)).eval()
    except Exception as error:
        why = " ".join(str(error).split())
        raise ArtifactError(f"the adapter in {folder} does not fit the model ({why}). Make it again.") from error


def merged(net: nn.Module, folder: Path) -> Any:
    """The plain network that a saved adapter makes of a network, by the method's own merge."""
    try:
        return load(net, folder).merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"peft cannot merge the adapter in {folder} ({why}). Use another method.") from error


class Held:
    """peft's model between the two ends of a training."""

    def __init__(self, rule: AdapterRule, where: str) -> None:
        self.rule, self.where = rule, where
        self.model: Any = None
        self.logits = torch.zeros(0)  # of the trained model, on a few ids

    def prepare(self, net: Any, _stream: Any) -> None:
        """Put the adapter around a network."""
        config = config_of(self.rule.method, self.rule.options, self.where)
        self.model = wrapped(net, config, self.where)

    def prepare_mixture(self, net: Any) -> None:
        """Put the adapter around a Mixture of Experts; its routers are trained as they are.

        By default the experts are adapted too, of which `all-linear` would adapt none: they are not linear layers, but
        tensors that hold them all.
        """
        routers, own = find_routers(net), {"target_modules", "target_parameters"}
        options = dict(self.rule.options)
        config = config_of(self.rule.method, options, self.where)
        if not own & options.keys():
            if not hasattr(config, "target_parameters"):
                raise RecipeError(
                    f"{self.where}.method: {self.rule.method} cannot adapt experts, which are tensors, not layers. "
                    f"Use lora, or name {TARGETS} to leave the experts as they are."
                )
            options |= {TARGETS: ALL, "target_parameters": sorted(_of_experts(net))}
            if inner := _linear_in(net, routers):
                options["exclude_modules"] = inner
            config = config_of(self.rule.method, options, self.where)
        self.model = wrapped(net, config, self.where)
        for router in routers.values():
            router.requires_grad_(True)

    def publish(self, net: Any, _state: Any, out: Path) -> None:
        """Write the adapter."""
        self.logits = probed(net).cpu()
        save(self.model, out)

    def merge(self, net: Any) -> Any:
        """The plain network; RecipeError unless it computes what the adapted one did."""
        wanted = probed(net)
        try:
            plain = self.model.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as error:
            why = " ".join(str(error).split())
            raise RecipeError(f"{self.where}: peft cannot merge this adapter ({why}). Use another method.") from error
        far = float((probed(plain) - wanted).abs().max())
        if not far <= SAME * max(1.0, float(wanted.abs().max())):
            raise RecipeError(
                f"{self.where}: what peft merged is not what was trained (logits differ by {far:.2g}). Use another "
                "method or other options."
            )
        return plain


def _linear_in(net: Any, routers: Mapping[str, nn.Module]) -> list[str]:
    """The linear layers that are a router's, by name."""
    mine = {id(module) for router in routers.values() for module in router.modules()}
    return [name for name, module in net.named_modules() if id(module) in mine and isinstance(module, nn.Linear)]


def _of_experts(net: Any) -> set[str]:
    """The stacked tensors of experts, by their names below a layer."""
    inside = {id(parameter) for module in experts_in(net) for parameter in module.parameters()}
    return {
        name.split(".layers.")[-1].partition(".")[2] for name, parameter in net.named_parameters()
        if id(parameter) in inside
    }  # fmt: skip
