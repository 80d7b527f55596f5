"""`btx moe` on a real export, as a user calls it: each verb's folder loads, passes `btx check`, and is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from btx.checkpoints.validate import read_config
from btx.cli.main import main
from btx.export.portable import notes
from btx.recipe.settings import ExportSettings
from btx.steps.export import write_model
from tests.support.command import btx
from tests.support.project import write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico project, run to its export."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    btx("export", "recipe.yaml", cwd=folder)
    return folder


def call(project: Path, *words: str, code: int = 0, data: bool = True) -> str:
    """`btx moe` with these arguments."""
    texts = [part for d in ("math", "code") for part in ("--data", f"{d}={project}/corpora/{d}.jsonl")] if data else []
    result = CliRunner().invoke(main, ["moe", *words, *texts])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.output


def check(folder: Path) -> str:
    """`btx check` passes; returns its output."""
    result = CliRunner().invoke(main, ["check", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def card_of(folder: Path) -> str:
    """Its model card."""
    return (folder / "README.md").read_text(encoding="utf-8")


def expert(project: Path, domain: str) -> str:
    """The folder of a trained expert."""
    return str((project / f"runs/pico/train-{domain}").resolve())


def test_an_expert_leaves_and_comes_back(project: Path, tmp_path: Path) -> None:
    export = project / "runs/pico/export"
    without, back = tmp_path / "without", tmp_path / "back"
    said = call(project, "remove", str(export), "--name", "code", "--out", str(without))
    assert "| before |" in said
    assert "| change |" in said
    check(without)
    call(project, "add", str(without), expert(project, "code"), "--name", "code", "--out", str(back))
    check(back)
    card = (back / "README.md").read_text()
    assert "btx moe add code" in card
    assert "| change |" in card
    again = tmp_path / "again"
    call(project, "remove", str(back), "--name", "code", "--out", str(again), data=False)
    for name in ("model.safetensors", "config.json", "experts.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (without / name).read_bytes(), name


def test_masked_experts_lie_beside_and_come_back(project: Path, tmp_path: Path) -> None:
    export, off, on = project / "runs/pico/export", tmp_path / "off", tmp_path / "on"
    call(project, "mask", str(export), "--name", "math", "--out", str(off), data=False)
    check(off)
    call(project, "unmask", str(off), "--out", str(on), data=False)
    check(on)
    found, wanted = (load_file(f / "model.safetensors") for f in (on, export))
    assert found.keys() == wanted.keys()
    assert all((found[n] == wanted[n]).all() for n in wanted)


def test_a_fused_export_is_read_and_stays_fused(project: Path, tmp_path: Path) -> None:
    export, fused, out = project / "runs/pico/export", tmp_path / "fused", tmp_path / "out"
    fused.mkdir()
    write_model(export, fused, ExportSettings(layout="fused"))
    shutil.copy(export / "experts.json", fused)
    said = call(project, "replace", str(fused), expert(project, "code"), "--name", "code", "--out", str(out))
    assert "| change |" in said
    assert "the experts fused as transformers 5 holds them" in check(out)
    assert notes(read_config(out), "fused", out)[0] in card_of(out)


def test_extract_and_replace(project: Path, tmp_path: Path) -> None:
    export, dense, other = project / "runs/pico/export", tmp_path / "dense", tmp_path / "other"
    call(project, "extract", str(export), "--name", "math", "--out", str(dense))
    assert "MistralForCausalLM" in check(dense)
    call(project, "replace", str(export), str(dense), "--name", "code", "--out", str(other))
    check(other)
    for folder in (dense, other):
        config = read_config(folder)
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # the key that transformers 4 reads
        said = notes(config, "published", folder)
        assert any("llama.cpp" in note for note in said)
        assert all(note in card_of(folder) for note in said)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["remove", "{export}", "--name", "cdoe", "--out", "{out}"], 2, "did you mean 'code'"),
        (["remove", "{dense}", "--name", "code", "--out", "{out}"], 3, "not a Mixture of Experts"),
        (["remove", "{export}", "--name", "code", "--out", "{export}"], 2, "already exists"),
        (["unmask", "{export}", "--out", "{out}"], 3, "nothing is masked"),
        (["add", "{export}", "{dense}", "--name", "law", "--out", "{out}"], 2, "--data law=PATH"),
        (["add", "{export}", "{dense}", "--name", "code", "--out", "{out}"], 2, "already has an expert 'code'"),
        (["add", "{export}", "{dense}", "--name", "7", "--out", "{out}"], 2, "not an expert's name"),
        (["replace", "{export}", "{nowhere}", "--name", "code", "--out", "{out}"], 3, "is not a folder"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_mistakes_end_in_a_sentence_and_leave_nothing(
    project: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    places = {"export": project / "runs/pico/export", "dense": expert(project, "code"), "out": tmp_path / "out",
              "nowhere": tmp_path / "nowhere"}  # fmt: skip
    output = call(project, *(w.format(**places) for w in words), code=code)
    assert said in output
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_what_it_was_is_refused(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project / "runs/pico/export", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    said = call(project, "remove", str(copy), "--name", "code", "--out", str(tmp_path / "out"), code=3)
    assert "model.safetensors" in said
    assert not (tmp_path / "out").exists()


def test_few_tokens_are_enough_for_a_look(project: Path, tmp_path: Path) -> None:
    export = project / "runs/pico/export"
    call(project, "remove", str(export), "--name", "code", "--out", str(tmp_path / "out"), "--tokens", "64")
