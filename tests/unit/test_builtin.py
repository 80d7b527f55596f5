"""The builtin corpora: deterministic, of useful size, disjoint, and mathematically correct."""

import ast
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from btx.cli.main import main
from btx.data import builtin
from btx.data.corpus import Counts, read, resolve
from btx.data.split import Split
from btx.errors import RecipeError
from btx.recipe.settings import DataSettings

SMALLEST, LARGEST = 700_000, 20_000_000  # bytes of a corpus


@pytest.fixture(scope="module")
def corpora() -> dict[str, list[str]]:
    return {name: list(builtin.documents(name)) for name in builtin.NAMES}


@pytest.mark.parametrize("name", builtin.NAMES)
def test_two_calls_give_the_same_documents(name: str, corpora: dict[str, list[str]]) -> None:
    assert list(builtin.documents(name)) == corpora[name]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_sizes_are_enough_for_the_demo(name: str, corpora: dict[str, list[str]]) -> None:
    assert SMALLEST <= sum(len(text.encode()) for text in corpora[name]) <= LARGEST
    assert len(corpora[name]) >= 250
    assert all(150 <= len(text.strip()) <= builtin.LARGEST_SOURCE for text in corpora[name])


def test_no_document_is_in_the_corpora_twice(corpora: dict[str, list[str]]) -> None:
    texts = [text for documents in corpora.values() for text in documents]
    assert len(set(texts)) == len(texts)


def test_prose_repeats_no_paragraph_and_code_holds_none_of_it(corpora: dict[str, list[str]]) -> None:
    paragraphs = [part for text in corpora["prose"] for part in text.strip().split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    code = "\n".join(corpora["code"])
    shared = sum(part in code for part in paragraphs[:: len(paragraphs) // 200])
    assert shared <= 4  # texts that a module also prints, such as its usage


def test_code_without_its_docstrings_is_still_python(corpora: dict[str, list[str]]) -> None:
    for text in corpora["code"][::10]:
        ast.parse(text)


def test_cutting_docstrings_keeps_everything_else() -> None:
    text = '"""Module."""\nimport os\n\nclass A:\n    r"""One,\n    two lines."""\n\ndef f(): "kept"\n'
    cut = builtin._without_docstrings(text, ast.parse(text))
    assert cut == 'import os\n\nclass A:\n    ...\n\ndef f(): "kept"\n'


# ---- the mathematics is true ----

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
BLOCK = re.compile(r"^\w+ \d+\. (?P<question>.*)\n\w+: (?P<steps>.*)\.\n\w+: (?P<answer>.*)$", re.MULTILINE)


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def problems(texts: list[str]) -> Iterator[re.Match[str]]:
    for text in texts:
        blocks = text.strip().split("\n\n")
        found = [BLOCK.fullmatch(block) for block in blocks]
        assert all(found), text
        yield from (block for block in found if block)


def test_every_equation_is_true(corpora: dict[str, list[str]]) -> None:
    count = 0
    for a, operator, b, claimed in EQUATION.findall("\n".join(corpora["math"][::7])):
        left, right, value = int(a), int(b), int(claimed)
        true = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}
        assert true[operator] == value, (a, operator, b, claimed)
        count += 1
    assert count > 5_000


def test_answers_follow_from_the_steps_and_the_steps_from_the_question(corpora: dict[str, list[str]]) -> None:
    for problem in problems(corpora["math"][::7]):
        steps = set(numbers(problem["steps"]))
        assert set(numbers(problem["question"])) <= steps, problem[0]
        assert numbers(problem["answer"])[-1] in steps, problem[0]


ORACLES: dict[str, Callable[..., list[int]]] = {
    r"(?:Compute|What is) (\d+) \+ (\d+)[.?]": lambda a, b: [a + b],
    r"From (\d+) take away (\d+)\.": lambda a, b: [a - b],
    r"Multiply (\d+) by (\d+)\.": lambda a, b: [a * b],
    r"Divide (\d+) by (\d+) with remainder\.": lambda a, b: list(divmod(a, b)),
    r"(?:Solve|Find x when) (\d+)x \+ (\d+) = (\d+)\.": lambda a, b, c: [(c - b) // a],
    r".* (\d+) percent of (\d+)[.?]": lambda percent, whole: [percent * whole // 100],
    r".* buys (\d+) .* (\d+) coins each .* with (\d+) coins\. .*": lambda n, price, paid: [paid - n * price],
    r".* (\d+) hours at (\d+) km per hour, then (\d+) km more\. .*": lambda h, v, more: [h * v + more],
    r".* has (\d+) .* finds (\d+) more .* gives (\d+) to .*": lambda a, more, given: [a + more - given],
    r".* (\d+) bags with (\d+) .* in each\. (\d+) friends .*": lambda bags, held, n: [bags * held // n],
    r".* (\d+) m long and (\d+) m wide\. What is its area\?": lambda long, wide: [long * wide],
    r".* (\d+) m long and (\d+) m wide\. How long .*": lambda long, wide: [2 * (long + wide)],
    r".* is (\d+) years old and .* (\d+) years older\. .* (\d+) years\?": lambda a, gap, n: [a + gap + n],
}  # the answer worked out from the words alone


def test_answers_agree_with_the_question_read_afresh(corpora: dict[str, list[str]]) -> None:
    checked = dict.fromkeys(ORACLES, 0)
    for problem in problems(corpora["math"][::7]):
        for pattern, oracle in ORACLES.items():
            if match := re.fullmatch(pattern, problem["question"]):
                assert numbers(problem["answer"]) == oracle(*map(int, match.groups())), problem[0]
                checked[pattern] += 1
    assert min(checked.values()) > 20, checked


# ---- errors are reported ----


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"'maths'.*'math'"):
        builtin.documents("maths")
    with pytest.raises(RecipeError, match=r"'law'.*math, code, prose"):
        builtin.documents("law")


@pytest.mark.parametrize("name", ["code", "prose"])
def test_an_install_without_sources_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_stdlib", lambda: tmp_path)
    with pytest.raises(RecipeError, match=re.escape(f"under {tmp_path}")):
        list(builtin.documents(name))


def test_damaged_and_foreign_files_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = "value = 1  # long enough to be a document\n" * 10
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (tmp_path / "broken.py").write_text("def f(:\n" * 100)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(good + "x = 2\n")
    monkeypatch.setattr(builtin, "_stdlib", lambda: tmp_path)
    assert list(builtin.documents("code")) == [good]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_nothing_opens_a_connection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert next(builtin.documents(name))


# ---- as files ----


def test_the_corpora_are_written_whole_as_records_that_a_recipe_may_name(
    tmp_path: Path, corpora: dict[str, list[str]]
) -> None:
    done = CliRunner().invoke(main, ["text", str(tmp_path / "new" / "texts")])
    assert done.exit_code == 0, done.output
    assert re.search(r"prose: [\d,]+ documents, [\d,]+ bytes", done.output)
    for name in builtin.NAMES:
        files = resolve([name], tmp_path / "new" / "texts", "x")
        texts = [d.text for d in read(files, skip_bad=False, counts=Counts())]
        assert "\n".join(texts) == "\n".join(corpora[name])
        split = Split(files, [], DataSettings())
        assert len([*split.train()]) > len(texts) / 2
        assert len({held.source for held in split.test}) >= 30 <= len({held.source for held in split.select})
        assert f"{name}: {len(texts):,} documents, {sum(len(t.encode()) for t in texts):,} bytes" in done.output


def test_corpora_that_are_there_or_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prose").mkdir()
    done = CliRunner().invoke(main, ["text", str(tmp_path)])
    assert done.exit_code == 2
    assert "prose already exists" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prose"]

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtin, "sync", full)
    done = CliRunner().invoke(main, ["text", str(tmp_path / "full")])
    assert done.exit_code == 5
    assert "No space left" in done.output
    assert not [*(tmp_path / "full").iterdir()]
