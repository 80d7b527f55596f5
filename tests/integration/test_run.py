"""A whole run through the command, on a pico seed: what a user does and sees."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import BTX, btx, results, wait_for_step, wait_until_free
from tests.support.project import write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that was run."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    first = btx("run", "recipe.yaml", cwd=folder)
    (folder / "first.out").write_text(first.stdout)
    (folder / "first.err").write_text(first.stderr)
    return folder


def test_the_matrix_has_every_model_and_domain(project: Path) -> None:
    table = results(project)["bits_per_byte"]
    assert list(table) == ["seed", "expert:math", "expert:code", "average", "merged", "finetuned"]
    assert all(set(row) == {"math", "code"} and all(0 < v < 20 for v in row.values()) for row in table.values())
    intervals = results(project)["interval_95"]
    assert all(low <= table[m][d] <= high for m, row in intervals.items() for d, (low, high) in row.items())


def test_each_expert_is_best_on_its_own_domain(project: Path) -> None:
    table = results(project)["bits_per_byte"]
    for domain in ("math", "code"):
        rows = {m: row[domain] for m, row in table.items() if m.startswith(("seed", "expert"))}
        assert min(rows, key=lambda m: rows[m]) == f"expert:{domain}"


def test_the_run_prints_the_matrix_the_routing_and_two_lines_to_sample(project: Path) -> None:
    out = (project / "first.out").read_text()
    assert "Bits per byte" in out
    assert "Routing" in out
    assert "runs/pico/export" in out
    assert not re.search("Traceback|Warning", out + (project / "first.err").read_text())


def test_without_a_terminal_progress_comes_as_timestamped_lines(project: Path) -> None:
    lines = (project / "first.err").read_text().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert any("train:math" in line and "tokens/s" in line for line in lines)


def test_a_second_run_finds_everything_done(project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (project / "runs").rglob("*") if p.is_file()}
    done = btx("run", "recipe.yaml", cwd=project)
    assert "done already" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (project / "runs").rglob("*") if p.is_file()}


def test_the_two_lines_it_prints_load_and_sample_the_export(project: Path) -> None:
    lines = [line.strip() for line in (project / "first.out").read_text().splitlines() if line.startswith("    ")]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=project, capture_output=True, text=True,
                          check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Question: Tom has 12 apples and")


def test_check_passes_an_export_and_names_a_changed_file(project: Path, tmp_path: Path) -> None:
    export = project / "runs/pico/export"
    assert "MixtralForCausalLM" in btx("check", export, cwd=project).stdout
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", export, copy], check=True)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in btx("check", copy, cwd=project, code=3).stderr


def test_a_sequence_too_long_is_refused_also_when_the_seed_was_verified_before(project: Path) -> None:
    sets = ["--set", "train.sequence_length=256"]
    assert "max_position_embeddings 128" in btx("train", "recipe.yaml", *sets, cwd=project, code=2).stderr


def test_check_wants_every_file_listed(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", project / "runs/pico/export", copy], check=True)
    (copy / "extra.bin").write_bytes(b"?")
    assert "extra.bin is not listed" in btx("check", copy, cwd=project, code=3).stderr
    (copy / "extra.bin").unlink()
    (copy / "SHA256SUMS").write_text("")
    assert "are not listed" in btx("check", copy, cwd=project, code=3).stderr


def test_a_changed_input_stops_the_run_and_what_rests_on_it_is_not_called_done(project: Path) -> None:
    sets = ["--set", "run.directory=changed"]
    btx("run", "recipe.yaml", "--until", "finetune", *sets, cwd=project)
    folders = {
        step: Path(btx("path", "recipe.yaml", step, *sets, cwd=project).stdout.strip())
        for step in ("train:math", "merge")
    }
    weights = folders["train:math"] / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    subprocess.run(["rm", "-r", folders["merge"]], check=True)
    refused = btx("run", "recipe.yaml", *sets, cwd=project, code=3).stderr
    assert "model.safetensors was changed after it was written" in refused
    weights.write_bytes(good)
    btx("run", "recipe.yaml", "--until", "merge", *sets, cwd=project)
    manifest = json.loads((folders["train:math"] / "btx.json").read_text())
    other = {**manifest, "files": {**manifest["files"], "x": {"size": 0, "sha256": "0" * 64}}}
    from btx.graph.artifact import content_digest

    (folders["train:math"] / "x").touch()
    (folders["train:math"] / "btx.json").write_text(json.dumps({**other, "digest": content_digest(other["files"])}))
    shown = btx("status", "recipe.yaml", *sets, cwd=project).stdout.split("\n\n")[0]
    states = {line.split()[0]: line for line in shown.splitlines()}
    assert "made from other inputs" in states["finetune"]
    assert "done" in states["train:code"]
    (folders["train:math"] / "btx.json").write_text("{}")
    assert "damaged" in btx("status", "recipe.yaml", *sets, cwd=project).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_outside_a_training_ends_with_75_and_leaves_nothing_behind(
    project: Path, number: signal.Signals
) -> None:
    sets = ["--set", "evaluate.bootstrap=2000000"]
    runner = subprocess.Popen([*BTX, "evaluate", "recipe.yaml", *sets], cwd=project, stderr=subprocess.PIPE, text=True)
    steps = project / "runs/pico/steps"
    for _ in range(1200):
        if list(steps.glob(".evaluate-*")):
            break
        time.sleep(0.05)
    runner.send_signal(signal.SIGSTOP)  # else it might be done before status is called
    assert "under way" in btx("status", "recipe.yaml", *sets, cwd=project).stdout
    runner.send_signal(number)
    runner.send_signal(signal.SIGCONT)
    _, stderr = runner.communicate(timeout=120)
    assert runner.returncode == 75, stderr
    assert "interrupted" in stderr
    assert not list(steps.glob(".*"))


def test_the_proof_fails_when_the_weights_are_others_but_the_digests_agree(project: Path, tmp_path: Path) -> None:
    from btx.export.proof import write_sums

    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", project / "runs/pico/export", copy], check=True)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-4000:] = bytes(4000)
    (copy / "model.safetensors").write_bytes(weights)
    write_sums(copy)
    assert "other logits" in btx("check", copy, cwd=project, code=3).stderr


def test_the_card_has_front_matter_parents_and_tables(project: Path) -> None:
    card = (project / "runs/pico/export/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: seed" in card
    for digest in (step_digest(project, "train:math"), step_digest(project, "train:code")):
        assert digest in card
    assert "| finetuned |" in card


def step_folder(project: Path, step: str) -> Path:
    """The folder of a step, from `btx path`."""
    return Path(btx("path", "recipe.yaml", step, cwd=project).stdout.strip())


def step_digest(project: Path, step: str) -> str:
    """The digest of a step's content."""
    return str(json.loads((step_folder(project, step) / "btx.json").read_text())["digest"])


def test_metrics_hold_a_line_a_step_with_the_routing_of_every_layer(project: Path) -> None:
    rows = [json.loads(r) for r in (step_folder(project, "finetune") / "logs/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(len(r["load"]) == 2 and abs(sum(r["load"][0]) - 1) < 0.01 for r in rows)
    assert all(0 < e <= 1 for r in rows for e in r["entropy"])
    assert all(r["balance"] > 0 for r in rows)


def test_another_directory_gives_the_same_digests(project: Path) -> None:
    btx("run", "recipe.yaml", "--set", "run.directory=again", cwd=project)
    for step in ("train:math", "merge", "finetune", "export"):
        one = step_digest(project, step)
        folder = btx("path", "recipe.yaml", step, "--set", "run.directory=again", cwd=project).stdout.strip()
        assert json.loads((Path(folder) / "btx.json").read_text())["digest"] == one, step


LONG = ["--set", "domains.math.tokens=51200", "--set", "run.checkpoint_steps=10"]


@pytest.fixture(scope="module")
def whole(project: Path) -> str:
    """The digest of an uninterrupted training of 200 steps, enough to be interrupted on any machine."""
    argv = ["recipe.yaml", *LONG, "--set", "run.directory=whole"]
    btx("train", *argv, "--domain", "math", cwd=project)
    folder = btx("path", argv[0], "train:math", *argv[1:], cwd=project).stdout.strip()
    return str(json.loads((Path(folder) / "btx.json").read_text())["digest"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_training_goes_on_to_the_same_digest(project: Path, whole: str, number: signal.Signals) -> None:
    sets = [*LONG, "--set", f"run.directory=killed-{number.name}"]
    argv = [*BTX, "train", "recipe.yaml", "--domain", "math", *sets]
    runner = subprocess.Popen(argv, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    root = project / f"killed-{number.name}" / "pico"
    wait_for_step(root, 11)
    runner.send_signal(number)
    _, stderr = runner.communicate(timeout=120)
    assert runner.returncode == (-9 if number == signal.SIGKILL else 75), stderr
    for log in (root / "work").glob("train-*.log"):
        wait_until_free(log.with_suffix(".lock"))
    btx(*argv[3:], cwd=project)
    folder = Path(btx("path", "recipe.yaml", "train:math", *sets, cwd=project).stdout.strip())
    manifest = json.loads((folder / "btx.json").read_text())
    assert manifest["facts"]["resumed_from"] >= 10
    assert manifest["digest"] == whole


def test_a_training_that_diverges_ends_with_4_and_names_the_step(project: Path) -> None:
    sets = ["--set", "run.directory=failing", "--set", "train.max_bad_steps=2", "--set", "train.learning_rate=1e30"]
    done = btx("train", "recipe.yaml", "--domain", "math", *sets, cwd=project, code=4)
    assert re.search(r"train:math failed \(exit code 4\): .* steps in a row had a non-finite loss", done.stderr)
    assert "Log:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((project / "failing").glob("pico/steps/train-*"))
