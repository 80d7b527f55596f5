"""The numbers of `btx lm-eval` and of a recipe's tasks are those of lm-eval's own `hf` model on the same folder.

Needs lm-eval, in an environment of its own: `make portability` runs it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from btx.cli.main import main
from btx.conversions.registry import open_model
from btx.data.encoder import Encoder, load_tokenizer
from btx.models.composed import Composed
from btx.recipe.settings import RunSettings
from btx.recipe.task_settings import TaskSettings
from btx.tasks.answers import number
from btx.tasks.items import read_items
from btx.tasks.solve import complete, end_ids, numbers_of, prompts_of, rows_of
from tests.portability.exports import export
from tests.support.models import config_of, save_model
from tests.support.world import World, write_jsonl

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.filters.extraction import RegexFilter  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from btx.tasks.harness import OpenedLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared/data/tasks"
WHERE = RunSettings(device="cpu")
TOLERANCE = 1e-4  # nats, of a sum of log-probabilities
PAIRS = [
    ("The capital of France is", " Paris"), ("def add(a, b):\n    return ", "a + b  # and no more"),
    ("", "The quick fox"), ("two and three is five so two and two is", " four"), ("a" * 300, "bc" * 40),
]  # fmt: skip
TEXTS = ["The quick brown fox", "jumps over the lazy dog " * 20, "x"]
UNTIL = [["e"], ["the", " "], ["\n\n", "zzzz"], []]
LEARNED, NEW = range(10, 18), range(60, 66)


def item(n: int) -> dict[str, str]:
    """A question whose answer a small model can learn by heart."""
    return {"question": f"What is {n} and 7?", "answer": f"It is #### {n + 7}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model that has learned some of the items by heart."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    path = save_model(tmp_path_factory.mktemp("model") / "m", config_of("llama"))
    tokenizer, model = load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path)
    texts = [f"Question: {item(n)['question']}\nAnswer: {item(n)['answer']}" for n in LEARNED]
    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    assert len({*map(len, rows)}) == 1
    ids, optimizer = torch.tensor(rows), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@contextmanager
def both(folder: Path, *, composed: bool = False, batch: int = 1) -> Iterator[tuple[OpenedLM, HFLM]]:
    """The adapter and lm-eval's own model on one folder; composed: of two copies of it, which changes nothing."""
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)
    with open_model(folder, where=WHERE) as opened:
        model = (
            Composed({"a": opened, "b": opened}, lambda log_p, _ids: sum(log_p.values()) / 2) if composed else opened
        )
        yield OpenedLM(model, load_tokenizer(folder), folder), theirs


def asked(kind: str, rows: list[Any]) -> list[Instance]:
    """Requests as lm-eval's tasks make them."""
    return [Instance(kind, {}, row, n) for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of three different experts."""
    return export(tmp_path_factory.mktemp("moe") / "m", "llama")


@pytest.mark.parametrize("kind", ["folder", "composed", "moe"])
def test_log_likelihoods(request: pytest.FixtureRequest, kind: str) -> None:
    path = request.getfixturevalue("moe" if kind == "moe" else "folder")
    with both(path, composed=kind == "composed", batch=3) as (ours, theirs):
        found, wanted = (one.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True) for one in (ours, theirs))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=TOLERANCE)
        texts = [(text,) for text in TEXTS]
        rolled = [
            one.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
            for one in (ours, theirs)
        ]
        assert rolled[0] == pytest.approx(rolled[1], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["folder", "composed", "moe"])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_completions(request: pytest.FixtureRequest, kind: str, batch: int) -> None:
    """Equal whatever lm-eval pads; with prompts that are cut, stops of several tokens, and the end token."""
    prompts = [text for text, _ in PAIRS if text] + [f"Question: {item(n)['question']}\nAnswer:" for n in LEARNED[:2]]
    rows = [(text, {"until": until, "do_sample": False, "max_gen_toks": 24}) for text in prompts for until in UNTIL]
    path = request.getfixturevalue("moe" if kind == "moe" else "folder")
    with both(path, composed=kind == "composed", batch=batch) as (ours, theirs):
        found = ours.generate_until(asked("generate_until", rows), disable_tqdm=True)
        assert found == theirs.generate_until(asked("generate_until", rows), disable_tqdm=True)
    assert len({*found}) > 8


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with items, and a task of lm-eval that reads them as its GSM8K does."""
    where = tmp_path_factory.mktemp("tasks")
    write_jsonl(where / "items.jsonl", [item(n) for n in (*LEARNED, *NEW)])
    strict = {"name": "strict-match", "filter": [
        {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, {"function": "take_first"}]}  # fmt: skip
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(where / "items.jsonl")}},
        "output_type": "generate_until", "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}", "filter_list": [strict],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                         "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}],
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 24},
    }  # fmt: skip
    (where / "sums.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return where


def test_exact_match_is_lm_evals(folder: Path, tasks: Path, tmp_path: Path) -> None:
    """The verb, lm-eval's own model and a recipe's task: completion by completion, and the share."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    output = tmp_path / "out.json"
    asking = ["lm-eval", str(folder), "--tasks", "sums", "--include", str(tasks), "--device", "cpu"]
    said = CliRunner().invoke(main, [*asking, "--output", str(output)])
    assert said.exit_code == 0, said.output
    assert "exact_match" in said.output
    found = json.loads(output.read_text(encoding="utf-8"))
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", dtype="float32"), tasks=["sums"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert theirs is not None
    share = theirs["results"]["sums"]["exact_match,strict-match"]
    assert found["results"]["sums"]["exact_match,strict-match"] == share
    assert 0 < share < 1
    assert f"| sums | exact_match | strict-match | {share:.4f} | 0." in said.output

    settings = TaskSettings.model_validate({"file": "x", "kind": "exact_match", "max_new_tokens": 24})
    items, tokenizer = read_items(settings, str(tasks / "items.jsonl"), None), load_tokenizer(folder)
    with open_model(folder, where=WHERE) as model:
        made = complete(model, tokenizer, prompts_of(Encoder(tokenizer, "all"), items, settings), most=24,
                        stops=settings.stops, end=end_ids(folder, tokenizer), batch_tokens=4096)  # fmt: skip
    samples = sorted(theirs["samples"]["sums"], key=lambda sample: sample["doc_id"])
    assert [one.text for one in made] == [sample["resps"][0][0] for sample in samples]
    rows = rows_of(items, made, settings)
    assert [row["right"] for row in rows] == [bool(sample["exact_match"]) for sample in samples]
    assert numbers_of(rows)["accuracy"] == share


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared task files are not beside the project")
def test_the_shipped_tasks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    long = save_model(tmp_path / "m", config_of("llama", max_position_embeddings=2048))
    said = CliRunner().invoke(main, ["lm-eval", str(long), "--tasks", "gsm8k_local,mbpp_local", "--device", "cpu",
                                     "--include", str(ROOT / "pipelines/lm-eval"), "--limit", "1"])  # fmt: skip
    assert said.exit_code == 0, f"{said.output}\n{said.exception!r}"
    assert "pass_at_1" in said.output
    assert "flexible-extract" in said.output


def test_numbers_after_the_mark_are_those_that_lm_eval_takes() -> None:
    texts = ["so #### 12", "#### -3 and #### 4", "#### 1,234.50", "#### 7 apples", "no #### none 5", "#### 0.5"]
    filtered = RegexFilter(regex_pattern="#### (\\-?[0-9\\.\\,]+)").apply([[text] for text in texts], [{}] * len(texts))
    for text, (taken,) in zip(texts, filtered, strict=True):
        if taken == "[invalid]":
            continue  # then it gives up, and we take the last number
        assert float(str(number(text))) == float(taken.replace(",", ""))


def test_a_composed_model_is_scored_from_its_folder(tmp_path: Path, tasks: Path) -> None:
    world = World(tmp_path)
    world.set("btm", {})
    done = CliRunner().invoke(main, ["run", str(world.write()), "--until", "btm"])
    assert done.exit_code == 0, done.output
    arguments = [
        "lm-eval",
        str(world.runs / "r" / "btm"),
        "--tasks",
        "sums",
        "--include",
        str(tasks),
        "--device",
        "cpu",
    ]
    said = CliRunner().invoke(main, [*arguments, "--limit", "2"])
    assert said.exit_code == 0, said.output
    assert "exact_match" in said.output


@pytest.mark.parametrize("change", [
    {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
    {"dataset_path": "openai/gsm8k", "dataset_kwargs": {}}, {"doc_to_text": "{{"},
    {"metric_list": [{"metric": "no_such_metric"}]},
])  # fmt: skip
def test_a_task_that_cannot_be_loaded_is_refused(
    folder: Path, tasks: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    task = yaml.safe_load((tasks / "sums.yaml").read_text(encoding="utf-8")) | change | {"task": "broken"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    asking = ["lm-eval", str(folder), "--device", "cpu", "--include", str(tmp_path), "--tasks", "broken"]
    said = CliRunner().invoke(main, asking)
    assert said.exit_code == 2, f"{said.output}\n{said.exception!r}"
    assert "the task broken cannot be loaded" in said.output


@pytest.mark.parametrize(("options", "code", "words"), [
    (["--tasks", "summs"], 2, "did you mean 'sums'?"),
    (["--tasks", "sums", "--include", "nowhere"], 2, "nowhere"),
])  # fmt: skip
def test_what_is_refused(folder: Path, tasks: Path, options: list[str], code: int, words: str) -> None:
    said = CliRunner().invoke(main, ["lm-eval", str(folder), "--device", "cpu", "--include", str(tasks), *options])
    assert said.exit_code == code, said.output
    assert words in said.output
