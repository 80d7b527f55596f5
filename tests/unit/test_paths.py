"""Paths of a recipe: one rule for file, folder and glob, links followed once, and nothing skipped silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx.data.corpus import Counts, read, resolve
from btx.errors import RecipeError
from tests.support.world import World, write_jsonl


def named(base: Path, *patterns: str) -> tuple[list[str], list[str]]:
    """The files below a base that patterns mean, and what is said of others."""
    notes: list[str] = []
    return [str(Path(f).relative_to(base)) for f in resolve([*patterns], base, "x", notes)], notes


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """A folder with files below it, a link to a folder outside, one to itself, and names of other kinds."""
    base = tmp_path / "v1 [x]"
    for name in ("c/a.jsonl", "c/B.JSONL", "c/deep/er/d.txt", "c/README.md", "c/e.tar", "c/.hidden/f.txt", "g.json"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "h.parquet").touch()
    (base / "c" / "linked").symlink_to(tmp_path / "away")
    (base / "c" / "loop").symlink_to(base / "c")
    (base / "c" / "other loop").symlink_to(base)
    (base / "c" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    return base


ALL = ["c/B.JSONL", "c/a.jsonl", "c/deep/er/d.txt", "c/linked/h.parquet"]


@pytest.mark.parametrize("pattern", ["c", "c/", "./c", "c*", "c/**", "c/**/*", "[c]/**", "c/../c"])
def test_a_folder_and_its_globs_mean_the_same_files_and_each_folder_once(corpora: Path, pattern: str) -> None:
    found, notes = named(corpora, pattern)
    assert sorted(Path(f).name for f in found if "other loop" not in f) == sorted(Path(f).name for f in ALL)
    assert len([f for f in found if f.endswith("a.jsonl")]) == 1
    assert "README.md" in notes[0]
    assert "e.tar" in notes[0]
    assert "dangling.txt" in notes[0]
    assert "hidden" not in " ".join([*found, *notes])


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("c/*.jsonl", ["c/a.jsonl"]),
        ("c/*.[jJ]*", ["c/B.JSONL", "c/a.jsonl"]),
        ("c/**/*.txt", ["c/deep/er/d.txt"]),
        ("**/er/*", ["c/deep/er/d.txt"]),
        ("**/er", ["c/deep/er/d.txt"]),
        ("c/linked/*.parquet", ["c/linked/h.parquet"]),
        ("c/*/*.parquet", ["c/linked/h.parquet"]),
        ("c/**/h.parquet", ["c/linked/h.parquet"]),
        ("*.json", ["g.json"]),
    ],
)
def test_globs_below_a_folder_whose_name_has_signs_of_a_glob(corpora: Path, pattern: str, wanted: list[str]) -> None:
    assert named(corpora, pattern)[0] == wanted
    assert named(corpora, str(corpora / pattern))[0] == wanted


def test_a_tilde_is_the_home_folder(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(corpora))
    assert named(corpora, "~/c/a.jsonl", "~/g.json")[0] == ["c/a.jsonl", "g.json"]
    assert named(corpora, "~/c/*.jsonl")[0] == ["c/a.jsonl"]


def test_run_directory_and_checkpoints_know_the_tilde_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from btx.cli.main import graph_of

    monkeypatch.setenv("HOME", str(world.root))
    world.set("run.directory", "~/runs")
    world.set("seed.checkpoint", "~/seed")
    graph = graph_of(world.write(), ())
    assert graph.root == world.root / "runs" / "r"
    world.set("run.directory", "~nobody-here/runs")
    with pytest.raises(RecipeError, match=r"run\.directory: ~nobody-here"):
        graph_of(world.write(), ())


def test_two_names_of_one_file_or_of_equal_ones_are_a_warning_and_one_name_twice_is_refused(world: World) -> None:
    from btx.cli.main import graph_of
    from btx.steps.tokens import TokensStep

    hub = world.root / "hub"  # as the cache of the hub lays a dataset out
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "1f").mkdir(parents=True)
    write_jsonl(hub / "blobs" / "77aa", [{"text": f"text {n}"} for n in range(9)])
    for name in ("train.jsonl", "copy.jsonl"):
        (hub / "snapshots" / "1f" / name).symlink_to("../../blobs/77aa")
    world.set("domains.math.data", ["hub"])
    step = graph_of(world.write(), ()).steps["tokens:math"]
    assert isinstance(step, TokensStep)
    assert len(step.sources) == 2
    assert any("train.jsonl holds the same as" in note for note in step.notes)
    assert any("77aa" in note for note in step.notes)
    before = step.key
    (hub / "snapshots" / "1f" / "copy.jsonl").unlink()
    (hub / "snapshots" / "1f" / "copy.jsonl").write_bytes((hub / "blobs" / "77aa").read_bytes())
    assert graph_of(world.write(), ()).steps["tokens:math"].key == before
    world.set("domains.math.data", ["hub", "hub/snapshots/1f/train.jsonl"])
    with pytest.raises(RecipeError, match="twice"):
        graph_of(world.write(), ())


@pytest.mark.parametrize("name", ["a.json", "A.JSON", "a.json.gz"])
def test_json_is_an_array_or_lines_or_one_record(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    bodies = {json.dumps(rows): 2, json.dumps(rows, indent=2): 2, "\ufeff \n" + json.dumps(rows): 2, lines: 2,
              json.dumps(rows[0], indent=1): 1, json.dumps(rows[0]): 1, "": 0, "[]": 0}  # fmt: skip
    for body, count in bodies.items():
        data = body.encode()
        if name.endswith(".gz"):
            import gzip

            data = gzip.compress(data)
        (tmp_path / name).write_bytes(data)
        texts = [d.text for d in read([str(tmp_path / name)], skip_bad=False, counts=Counts())]
        assert texts == ["one", "two"][:count]
