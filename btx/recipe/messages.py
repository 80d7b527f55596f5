"""The error messages of a recipe: where, what was found, and the nearest known key."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from btx.errors import nearest

SIGNS = "use letters a-z, digits, '-', '_' and '.', a letter or digit first, 64 at most"
_PLAINLY = {
    **dict.fromkeys(("model_type", "dict_type"), "must be a mapping, lines of `key: value`"),
    "list_type": "must be a list, such as [one, two]",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not be blank",
    "finite_number": "must be a finite number",
}
RENAMED = {  # keys and values of older recipes, with their present names
    "clip": "max_grad_norm",
    "min_learning_rate": "min_lr_ratio",
    "loss_on": "loss_mask",
    "form": "type",
    "one": "per_model",
}
_BRANCHES = re.compile(
    r"(function-|constrained-|(literal|list|dict)\[|`|(int|float|str|bool)$)"
)  # parts of a path in a union


def sentences(error: ValidationError, model: type[BaseModel], names: str) -> list[str]:
    """One sentence for each invalid field of a `model`; for a union, what each branch expects.

    `names` is the pattern of names, which pydantic would quote.
    """
    found: dict[str, str] = {}
    for one in error.errors():
        path = [str(p) for p in one["loc"] if not _BRANCHES.match(str(p))]
        where = ".".join(path)
        message = _explain(one, path, model, names)
        found[where] = f"{found[where]}, or {message}" if where in found else message
    sentences = [f"{where}: {message}".removeprefix(": ") for where, message in found.items()]
    return [text if text.endswith("?") else text.rstrip(".") + "." for text in sentences]


def _explain(error: Any, path: list[str], model: type[BaseModel], names: str) -> str:
    """What is wrong at a place and, for an unknown key, the nearest known one."""
    if error["type"] == "extra_forbidden":
        known = _keys(path[:-1], model)
        if (new := RENAMED.get(path[-1])) in known:
            return f"this key is called {new} now"
        return f"there is no such key; {nearest(path[-1], known)}"
    if error["type"] == "literal_error" and f"'{(new := RENAMED.get(str(error['input'])))}'" in error["msg"]:
        return f"{error['input']} is called {new} now"
    if error["type"] in ("missing", "value_error"):
        return "is missing" if error["type"] == "missing" else str(error["msg"]).removeprefix("Value error, ")
    if error.get("ctx", {}).get("pattern") == f"^{names}$":
        return f"{error['input']!r:.80} cannot name a folder; {SIGNS}"
    if error["type"] == "too_short":
        least = error["ctx"]["min_length"]
        many = "must not be empty" if least == 1 else f"needs {least} entries or more"
        return f"{many} (found {error['input']!r:.80})"
    message = _PLAINLY.get(error["type"]) or str(error["msg"]).replace("Input should", "should")
    return f"{message} (found {error['input']!r:.80})"


def _keys(path: list[str], model: type[BaseModel]) -> list[str]:
    """The keys that are valid at a place in the recipe."""
    for part in path:
        if part in model.model_fields:  # else it is a name, such as a domain's
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for item in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None
