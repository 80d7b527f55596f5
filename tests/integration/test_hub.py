"""Checkpoints and data of the hub, by huggingface_hub against a server on loopback; and what is pushed comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from btx.checkpoints.hub import parsed
from btx.errors import RecipeError
from tests.support.command import btx
from tests.support.hub_server import TOKEN, Hub, serving
from tests.support.project import write_project


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as found:
        for name, value in {"HF_ENDPOINT": found.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
                            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield found


@pytest.fixture
def project(tmp_path: Path, hub: Hub) -> Path:
    """A recipe whose seed is the hub's; the repositories hold files besides that btx does not read."""
    place = tmp_path / "project"
    place.mkdir()
    recipe = write_project(place)
    (place / "seed" / "pytorch_model.bin").write_bytes(b"pickle")
    (place / "seed" / "original").mkdir()
    (place / "seed" / "original" / "consolidated.safetensors").write_bytes(b"x")
    hub.add("models/org/seed", place / "seed")
    texts = tmp_path / "texts"
    (texts / "train").mkdir(parents=True)
    data = place / "corpora" / "math.jsonl"
    (texts / "train" / "math.jsonl").write_bytes(data.read_bytes())
    (texts / "other.jsonl").write_bytes(b"{}")
    hub.add("datasets/org/texts", texts)
    text = recipe.read_text()
    assert "checkpoint: seed" in text
    recipe.write_text(text.replace("checkpoint: seed", "checkpoint: hf://org/seed"))
    for path in (place / "seed").rglob("*"):
        if path.is_file():
            path.unlink()
    return place


DATA = "domains.math.data=[hf://datasets/org/texts/train/*.jsonl]"


def test_a_seed_and_data_of_the_hub_are_fetched_pinned_recorded_and_used_offline(
    project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = btx("run", "recipe.yaml", "--set", DATA, cwd=project)
    commit = hub.repositories["models/org/seed"].branches["main"]
    card = (project / "runs/pico/export/README.md").read_text()
    assert f"hf://org/seed@{commit}" in card
    assert "base_model: org/seed" in card
    fetched = {
        line.split("/resolve/")[1].split("/", 1)[1]
        for line in hub.asked
        if line.startswith("GET") and "/resolve/" in line
    }
    assert {"config.json", "model.safetensors", "tokenizer.json", "train/math.jsonl"} <= fetched
    assert not fetched & {"pytorch_model.bin", "original/consolidated.safetensors", "other.jsonl"}
    written = [path for path in (project / "runs").rglob("*") if path.is_file() and path.stat().st_size < 10**6]
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    count = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "done already" in btx("run", "recipe.yaml", "--set", DATA, cwd=project).stdout
    assert len(hub.asked) == count
    absent = btx("plan", "recipe.yaml", "--set", "seed.checkpoint=hf://org/other", cwd=project, code=3)
    assert "switched off (HF_HUB_OFFLINE)" in absent.stderr


REFUSED = {
    "hf://org/nothing": "org/nothing is not on the hub, or is private",
    "hf://org/seed@v9": "org/seed has no revision 'v9'",
    "hf://org/closed": "org/closed is gated",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_told_in_a_sentence(project: Path, hub: Hub, name: str) -> None:
    hub.add("models/org/closed", project, gated=True)
    said = btx("plan", "recipe.yaml", "--set", f"seed.checkpoint={name}", cwd=project, code=3).stderr
    assert f"seed.checkpoint: {REFUSED[name]}" in said
    assert "Traceback" not in said


def test_a_plan_needs_no_weights(project: Path, hub: Hub) -> None:
    assert "train:math" in btx("plan", "recipe.yaml", cwd=project).stdout
    assert not any(line.startswith("GET") and line.endswith(".safetensors") for line in hub.asked)


def test_a_gated_repository_opens_to_a_token(project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["models/org/seed"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in btx("plan", "recipe.yaml", cwd=project).stdout


def test_a_download_that_breaks_off_is_told_and_goes_on_later(project: Path, hub: Hub) -> None:
    hub.broken.add("model.safetensors")
    said = btx("run", "recipe.yaml", "--until", "branch", cwd=project, code=3).stderr
    assert "org/seed was not fetched whole" in said
    hub.broken.clear()
    btx("plan", "recipe.yaml", cwd=project)
    btx("run", "recipe.yaml", "--until", "branch", cwd=project)


def test_a_pushed_export_comes_back_and_checks(project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    btx("run", "recipe.yaml", cwd=project)
    refused = btx("push", "runs/pico/export", "org/mixture", cwd=project, code=3).stderr
    assert "does not let you write org/mixture (status 401)" in refused
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for branch in ((), ("--revision", "second")):
        said = btx("push", "runs/pico/export", "org/mixture", *branch, cwd=project).stdout
        assert f"hf://org/mixture{'@second' if branch else ''}" in said
    back = project / "back"
    for name, content in (
        hub.repositories["models/org/mixture"]
        .commits[hub.repositories["models/org/mixture"].branches["second"]]
        .items()
    ):
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(content)
    btx("check", back, cwd=project)
    (project / "runs/pico/export/config.json").resolve().write_text("{}")
    assert "not what SHA256SUMS says" in btx("push", "runs/pico/export", "org/mixture", cwd=project, code=3).stderr


@pytest.mark.parametrize(
    "name",
    ["hf://seed", "hf://org/name/sub", "hf://datasets/org/name", "hf://org/na me", "hf://org/name@", "hf://../x"],
)
def test_what_names_no_repository_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="names no repository of the hub"):
        parsed(name, "seed.checkpoint")


def test_revisions_and_paths_are_taken_apart() -> None:
    model, data = parsed("hf://org/a.b-c@refs%2Fpr%2F1", "x"), parsed("hf://datasets/o/n@v1/a/*.jsonl", "x")
    assert (model.id, model.revision, model.path) == ("org/a.b-c", "refs/pr/1", None)
    assert (data.id, data.revision, data.path) == ("o/n", "v1", "a/*.jsonl")
