"""Faults of machines: full disks, terminals with few characters, foreign rank variables, files put back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btx.cli.main import graph_of
from btx.conversions.registry import classes
from btx.errors import ArtifactError, ResourceError, disk_error, full_disks_told
from btx.graph.digests import Digests
from btx.graph.job import freeze, thaw
from btx.graph.launch import ROLES, own_rank
from tests.support.machines import few_bytes
from tests.support.project import write_project

BTX = [sys.executable, "-m", "btx"]


def digests(folder: Path) -> dict[str, str]:
    """The digest of every published step of a run."""
    import json

    found = {p.parent.name: json.loads(p.read_text())["digest"] for p in folder.glob("pico/steps/*/btx.json")}
    assert found
    return found


def run_with_files_of(size: int, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A whole run of the pico project with a limit on file size."""
    return subprocess.run(
        [*BTX, *argv], cwd=folder, capture_output=True, text=True, timeout=300, preexec_fn=lambda: few_bytes(size)
    )


@pytest.mark.parametrize("size", [pytest.param(2_000, marks=pytest.mark.slow), 60_000])
def test_a_full_disk_ends_with_5_and_leaves_what_goes_on_to_the_same_bytes(tmp_path: Path, size: int) -> None:
    """2 kB stop the first manifest or tokens, 60 kB the first weights."""
    write_project(tmp_path)
    argv = ["train", "recipe.yaml", "--domain", "math"]
    ended = run_with_files_of(size, tmp_path, *argv)
    assert ended.returncode == 5, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Free space" in ended.stderr
    assert subprocess.run([*BTX, *argv], cwd=tmp_path, capture_output=True, timeout=300).returncode == 0
    undisturbed = ["--set", "run.directory=undisturbed"]
    assert subprocess.run([*BTX, *argv, *undisturbed], cwd=tmp_path, capture_output=True, timeout=300).returncode == 0
    assert digests(tmp_path / "runs") == digests(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("size", [500, 8_000, 20_000, 120_000, 200_000, 400_000])
def test_a_full_disk_at_any_write_of_a_run_ends_with_5(tmp_path: Path, size: int) -> None:
    write_project(tmp_path)
    ended = run_with_files_of(size, tmp_path, "run", "recipe.yaml")
    assert ended.returncode in (0, 5), ended.stderr
    assert "Traceback" not in ended.stderr
    assert size > 300_000 or ended.returncode == 5


def test_what_a_library_makes_of_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    """safetensors and tokenizers raise exceptions of their own."""
    code = f"""
from tests.support.machines import few_bytes
import torch
from safetensors.torch import save_file
from btx.errors import ResourceError, full_disks_told
few_bytes(1000)
try:
    with full_disks_told():
        save_file({{"a": torch.zeros(1000)}}, {str(tmp_path / "a")!r})
except ResourceError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "File too large" in ended.stdout, ended
    assert disk_error(Exception("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert not disk_error(Exception("layer 28 is missing"))
    assert not disk_error(Exception("the server ended with exit code: 28"))
    assert not disk_error(FileNotFoundError(2, "No such file"))
    with pytest.raises(KeyError), full_disks_told():
        raise KeyError("not a disk")
    with pytest.raises(ResourceError, match="at /x: No space left on device"), full_disks_told():
        raise OSError(28, "No space", "/x")
    save_file({"a": torch.zeros(2)}, tmp_path / "b")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_of_few_signs_get_plain_ones(tmp_path: Path, encoding: str) -> None:
    write_project(tmp_path)
    ended = subprocess.run([*BTX, "plan", "recipe.yaml"], cwd=tmp_path, capture_output=True, timeout=120,
                           env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120"})  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout.decode(encoding)
    assert "6 * active" in text if encoding == "ascii" else "6 · active" in text


@pytest.mark.parametrize("verb", [["schema"], ["--help"]])
def test_output_that_cannot_be_written_ends_with_5(verb: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*BTX, *verb], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 5, ended.stderr
    assert ended.stderr.startswith("btx: disk error: No space left on device.")
    assert ended.stderr.count("\n") == 1


def test_ranks_that_others_set_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kubernetes pod may set them; if trusted, the step would wait forever for rank 0."""
    write_project(tmp_path)
    strange = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    ended = subprocess.run([*BTX, "train", "recipe.yaml", "--domain", "math"], cwd=tmp_path, capture_output=True,
                           text=True, timeout=300, env={**os.environ, **strange})  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for name, value in strange.items():
        monkeypatch.setenv(name, value)
    assert own_rank(launched=True) == 3
    assert own_rank(launched=False) == 0
    assert not {*strange} & os.environ.keys()
    assert {*strange} <= {*ROLES}


def test_a_file_put_back_with_other_content_is_read_again(tmp_path: Path) -> None:
    """With the same size and mtime, in place or as another file."""
    file = tmp_path / "x.jsonl"
    file.write_text("one")
    known = Digests(tmp_path / "digests.json")
    first, about = known(file), file.stat()
    file.write_text("two")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    second = known(file)
    (tmp_path / "y").write_text("six")
    os.utime(tmp_path / "y", ns=(about.st_atime_ns, about.st_mtime_ns))
    (tmp_path / "y").replace(file)
    assert len({first, second, known(file)}) == 3


def test_a_worker_takes_what_was_planned_whatever_became_of_the_recipe_and_no_other_step(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    graph = graph_of(recipe, ("finetune.routing=sample_top1", "upcycle={}", "dense={}"))
    jobs = {step.label: freeze(step, threads=3) for step in graph.steps.values() if step.kind != "given"}
    recipe.write_text("another")
    for label, file in jobs.items():
        step, planned = thaw(file, classes()), graph.steps[label]
        assert (step.key, step.label, step.folder, type(step)) == (planned.key, label, planned.folder, type(planned))
        assert step.where == planned.where.model_copy(update={"threads": 3})
        assert {name: parent.key for name, parent in step.parents.items()} == {
            name: parent.key for name, parent in planned.parents.items()
        }
    file = jobs["train:math"]
    changes = {
        ('"learning_rate": 0.001', '"learning_rate": 0.002'): "differs from the step that was planned",
        ('"budget"', '"budgets"'): "not a job of this btx",
        ('"class": "Train"', '"class": "os.system"'): "not a job of this btx",
    }
    for (old, new), word in changes.items():
        assert old in file.read_text()
        changed = tmp_path / "changed.job.json"
        changed.write_text(file.read_text().replace(old, new))
        with pytest.raises(ArtifactError, match=f"{word}[^~]*same command again"):
            thaw(changed, classes())
    with pytest.raises(ArtifactError, match="not a job of this btx"):
        thaw(tmp_path / "none", classes())


def test_where_every_expert_was_trained_elsewhere_there_is_nothing_to_train(tmp_path: Path) -> None:
    write_project(tmp_path)
    for name in ("math", "code"):
        shutil.copytree(tmp_path / "seed", tmp_path / name)
    sets = [part for name in ("math", "code") for part in ("--set", f"domains.{name}={{checkpoint: {name}, data: "
            f"['corpora/{name}.jsonl']}}")]  # fmt: skip
    for more in ([], ["--domain", "math"]):
        ended = subprocess.run([*BTX, "train", "recipe.yaml", *sets, *more], cwd=tmp_path, capture_output=True,
                               text=True, timeout=120)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("Nothing to train: ")
    assert not (tmp_path / "runs").exists()
