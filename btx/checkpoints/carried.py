"""The files that go with a model besides config and weights: tokenizer, chat templates, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"  # folder of the chat templates besides the default one, such as for tools


def carried(folder: Path) -> list[str]:
    """Relative names of the files in a folder that go with its model, besides config and weights."""
    templates = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    return [name for name in (*CARRIED, *templates) if (folder / name).is_file()]


def chat_template(folder: Path) -> Any:
    """The chat template of a folder, from its own file or from tokenizer_config.json; None where it has none."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    try:
        return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
