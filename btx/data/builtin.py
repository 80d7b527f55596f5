"""Three small corpora that every machine with Python already has.

The demo recipe and the integration tests must run with no network and no download, yet branching only means
something on texts that really differ. So: the standard library's source code, its reference prose, and
arithmetic written by a seeded generator of our own. `documents` is the one entry point.

The three do not share text: docstrings go to "prose" and are cut out of "code", and the prose repeats no
paragraph, because the same text in two domains, or in train and held-out, would flatter every score.
Code and prose differ between Python versions; one installation gives the same documents at every call.
"""

import ast
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from btx.data.arithmetic import worksheets
from btx.errors import RecipeError, nearest
from btx.graph.artifact import sync, unwritable

NAMES = ("math", "code", "prose")

# Folders of the standard library that are missing from some installs, or hold tables and tests, not programs.
SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "site-packages", "test", "tests"),
    *("encodings", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "turtledemo"),
}
SMALLEST_DOCUMENT, LARGEST_SOURCE = 200, 100_000  # characters
PROSE_DOCUMENT = 2_000  # characters after which a long topic or module starts its next document
VERSION = 1  # of what the three generators make; raise it when their documents change

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents(name: str) -> Iterator[str]:
    """Yield the documents of one embedded corpus, the same ones in the same order at every call.

    Raises RecipeError for an unknown name, and for an installation without the standard library's sources.
    """
    return (text for _, text in sources(name))


def sources(name: str) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of the same documents: a topic or module of the prose comes as several documents, which
    are not independent of each other and have its name as their source; any other is its own, and has none.
    """
    if name not in NAMES:
        raise RecipeError(f"no embedded corpus is called {name!r}; {nearest(name, NAMES)}")
    return _prose() if name == "prose" else (("", text) for text in {"math": worksheets, "code": _code}[name]())


def write(folder: Path) -> dict[str, tuple[int, int]]:
    """Write each corpus as FOLDER/NAME/text.jsonl, one record per source document; returns documents and bytes of text.

    Each corpus is written atomically. RecipeError for one that already exists, ResourceError where it cannot be
    written.
    """
    for name in NAMES:
        _require_new(folder / name)
    found = {}
    for name in NAMES:
        texts: dict[object, list[str]] = {}
        for number, (source, text) in enumerate(sources(name)):
            texts.setdefault(source or number, []).append(text)
        joined = ["\n".join(parts) for parts in texts.values()]
        write_whole(folder / name, {"text.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in joined)})
        found[name] = len(joined), sum(len(text.encode()) for text in joined)
    return found


def write_whole(final: Path, files: Mapping[str, str]) -> None:
    """Write a folder of files, by name, all at once.

    RecipeError if it exists, ResourceError where it cannot be written.
    """
    _require_new(final)
    attempt = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        attempt.mkdir(parents=True)
        for name, lines in files.items():
            (attempt / name).write_text(lines, encoding="utf-8")
            sync(attempt / name)
        sync(attempt)
        attempt.rename(final)
        sync(final.parent)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def _require_new(folder: Path) -> None:
    if folder.exists():
        raise RecipeError(f"{folder} already exists; btx does not overwrite it. Name another folder.")


# ---- the standard library: code and prose ----


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield text and syntax tree of every usable source under `root`, in sorted order."""
    found = False
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                source = _parsed(Path(folder, file))
                if source is not None:
                    found = True
                    yield source
    if not found:
        raise RecipeError(
            f"no Python sources of the standard library under {root}: this Python was installed zipped or "
            "stripped, so the embedded corpora 'code' and 'prose' cannot be made; use a Python that ships "
            "its .py files (python.org, uv, conda, Debian's libpython3-stdlib) or name text files of your own"
        )


def _parsed(path: Path) -> tuple[str, ast.Module] | None:
    """Read one source, or None if it is unreadable, not UTF-8, not today's syntax, or of no useful size."""
    try:
        text = path.read_text(encoding="utf-8")
        fits = SMALLEST_DOCUMENT <= len(text) <= LARGEST_SOURCE
        return (text, ast.parse(text)) if fits else None
    except (OSError, UnicodeDecodeError, SyntaxError):
        return None


def _documented(tree: ast.Module) -> Iterator[tuple[Documented, ast.Expr, str]]:
    """Yield each node that has a docstring, the docstring's statement, and its text without the indent."""
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                yield node, statement, docstring


def _code() -> Iterator[str]:
    for text, tree in _sources(_stdlib()):
        document = _without_docstrings(text, tree)
        if len(document) >= SMALLEST_DOCUMENT:
            yield document


def _without_docstrings(text: str, tree: ast.Module) -> str:
    """Cut the docstrings out of a source; what remains is still valid Python."""
    lines: list[str | None] = list(text.split("\n"))  # not splitlines, which also ends a line at a form feed
    for node, statement, _ in _documented(tree):
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        head = (lines[first] or "").encode()[: statement.col_offset].decode()
        tail = (lines[last - 1] or "").encode()[statement.end_col_offset :].strip()
        if head.strip() or tail:
            continue  # it shares its line with other code
        lines[first:last] = [None] * (last - first)
        if len(node.body) == 1:
            lines[first] = head + "..."
    return "\n".join(line for line in lines if line is not None).strip() + "\n"


def _prose() -> Iterator[tuple[str, str]]:
    """Yield documents made of the paragraphs of one language topic or of one module's docstrings, with its name."""
    seen: set[str] = set()
    for name, texts in _prose_sources():
        fresh = []
        for paragraph in (part for text in texts for part in text.split("\n\n")):
            key = " ".join(paragraph.split())
            if key not in seen and _is_prose(key):
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        yield from ((name, document) for document in _packed(fresh))


def _prose_sources() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"no pydoc_data.topics under {_stdlib()}: this Python was installed stripped, so the embedded "
            "corpus 'prose' cannot be made; use a full Python (python.org, uv, conda) or name text files "
            "of your own"
        ) from error
    # Shortest first: the long topics repeat the short ones, and should keep only what is theirs.
    yield from (
        (f"topic {name}", [text]) for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0]))
    )
    for number, (_, tree) in enumerate(_sources(_stdlib())):
        yield f"module {number}", [docstring for _, _, docstring in _documented(tree)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph) >= 40 and ">>>" not in paragraph and letters >= 0.8 * len(paragraph)


def _packed(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs into documents of about PROSE_DOCUMENT characters; a short rest is dropped."""
    document = ""
    for paragraph in paragraphs:
        document += paragraph + "\n\n"
        if len(document) >= PROSE_DOCUMENT:
            yield document.strip() + "\n"
            document = ""
    if len(document) >= SMALLEST_DOCUMENT:
        yield document.strip() + "\n"
