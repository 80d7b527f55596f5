"""Finished experts can be merged without any data; later stages are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from btx.cli.main import graph_of, main
from btx.errors import ResourceError
from tests.support.project import write_project
from tests.support.world import World, refused


def test_experts_from_elsewhere_are_merged_without_data_and_no_more(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.set("domains", {"law": {"checkpoint": "law"}})
    refused(world.write(), world.runs, 2, ["no domain has `data`", "--until merge"])
    refused(world.write(), world.runs, 2, ["router: activations", "data"], "--set", "merge.router=activations")
    plan = CliRunner().invoke(main, ["plan", str(world.write())])
    assert plan.exit_code == 0
    assert "Nothing is trained" in plan.output
    done = CliRunner().invoke(main, ["run", str(world.write()), "--until", "merge"])
    assert done.exit_code == 0, done.output
    merged = graph_of(world.write(), ()).steps["merge"]
    about = json.loads((merged.folder / "experts.json").read_text())
    assert about["experts"] == ["law", "seed"]
    lineage = json.loads((graph_of(world.write(), ()).steps["branch:given"].folder / "lineage.json").read_text())
    assert about["distance"]["law"] == {key: lineage["law"][key] for key in ("cosine", "change")}


def test_a_router_from_data_is_refused_where_the_merged_model_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = graph_of(write_project(tmp_path), ()).steps["merge"]
    merge.check(0)
    monkeypatch.setattr("btx.steps.merge.memory_here", lambda: 10**4)
    with pytest.raises(ResourceError, match=r"loads the merged model once, .* GiB in fp32.*Set merge.router: random"):
        merge.check(0)
