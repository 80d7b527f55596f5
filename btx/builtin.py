"""Three small corpora that every machine with Python already has.

The demo recipe and the integration tests must run with no network and no download, yet branching only means
something on texts that really differ. So: the standard library's source code, its reference prose, and
arithmetic written by a seeded generator of our own. `documents` is the one entry point.

The three do not share text: docstrings go to "prose" and are cut out of "code", and the prose repeats no
paragraph, because the same text in two domains, or in train and held-out, would flatter every score.
Code and prose differ between Python versions; one installation gives the same documents at every call.
"""

import ast
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from btx.errors import RecipeError, nearest

NAMES = ("math", "code", "prose")

# Folders of the standard library that are missing from some installs, or hold tables and tests, not programs.
SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "site-packages", "test", "tests"),
    *("encodings", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "turtledemo"),
}
SMALLEST_DOCUMENT, LARGEST_SOURCE = 200, 100_000  # characters
PROSE_DOCUMENT = 2_000  # characters after which a long topic or module starts its next document
VERSION = 1  # of what the three generators make; raise it when their documents change
MATH_DOCUMENTS, MATH_SEED = 2_400, 20240312

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents(name: str) -> Iterator[str]:
    """Yield the documents of one embedded corpus, the same ones in the same order at every call.

    Raises RecipeError for an unknown name, and for an installation without the standard library's sources.
    """
    if name not in NAMES:
        raise RecipeError(f"no embedded corpus is called {name!r}; {nearest(name, NAMES)}")
    return {"math": _math, "code": _code, "prose": _prose}[name]()


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


def _prose() -> Iterator[str]:
    """Yield documents made of the paragraphs of one language topic or of one module's docstrings."""
    seen: set[str] = set()
    for texts in _prose_sources():
        fresh = []
        for paragraph in (part for text in texts for part in text.split("\n\n")):
            key = " ".join(paragraph.split())
            if key not in seen and _is_prose(key):
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        yield from _packed(fresh)


def _prose_sources() -> Iterator[list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"no pydoc_data.topics under {_stdlib()}: this Python was installed stripped, so the embedded "
            "corpus 'prose' cannot be made; use a full Python (python.org, uv, conda) or name text files "
            "of your own"
        ) from error
    # Shortest first: the long topics repeat the short ones, and should keep only what is theirs.
    yield from ([text] for _, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])))
    for _, tree in _sources(_stdlib()):
        yield [docstring for _, _, docstring in _documented(tree)]


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


# ---- mathematics: problems of our own, each (question, steps, answer) ----

Problem = tuple[str, list[str], str]
Kind = Callable[[random.Random], Problem]

PEOPLE = ("Ada", "Boris", "Chen", "Dalia", "Emil", "Fatima", "Goran", "Hana", "Igor", "Jana", "Kofi", "Lena")
THINGS = ("apples", "books", "candles", "eggs", "flowers", "lemons", "marbles", "nails", "pencils", "stamps")
PLACES = ("at the market", "at school", "in the garden", "in the workshop", "by the river", "at the station")
MOVERS = ("A train", "A cyclist", "A bus", "A ship", "A lorry", "A runner")
LABELS = (
    ("Problem", "Solution", "Answer"),
    ("Exercise", "Working", "Result"),
    ("Question", "Steps", "Answer"),
)


def _math() -> Iterator[str]:
    rng = random.Random(MATH_SEED)
    for _ in range(MATH_DOCUMENTS):
        yield _worksheet(rng)


def _worksheet(rng: random.Random) -> str:
    """Write one document: eight to fourteen problems under one set of labels."""
    asked, worked, found = rng.choice(LABELS)
    blocks = []
    for number in range(1, rng.randint(8, 14) + 1):
        question, steps, answer = rng.choice(KINDS)(rng)
        blocks.append(f"{asked} {number}. {question}\n{worked}: {'; '.join(steps)}.\n{found}: {answer}\n")
    return "\n".join(blocks)


def _equation(a: int, operator: str, b: int) -> str:
    """Write "a op b = value"; every such equation in the corpus is made here, and true."""
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[operator]
    return f"{a} {operator} {b} = {value}"


def _sum(rng: random.Random) -> Problem:
    a, b, c = rng.randint(100, 9999), rng.randint(1, 9) * 100, rng.randint(1, 99)
    question = rng.choice(("Compute {} + {}.", "What is {} + {}?", "Add {} and {}."))
    steps = [_equation(b, "+", c), _equation(a, "+", b), _equation(a + b, "+", c)]
    return question.format(a, b + c), steps, f"{a + b + c}"


def _difference(rng: random.Random) -> Problem:
    b, c, rest = rng.randint(1, 9) * 100, rng.randint(1, 99), rng.randint(10, 5000)
    a = rest + b + c
    question = rng.choice(("Compute {} - {}.", "What is {} - {}?", "From {} take away {}."))
    steps = [_equation(b, "+", c), _equation(a, "-", b), _equation(a - b, "-", c)]
    return question.format(a, b + c), steps, f"{rest}"


def _product(rng: random.Random) -> Problem:
    a, b, c = rng.randint(3, 99), rng.randint(1, 9) * 10, rng.randint(1, 9)
    question = rng.choice(("Compute {} * {}.", "What is {} * {}?", "Multiply {} by {}."))
    steps = [_equation(b, "+", c), _equation(a, "*", b), _equation(a, "*", c), _equation(a * b, "+", a * c)]
    return question.format(a, b + c), steps, f"{a * (b + c)}"


def _division(rng: random.Random) -> Problem:
    b, quotient = rng.randint(3, 25), rng.randint(3, 40)
    rest = rng.randrange(b)
    a = b * quotient + rest
    steps = [_equation(b, "*", quotient), _equation(a, "-", b * quotient), f"{rest} is less than {b}"]
    return f"Divide {a} by {b} with remainder.", steps, f"{quotient} remainder {rest}"


def _unknown(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 12), rng.randint(2, 30), rng.randint(1, 60)
    c = a * x + b
    question = rng.choice(("Solve {}x + {} = {}.", "Find x when {}x + {} = {}."))
    steps = [_equation(c, "-", b), f"so {a}x = {c - b}", _equation(c - b, "/", a)]
    return question.format(a, b, c), steps, f"x = {x}"


def _percentage(rng: random.Random) -> Problem:
    percent, whole = rng.randint(1, 19) * 5, rng.randint(2, 60) * 20
    question = rng.choice(("What is {} percent of {}?", "Find {} percent of {}."))
    steps = [_equation(whole, "*", percent), _equation(whole * percent, "/", 100)]
    return question.format(percent, whole), steps, f"{whole * percent // 100}"


def _purchase(rng: random.Random) -> Problem:
    who, things, count, price = rng.choice(PEOPLE), rng.choice(THINGS), rng.randint(2, 12), rng.randint(2, 15)
    cost, change = count * price, rng.randint(1, 40)
    bought = f"{who} buys {count} {things} for {price} coins each"
    question = f"{bought} and pays with {cost + change} coins. How much change is due?"
    steps = [f"the cost is {_equation(count, '*', price)}", _equation(cost + change, "-", cost)]
    return question, steps, f"{change} coins"


def _journey(rng: random.Random) -> Problem:
    who, speed, hours, more = rng.choice(MOVERS), rng.randint(8, 90), rng.randint(2, 9), rng.randint(5, 80)
    question = f"{who} travels {hours} hours at {speed} km per hour, then {more} km more. How far is that?"
    steps = [f"the first part is {_equation(speed, '*', hours)}", _equation(speed * hours, "+", more)]
    return question, steps, f"{speed * hours + more} km"


def _story(rng: random.Random) -> Problem:
    (who, friend), things, where = rng.sample(PEOPLE, 2), rng.choice(THINGS), rng.choice(PLACES)
    start, more, left = rng.randint(10, 80), rng.randint(3, 60), rng.randint(1, 10)
    given = start + more - left
    told = f"{who} has {start} {things} and finds {more} more {where}. Then {who} gives {given} to {friend}."
    steps = [_equation(start, "+", more), _equation(start + more, "-", given)]
    return f"{told} How many {things} does {who} have now?", steps, f"{left} {things}"


def _sharing(rng: random.Random) -> Problem:
    things, friends, each, bags = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 6)
    held = friends * each
    told = f"There are {bags} bags with {held} {things} in each. {friends} friends share them all."
    steps = [_equation(bags, "*", held), _equation(bags * held, "/", friends)]
    return f"{told} How many does each get?", steps, f"{bags * each} {things}"


def _field(rng: random.Random) -> Problem:
    long, wide = rng.randint(5, 60), rng.randint(3, 40)
    told = f"A field is {long} m long and {wide} m wide."
    if rng.random() < 0.5:
        return f"{told} What is its area?", [_equation(long, "*", wide)], f"{long * wide} square metres"
    steps = [_equation(long, "+", wide), _equation(2, "*", long + wide)]
    return f"{told} How long is the fence around it?", steps, f"{2 * (long + wide)} m"


def _ages(rng: random.Random) -> Problem:
    who, friend = rng.sample(PEOPLE, 2)
    age, gap, years = rng.randint(4, 30), rng.randint(2, 25), rng.randint(2, 20)
    told = f"{who} is {age} years old and {friend} is {gap} years older."
    steps = [f"{friend} is now {_equation(age, '+', gap)}", _equation(age + gap, "+", years)]
    return f"{told} How old will {friend} be in {years} years?", steps, f"{age + gap + years}"


KINDS: tuple[Kind, ...] = (
    *(_sum, _difference, _product, _division, _unknown, _percentage),
    *(_purchase, _journey, _story, _sharing, _field, _ages),
)
