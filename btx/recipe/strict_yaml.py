"""Strict YAML: no duplicate keys, no aliases, no keys that turn into true and false."""

from __future__ import annotations

from typing import Any

import yaml

from btx.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, and aliases (which can expand without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases (*name) are not allowed in recipes, line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key must be a word, line {line}")
            if key.tag == "tag:yaml.org,2002:bool":
                raise yaml.YAMLError(f"YAML reads the key {key.value} as true or false, line {line}; put it in quotes")
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} appears twice, line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Safe YAML; RecipeError naming the line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise RecipeError(f"{where} is not a recipe: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date of month 13 is a ValueError
        hint = " (a tab? YAML is indented with spaces)" if "\t" in text else ""
        raise RecipeError(f"{where} is not valid YAML{hint}: {' '.join(str(error).split())}.") from error
