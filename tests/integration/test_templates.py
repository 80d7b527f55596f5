"""The seed's chat templates, those for tools too, render its texts and are carried to every model made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx.checkpoints.carried import TEMPLATES
from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.token_map import carry_beside
from btx.data.encoder import load_tokenizer
from btx.errors import ArtifactError
from btx.export.proof import write_sums
from btx.graph.artifact import write_json
from btx.recipe.settings import ExportSettings
from btx.steps.export import write_model
from tests.support.layouts import check, snapshot
from tests.support.merges import merge
from tests.support.mixtures import moe
from tests.support.models import config_of, save_model
from tests.support.world import World

TOOL = f"{TEMPLATES}/tool_use.jinja"
TEXTS = {"chat_template.jinja": "{{ messages }}", TOOL: "{{ tools }}{{ messages }}"}


def with_templates(folder: Path) -> Path:
    """The folder with a chat template and one for tools."""
    (folder / TEMPLATES).mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_all_templates_go_with_the_mixture_and_with_what_is_made_of_it(tmp_path: Path) -> None:
    seed = with_templates(save_model(tmp_path / "seed", config_of("llama")))
    wanted = load_tokenizer(seed).chat_template
    assert wanted == {"default": TEXTS["chat_template.jinja"], "tool_use": TEXTS[TOOL]}
    carry_beside(seed, tmp_path / "beside", "mixtral")
    out = tmp_path / "export"
    out.mkdir()
    write_model(merge(tmp_path / "moe", [seed] * 2, top_k=1), out, ExportSettings())
    write_json(out / "experts.json", {"experts": ["0", "1"]})
    write_sums(out)
    moe("replace", out, seed, "--name", "1", out=tmp_path / "new")
    for folder in (tmp_path / "beside", out, snapshot(out, tmp_path / "hub"), tmp_path / "new"):
        assert load_tokenizer(folder).chat_template == wanted
        if folder.name != "beside":
            check(folder)


def test_another_template_for_tools_is_another_seed(world: World) -> None:
    with_templates(world.seed)
    before, key = Checkpoint(world.seed).digest(), world.key("tokens:math")
    (world.seed / TOOL).write_text("{{ messages }}", encoding="utf-8")
    assert Checkpoint(world.seed).digest() != before
    assert world.key("tokens:math") != key
    (world.seed / TOOL).unlink()
    (world.seed / TOOL).symlink_to(world.math)
    with pytest.raises(ArtifactError, match=r"tool_use\.jinja is a link that leaves"):
        Checkpoint(world.seed)


def test_a_generation_config_that_is_no_object_is_refused(world: World) -> None:
    (world.seed / "generation_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"generation_config\.json is not a JSON object"):
        Checkpoint(world.seed)
