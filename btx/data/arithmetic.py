"""Generates arithmetic and word problems from a fixed seed: the mathematics of the embedded corpora.

Each problem is (question, steps, answer); every equation is true.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

DOCUMENTS, SEED = 2_400, 20240312

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


def problems(count: int, seed: int = SEED) -> Iterator[tuple[str, str]]:
    """Yield questions with their answers, one number each, each question once; the first ones are the same for any
    count."""
    rng, seen = random.Random(f"problems/{seed}"), set[str]()
    while len(seen) < count:
        question, _, answer = rng.choice([kind for kind in KINDS if kind is not _division])(rng)  # has two numbers
        if question not in seen:
            seen.add(question)
            yield question, answer


def worksheets() -> Iterator[str]:
    """Yield the documents, the same ones at every call."""
    rng = random.Random(SEED)
    for _ in range(DOCUMENTS):
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
