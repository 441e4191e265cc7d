"""Word problems with known integer answers, generated from a seed, for runs against a live LM."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import dspy

_NAMES = ("Amara", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
_THINGS = ("stamps", "marbles", "shells", "postcards", "beads", "coins", "stickers", "buttons")
_GOODS = ("notebooks", "mugs", "lamps", "scarves", "puzzles", "plants")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Step = Callable[[random.Random, str, str, int], tuple[str, int]]
Problem = tuple[str, int]


def word_problems(n: int, seed: int = 0) -> list[dspy.Example]:
    """``n`` different problems, as examples with the input ``question``.

    Args:
        n: How many.
        seed: Same seed, same problems.

    Returns:
        Examples whose ``answer`` is the integer as text.
    """
    rng = random.Random(seed)
    problems: dict[str, int] = {}
    while len(problems) < n:
        question, answer = rng.choice(_TEMPLATES)(rng)
        problems[question] = answer
    return [dspy.Example(question=q, answer=str(a)).with_inputs("question") for q, a in problems.items()]


def same_number(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    """Metric: whether the last number in the predicted answer is the expected one."""
    numbers = _NUMBER.findall(str(prediction.answer))
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(example.answer)


def _collection(rng: random.Random) -> Problem:
    """A collection that grows and shrinks over four to eight steps."""
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    total = rng.randint(20, 90)
    sentences = [f"{name} has {total} {things}."]
    for _ in range(rng.randint(4, 8)):
        sentence, total = rng.choice(_STEPS)(rng, name, things, total)
        sentences.append(sentence)
    return " ".join([*sentences, f"How many {things} does {name} have now?"]), total


def _finds(rng: random.Random, name: str, things: str, total: int) -> tuple[str, int]:
    more = rng.randint(3, 60)
    return f"{name} finds {more} more {things}.", total + more


def _buys_boxes(rng: random.Random, name: str, things: str, total: int) -> tuple[str, int]:
    boxes, each = rng.randint(2, 9), rng.randint(4, 16)
    return f"{name} buys {boxes} boxes of {each} {things} each.", total + boxes * each


def _gives_away(rng: random.Random, name: str, things: str, total: int) -> tuple[str, int]:
    if total < 4:
        return _finds(rng, name, things, total)
    gone = rng.randint(2, total // 2)
    return f"{name} gives {gone} {things} to a friend.", total - gone


def _loses_share(rng: random.Random, name: str, things: str, total: int) -> tuple[str, int]:
    parts = [p for p in (3, 4, 5, 6, 7) if total % p == 0]
    if not parts:
        return _buys_boxes(rng, name, things, total)
    part = rng.choice(parts)
    return f"Then 1 out of every {part} of the {things} is lost.", total - total // part


def _packs_albums(rng: random.Random, name: str, things: str, total: int) -> tuple[str, int]:
    each = rng.randint(6, 14)
    if total < each:
        return _finds(rng, name, things, total)
    sentence = f"{name} fills as many albums of exactly {each} {things} as possible and sells the rest."
    return sentence, total - total % each


_STEPS: tuple[Step, ...] = (_finds, _buys_boxes, _gives_away, _loses_share, _packs_albums)


def _purchase(rng: random.Random) -> Problem:
    """Goods at two prices, a discount on one of them, and the change."""
    name, (first, second) = rng.choice(_NAMES), rng.sample(_GOODS, 2)
    a, b = rng.randint(3, 14), rng.randint(3, 14)
    price, other = 20 * rng.randint(1, 6), rng.randint(7, 45)
    percent = 5 * rng.randint(1, 9)
    cost = a * price * (100 - percent) // 100 + b * other
    paid = cost + rng.randint(1, 99)
    question = (
        f"{name} buys {a} {first} at {price} dollars each and {b} {second} at {other} dollars each. "
        f"The {first} are reduced by {percent} percent. {name} pays with {paid} dollars. "
        "How many dollars of change are due?"
    )
    return question, paid - cost


def _journey(rng: random.Random) -> Problem:
    """A distance in three legs, one of them partly driven back."""
    name = rng.choice(_NAMES)
    speeds, hours = [rng.randint(40, 95) for _ in range(2)], [rng.randint(2, 6) for _ in range(2)]
    back, rest = rng.randint(5, 60), rng.randint(15, 55)
    question = (
        f"{name} drives {hours[0]} hours at {speeds[0]} km per hour, rests for {rest} minutes, drives "
        f"{hours[1]} hours at {speeds[1]} km per hour in the same direction, and then turns round and "
        f"drives {back} km back. How many km from the start is {name}?"
    )
    return question, speeds[0] * hours[0] + speeds[1] * hours[1] - back


def _wages(rng: random.Random) -> Problem:
    """A week's pay with overtime at a higher rate, less a deduction."""
    name = rng.choice(_NAMES)
    rate, days, daily = 2 * rng.randint(5, 15), rng.randint(3, 6), rng.randint(8, 11)
    overtime, fee = rng.randint(2, 9), rng.randint(10, 60)
    question = (
        f"{name} earns {rate} dollars an hour and works {daily} hours on each of {days} days. For "
        f"{overtime} of those hours the pay is one and a half times as high. A fee of {fee} dollars is "
        f"taken off in the end. How many dollars does {name} receive?"
    )
    return question, rate * days * daily + rate * overtime // 2 - fee


def _workshop(rng: random.Random) -> Problem:
    """Two machines that start at different times, and a share of waste."""
    goods = rng.choice(_GOODS)
    fast, slow, hours, late = rng.randint(20, 60), rng.randint(8, 19), rng.randint(5, 9), rng.randint(2, 4)
    made = fast * hours + slow * (hours - late)
    box, faulty = rng.randint(7, 19), rng.randint(3, 30)
    question = (
        f"One machine makes {fast} {goods} an hour and another makes {slow} an hour. The first runs for "
        f"{hours} hours; the second starts {late} hours later and stops with it. Of all the {goods} made, "
        f"{faulty} are faulty and thrown away, and the others are packed into full boxes of {box}. How "
        f"many {goods} are left over?"
    )
    return question, (made - faulty) % box


_TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _collection,
    _collection,  # the most varied template, so twice as likely
    _purchase,
    _journey,
    _wages,
    _workshop,
)
