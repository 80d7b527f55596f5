"""Reads a peft adapter_config.json: which weights of the seed it changes, and at what scale; or refuses it.

Options understood here are followed as in peft 0.21; those that affect training alone, or only keep a record, are
ignored; any other, also of a later peft, must be unset, or the adapter is refused with the option's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from btx.checkpoints.layouts import ADAPTER, refuse_pointer
from btx.errors import ArtifactError

CONFIG = ADAPTER
RECORDS = {  # records, and options that affect training alone
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "eva_config",  # how the initial factors were found
    "loftq_config",  # peft ignores this and the next unless init_lora_weights selects them
    "corda_config",
}
UNDERSTOOD = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
}
IDLE: dict[str, tuple[Any, ...]] = {  # values besides null, false and empty under which an option does nothing
    "bias": ("none",),
    "megatron_core": ("megatron.core",),  # a name, used with megatron_config only
    "qalora_group_size": (16,),  # used with use_qalora only
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
STARTS = (
    None,
    True,
    "gaussian",
    "orthogonal",
    "eva",
)  # initialisations that leave the seed's weights unchanged, and add nothing at first
TASKS = (None, "CAUSAL_LM")
ALL_LINEAR = "all-linear"
REMEDY = "Merge the adapter yourself (peft's merge_and_unload, then save_pretrained), and name the dense folder."


class LoraOptions:
    """The validated options of an adapter."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        self.config = _read(self.path)
        self._require_understood()
        self.rslora, self.dora = bool(self.config.get("use_rslora")), bool(self.config.get("use_dora"))
        self.saved: list[str] = list(self.config.get("modules_to_save") or [])

    def refused(self, option: str, why: str) -> ArtifactError:
        """An ArtifactError that names an option, its value and the remedy."""
        return ArtifactError(f"{self.path} has {option}: {self.config.get(option)!r:.200}, {why}. {REMEDY}")

    def _require_understood(self) -> None:
        config = self.config
        for option, value in config.items():
            if option in UNDERSTOOD or option in RECORDS or value in IDLE.get(option, ()):
                continue
            if not (value is None or value is False or (value in ([], {}, "") and option != "alora_invocation_tokens")):
                raise self.refused(option, "which is more than W + s B A as btx computes it")
        if config.get("task_type") not in TASKS:
            raise self.refused("task_type", "but experts are causal language models (CAUSAL_LM)")
        start = config.get("init_lora_weights", True)
        if start is not False and (start not in STARTS or (start == 1 and start is not True)):
            raise self.refused("init_lora_weights", "an initialisation that may change the seed's own weights")
        if not config.get("target_modules"):
            raise self.refused("target_modules", "so it names no modules to change")
        self._require_kinds()

    def _require_kinds(self) -> None:
        """ArtifactError for an option whose value has a type that peft does not accept."""
        names, config = (str, list), self.config
        kinds: dict[str, tuple[type, ...]] = {
            "target_modules": names, "exclude_modules": names, "layers_pattern": names, "modules_to_save": (list,),
            "layers_to_transform": (int, list), "rank_pattern": (dict,), "alpha_pattern": (dict,),
            "use_rslora": (bool,), "use_dora": (bool,),
        }  # fmt: skip
        for option, wanted in kinds.items():
            value = config.get(option)
            inner = value if isinstance(value, list) else []
            kind: type | tuple[type, ...] = int if option == "layers_to_transform" else str
            if value is not None and (not isinstance(value, wanted) or not all(isinstance(i, kind) for i in inner)):
                raise self.refused(option, "which is of another type than peft writes")
        ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
        scales = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
        if not all(type(r) is int and r > 0 for r in ranks):
            raise self.refused(
                "r", f"or rank_pattern {config.get('rank_pattern')!r:.100}, where positive integers belong"
            )
        if not all(type(a) in (int, float) and math.isfinite(a) for a in scales):
            raise self.refused(
                "lora_alpha", f"or alpha_pattern {config.get('alpha_pattern')!r:.100}, where numbers belong"
            )
        if config.get("layers_pattern") and self._layers() is None:
            raise self.refused("layers_pattern", "which peft does not accept without layers_to_transform")
        if isinstance(config["target_modules"], str) and (self._layers() is not None or config.get("layers_pattern")):
            raise self.refused("layers_to_transform", "which peft does not accept beside target_modules as one pattern")

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(self._of("rank_pattern", module, self.config.get("r", 8)))

    def scale(self, module: str) -> float:
        """s of a module: alpha over the rank or, with use_rslora, over its root."""
        alpha = float(self._of("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, option: str, module: str, usual: Any) -> Any:
        """The value of the first pattern that matches a module, as in peft where patterns overlap."""
        patterns = self.config.get(option) or {}
        return next((v for p, v in patterns.items() if self._match(option, rf"(.*\.)?({p})$", module)), usual)

    def _match(self, option: str, pattern: str, text: str) -> re.Match[str] | None:
        try:
            return re.match(pattern, text)
        except re.error as error:
            raise self.refused(option, f"which is not a regular expression ({error})") from error

    def selects(self, module: str, linear: Iterable[str]) -> bool:
        """Whether peft puts factors on a module; `linear` are those that "all-linear" stands for."""
        config = self.config
        target, exclude = config["target_modules"], config.get("exclude_modules")
        if exclude and self._named("exclude_modules", exclude, module):
            return False
        if any(self._match("modules_to_save", rf"(^|.*\.){m}($|\..*)", module) for m in self.saved):
            return False
        if isinstance(target, str) and target.lower() == ALL_LINEAR:
            return module in linear
        if not self._named("target_modules", target, module):
            return False
        return isinstance(target, str) or self._in_layer(module)

    def _named(self, option: str, names: str | list[str], module: str) -> bool:
        """Whether a module matches one pattern, or ends with one of several names."""
        if isinstance(names, str):
            return self._match(option, rf"(?:{names})\Z", module) is not None
        return module in names or any(module.endswith(f".{name}") for name in names)

    def _layers(self) -> list[int] | None:
        layers = self.config.get("layers_to_transform")
        return [layers] if isinstance(layers, int) else layers or None

    def _in_layer(self, module: str) -> bool:
        """Whether a module lies in one of `layers_to_transform`, finding its layer number as peft does."""
        layers, patterns = self._layers(), self.config.get("layers_pattern") or []
        if layers is None:
            return True
        wanted = [rf"(?:^|.*?\.){p}\." for p in ([patterns] if isinstance(patterns, str) else patterns)] or [
            r".*?\.[^.]*\."
        ]
        matches = (self._match("layers_pattern", rf"{p}(?P<idx>\d+)\.", module) for p in wanted)
        found = next((m for m in matches if m), None)
        return found is not None and int(found["idx"]) in layers


def _read(path: Path) -> dict[str, Any]:
    """The parsed file; ArtifactError if it is damaged, or of another adapter type."""
    refuse_pointer(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r:.200}). Fetch the adapter again.") from error
    if kind != "LORA":
        raise ArtifactError(
            f"{path} says peft_type: {kind!r:.80}; of peft's adapter types only LoRA can become an expert. {REMEDY}"
        )
    return dict(config)
