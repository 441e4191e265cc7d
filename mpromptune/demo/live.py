"""The demo's task for a real LM: word problems with known integer answers, generated from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import dspy

from mpromptune.demo.run import Task

_TRAIN, _VALIDATION = 50, 100
_NAMES = ("Amara", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
_THINGS = ("stamps", "marbles", "shells", "postcards", "beads", "coins", "stickers", "buttons")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# Templates: a text, in which `<low-high by step>` is replaced by a random number, and a function that solves
# the problem from these numbers in order.
_DRAWN = re.compile(r"<(\d+)-(\d+)(?: by (\d+))?>")
_TEMPLATES: tuple[tuple[str, Callable[..., int]], ...] = (
    (
        "{name} buys <3-14> notebooks at <20-120 by 20> dollars each and <3-14> mugs at <7-45> dollars each. "
        "The notebooks are reduced by <5-45 by 5> percent. {name} pays with <2400-2900> dollars. How many "
        "dollars of change are due?",
        lambda a, price, b, other, percent, paid: paid - a * price * (100 - percent) // 100 - b * other,
    ),
    (
        "{name} drives <2-6> hours at <40-95> km per hour, rests for <15-55> minutes, drives <2-6> hours at "
        "<40-95> km per hour in the same direction, and then turns round and drives <5-60> km back. How many "
        "km from the start is {name}?",
        lambda hours, speed, rest, more, other, back: hours * speed + more * other - back,
    ),
    (
        "{name} earns <10-30 by 2> dollars an hour and works <8-11> hours on each of <3-6> days. For <2-9> "
        "of those hours the pay is one and a half times as high. A fee of <10-60> dollars is taken off in "
        "the end. How many dollars does {name} receive?",
        lambda rate, daily, days, overtime, fee: rate * days * daily + rate * overtime // 2 - fee,
    ),
    (
        "One machine makes <20-60> {things} an hour and another makes <8-19> an hour. The first runs for "
        "<5-9> hours; the second starts <2-4> hours later and stops with it. Of all the {things} made, "
        "<3-30> are faulty and thrown away, and the others are packed into full boxes of <7-19>. How many "
        "{things} are left over?",
        lambda fast, slow, hours, late, faulty, box: (fast * hours + slow * (hours - late) - faulty) % box,
    ),
)
# Text of a step with a collection of ``t`` things, and their number afterwards; None if it is impossible.
_STEPS: tuple[tuple[str, Callable[[int, int, int], int | None]], ...] = (
    ("{name} finds {n} more {things}.", lambda t, n, m: t + n),
    ("{name} buys {m} boxes of {n} {things} each.", lambda t, n, m: t + m * n),
    ("{name} gives {n} {things} to a friend.", lambda t, n, m: t - n if n < t else None),
    ("Then 1 out of every {m} of the {things} is lost.", lambda t, n, m: None if t % m else t - t // m),
    (
        "{name} fills as many albums of exactly {n} {things} as possible and sells the rest.",
        lambda t, n, m: t - t % n if n <= t else None,
    ),
)


def live_task(model: str | dspy.BaseLM) -> Task:
    """Generated word problems for a real LM, with chain of thought and few-shot demos.

    Args:
        model: A LiteLLM name, or an LM object.
    """
    problems = word_problems(_TRAIN + _VALIDATION)
    lm = dspy.LM(model) if isinstance(model, str) else model
    return Task(
        title=f"m-promptune demo: live on {lm.model}",
        notes=[
            ("Task", f"generated word problems: {_TRAIN} for training, {_VALIDATION} for validation"),
            ("Live", "every answer and every proposal comes from the model; nothing is replayed"),
        ],
        program=dspy.ChainOfThought("question -> answer"),
        trainset=problems[:_TRAIN],
        valset=problems[_TRAIN:],
        metric=same_number,
        lm=lm,
        arguments={"auto": "light"},
    )


def word_problems(n: int, seed: int = 0) -> list[dspy.Example]:
    """``n`` different problems: examples with the input ``question``, and the integer ``answer`` as text."""
    rng = random.Random(seed)
    problems: dict[str, int] = {}
    while len(problems) < n:
        names = {"name": rng.choice(_NAMES), "things": rng.choice(_THINGS)}
        if rng.random() < 1 / 3:  # the most varied kind
            question, answer = _collection(rng, names)
        else:
            text, solve = rng.choice(_TEMPLATES)
            ranges = [(int(low), int(high), int(by or 1)) for low, high, by in _DRAWN.findall(text)]
            numbers = [rng.randrange(low, high + 1, step) for low, high, step in ranges]
            question, answer = _DRAWN.sub("{}", text).format(*numbers, **names), solve(*numbers)
        problems[question] = answer
    return [dspy.Example(question=q, answer=str(a)).with_inputs("question") for q, a in problems.items()]


def _collection(rng: random.Random, names: dict[str, str]) -> tuple[str, int]:
    """A collection that grows and shrinks over four to eight steps."""
    total, steps = rng.randint(20, 90), rng.randint(4, 8)
    sentences = ["{name} has {total} {things}.".format(**names, total=total)]
    while len(sentences) <= steps:
        (text, update), n, m = rng.choice(_STEPS), rng.randint(4, 16), rng.randint(2, 9)
        after = update(total, n, m)
        if after is not None:
            total = after
            sentences.append(text.format(**names, n=n, m=m))
    return " ".join([*sentences, "How many {things} does {name} have now?".format(**names)]), total


def same_number(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    """Metric: whether the last number in the predicted answer is the expected one."""
    numbers = _NUMBER.findall(str(prediction.answer))
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(example.answer)
