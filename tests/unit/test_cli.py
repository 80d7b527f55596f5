"""The command's small verbs and what it prints; whole runs are in tests/integration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from btx.cli.main import main
from btx.cli.plan import rows
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe, schema
from tests.support.models import config_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in ROOT.glob("pipelines/*.yaml"))


def btx(*argv: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(a) for a in argv])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['btx', '--help']\n"
        "from btx.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'yaml', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_shipped_schema_is_that_of_the_recipe() -> None:
    shipped = json.loads((ROOT / "pipelines/recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == schema(), "run: btx schema > pipelines/recipe.schema.json"


@pytest.mark.parametrize("name", [n for n in RECIPES if "smollm2" not in n])  # whose seed is fetched
def test_shipped_recipes_are_valid_and_can_be_planned_each_training_once(name: str) -> None:
    done = btx("plan", ROOT / f"pipelines/{name}.yaml")
    assert done.exit_code == 0, done.output
    assert "finetune" in done.output
    labels = [row.label for row in rows(load_recipe(ROOT / f"pipelines/{name}.yaml", []), ROOT / "pipelines")]
    assert len({*labels}) == len(labels) > 2


def test_the_papers_plan_meets_the_papers_figures() -> None:
    found = {r.label: r for r in rows(load_recipe(ROOT / "pipelines/paper.yaml", []), ROOT)}
    assert found["train:math"].parameters == 6_738_415_616
    assert round(found["finetune"].active / 1e9, 1) == 11.1
    assert found["train:code"].tokens == pytest.approx(210e9, rel=1e-4)
    share = found["finetune"].flops / sum(r.flops for r in found.values())
    assert share == pytest.approx(0.23, abs=0.02)  # of the compute is in the MoE stage, says the paper


def test_the_plan_has_the_width_of_the_widest_expert(tmp_path: Path) -> None:
    for name, width in (("seed", 48), ("wide", 64), ("narrow", 40)):
        (tmp_path / name).mkdir()
        config_of("llama", intermediate_size=width).save_pretrained(tmp_path / name)
    text = "{name: x, seed: {checkpoint: seed}, domains: {a: {checkpoint: narrow, data: [a]}, b: {checkpoint: EXPERT}}}"
    found = {}
    for expert in ("wide", "narrow", "elsewhere"):
        (tmp_path / "r.yaml").write_text(text.replace("EXPERT", expert), encoding="utf-8")
        found[expert] = {r.label: r for r in rows(load_recipe(tmp_path / "r.yaml", []), tmp_path)}
    layers, experts, matrices, hidden = 2, 3, 3, 32
    more = layers * experts * matrices * hidden * (64 - 48)
    for label in ("merge", "finetune"):
        assert found["wide"][label].parameters - found["narrow"][label].parameters == more
        assert found["elsewhere"][label] == found["narrow"][label]  # as wide as the seed


@pytest.mark.parametrize("name", ["../x", "", "a b", "-x"])
def test_a_name_that_is_no_folders_is_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    text = "{name: NAME, seed: {checkpoint: builtin}, domains: {a: {data: [a.txt], tokens: 1k}}}"
    (tmp_path / "r.yaml").write_text(text.replace("NAME", repr(name)), encoding="utf-8")
    done = btx("plan", tmp_path / "r.yaml")
    assert done.exit_code == 2
    assert f"r.yaml: name: {name!r} cannot name a folder; use letters a-z, digits, '-', '_' and '.'," in done.output
    assert "a letter or digit first" in done.output
    assert done.output.count("\n") == 1


def test_what_is_no_export_is_told_with_the_remedy(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "has no SHA256SUMS")):
        done = btx("check", path)
        assert done.exit_code == 3
        assert said in done.output
        assert str(path) in done.output
        assert "name an export of btx, such as runs/NAME/export" in done.output


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert btx("init", "mine").exit_code == 0
    recipe = load_recipe(Path("mine.yaml"), [])
    assert recipe.name == "mine"
    assert set(recipe.domains) == {"math", "code"}
    again = btx("init", "mine")
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert btx("init", "a/b").exit_code == 2


def test_paths_of_all_steps_are_printed_before_anything_runs(tmp_path: Path) -> None:
    demo, place = ROOT / "pipelines/demo.yaml", ("--set", f"run.directory={tmp_path}")
    for step in ("seed", "branch", "train:math", "average", "merge", "finetune", "evaluate", "export", "report"):
        done = btx("path", demo, step, *place)
        assert done.exit_code == 0, done.output
        assert done.output.startswith(str(tmp_path / "demo" / "steps"))
    assert len(btx("path", demo, "train", *place).output.splitlines()) == 3
    assert not any(tmp_path.iterdir())


def test_an_unknown_step_is_refused_with_the_nearest(tmp_path: Path) -> None:
    done = btx("path", ROOT / "pipelines/demo.yaml", "finetun", "--set", f"run.directory={tmp_path}")
    assert done.exit_code == 2
    assert "did you mean 'finetune'" in done.output


def test_status_names_every_step_and_its_state(tmp_path: Path) -> None:
    done = btx("status", ROOT / "pipelines/demo.yaml", "--set", f"run.directory={tmp_path}")
    assert done.exit_code == 0
    assert done.output.count("to do") == len(Graph(load_recipe(ROOT / "pipelines/demo.yaml", []), ROOT).steps)


def test_doctor_names_versions_and_kernels() -> None:
    done = btx("doctor")
    assert done.exit_code == 0
    for word in ("torch", "grouped_mm", "reference", "cores"):
        assert word in done.output


def test_domain_belongs_to_train() -> None:
    done = btx("merge", ROOT / "pipelines/demo.yaml", "--domain", "math")
    assert done.exit_code == 2
    assert "belongs to train" in done.output


@pytest.mark.parametrize("options", [("--tflops", "0"), ("--tflops", "-3"), ("--devices", "0")])
def test_numbers_that_make_no_sense_are_refused(options: tuple[str, str]) -> None:
    done = btx("plan", ROOT / "pipelines/demo.yaml", *options)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)


def test_the_plan_and_the_help_fit_80_columns() -> None:
    lines = btx("plan", ROOT / "pipelines/paper.yaml").output.splitlines()
    table = lines[: next(n for n, line in enumerate(lines) if line.startswith("total")) + 1]
    assert "…" not in "".join(table)
    assert max(map(len, [*table, *btx("--help").output.splitlines()])) <= 80


def test_the_graph_of_a_recipe_and_a_finished_run_need_no_transformers() -> None:
    """Importing it takes a second, too long for a run that has nothing to do."""
    modules = "btx.conversions.pipeline, btx.conversions.registry, btx.graph.scheduler, btx.report.console"
    code = f"import sys, {modules}; btx.conversions.registry.recipe_model(); sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
