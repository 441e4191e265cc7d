"""The scripted world of `benchmarks.proposals`: its function by hand, and optimizers that run on it."""

from __future__ import annotations

from math import log
from typing import Any

import dspy
import numpy as np
import pytest

from benchmarks.proposals import chosen
from benchmarks.scripted import CALLS, cells, embed, gepa, measure, summary
from benchmarks.scripted_lm import DEMO, DISTRACTOR, DISTRACTORS, KINDS, RULE, RULES, Scripted, task_of
from mpromptune.operators.rewrite import FromContrast, FromTwo

TASK = task_of("answer")
NUMBERS = range(300)


def logit(chance: float) -> float:
    return log(chance / (1 - chance))


def gains(world: Scripted, instruction: str, *demos: int) -> dict[int, float]:
    """Logits above the bare task, by the kind of the case; all cases of a kind have the same."""
    found: dict[int, set[float]] = {}
    for number in NUMBERS:
        more = logit(world.chance("answer", f"{TASK} {instruction}", demos, number))
        less = logit(world.chance("answer", TASK, [], number))
        found.setdefault(world.kind("answer", number), set()).add(round(more - less, 6))
    return {kind: one for kind, (one,) in found.items()}


def asked(world: Scripted, signature: Any, **inputs: str) -> str:
    """What the prompt model answers to one request."""
    with dspy.context(lm=world.prompt_lm):
        answer = dspy.Predict(signature)(**inputs)
    return str(answer[next(iter(signature.output_fields))])


def test_a_rule_helps_cases_of_its_kind_only() -> None:
    """By `RULE` logits; a rule for another step helps none."""
    world = Scripted(1, seed=0)
    for kind, rule in enumerate(RULES["answer"]):
        assert gains(world, rule) == {k: RULE * (k == kind) for k in range(len(KINDS))}
    assert set(gains(world, RULES["plan"][0]).values()) == {0.0}


def test_every_distractor_harms_every_case() -> None:
    """One by `DISTRACTOR` logits, two by twice as many."""
    world = Scripted(1, seed=0)
    assert set(gains(world, DISTRACTORS[0]).values()) == {DISTRACTOR}
    assert set(gains(world, " ".join(DISTRACTORS[1:3])).values()) == {2 * DISTRACTOR}


def test_a_demo_helps_cases_of_its_kind_only() -> None:
    """A second one of the kind adds nothing."""
    world = Scripted(1, seed=0)
    kind = world.kind("answer", 0)
    same = [number for number in NUMBERS if world.kind("answer", number) == kind][:2]
    for demos in (same[:1], same):
        assert gains(world, "", *demos) == {k: DEMO * (k == kind) for k in range(len(KINDS))}


@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_program_is_right_as_often_as_is_expected(n_steps: int) -> None:
    """The mean of the metric over 400 calls, with a rule and a demo, is close to the known accuracy."""
    world = Scripted(n_steps, seed=1)
    program = world.program.deepcopy()
    for field, predictor in zip(program.fields, program.predictors(), strict=True):
        text = f"{task_of(field)} {RULES[field][0]} {DISTRACTORS[0]}"
        predictor.signature = predictor.signature.with_instructions(text)
        predictor.demos = [dspy.Example(question="Case 7", **dict.fromkeys(program.fields, "said"))]
    with dspy.context(lm=world.task_lm):
        scores = [world.metric(one, program(**one.inputs())).score for one in world.examples(0, 400)]
    assert np.mean(scores) == pytest.approx(world.accuracy(program, range(400)), abs=4 * 0.5 / 400**0.5)
    assert world.log == [True] * 400


def test_feedback_names_the_rule_that_the_case_needed() -> None:
    """Of the step that was wrong; a right answer lacks none."""
    world = Scripted(3, seed=0)
    with dspy.context(lm=world.task_lm):
        told = [
            (n, world.metric(one, world.program(**one.inputs())))
            for n, one in enumerate(world.examples(0, 60))
        ]
    for number, verdict in told:
        needed = [RULES[field][world.kind(field, number)] for field in world.program.fields]
        named = [rule for rules in RULES.values() for rule in rules if rule in verdict.feedback]
        assert set(named) <= set(needed)
        assert bool(named) == (verdict.score == 0.0)
    assert {verdict.score for _, verdict in told} == {0.0, 1.0}


def test_a_rewrite_keeps_most_rules_and_adds_some_that_it_was_shown() -> None:
    """One or two of those in good instructions, on the mean of requests that differ in another input."""
    world, (first, *others) = Scripted(1, seed=0), RULES["answer"]
    kept, added = [], []
    for number in range(200):
        text = asked(
            world,
            FromContrast,
            task=f"Task {number}",
            current_instruction=f"{TASK} {first}",
            good_instructions=" ".join(others[:3]),
            bad_instructions=others[5],
            rules="none",
        )
        assert text.startswith(TASK)
        assert not any(rule in text for rule in others[3:])
        kept.append(first in text)
        added.append(sum(rule in text for rule in others[:3]))
    assert set(added) == {1, 2}
    assert 0.8 < np.mean(kept) < 1.0


def test_two_instructions_become_one() -> None:
    """Which has nearly all that either says."""
    world, rules = Scripted(1, seed=0), RULES["answer"]
    pair = {"first_instruction": f"{TASK} {rules[0]} {rules[1]}", "second_instruction": f"{TASK} {rules[2]}"}
    texts = [asked(world, FromTwo, task=f"Task {n}", rules="none", **pair) for n in range(100)]
    assert np.mean([sum(rule in text for rule in rules) for text in texts]) > 2.5


@pytest.mark.parametrize("method", ["stock", "gepa", "fixed", "adaptive"])
def test_methods_run_within_their_calls(method: str) -> None:
    """They return a program whose accuracy is known, and pay for their proposals too."""
    (cell,) = (c for c in cells() if c["method"] == method and c["predictors"] == 1)
    figures = measure(cell, 0)
    assert 0.9 * CALLS[1] < figures["program_calls"] + figures["proposals"] <= CALLS[1]
    assert figures["proposals"] > 0
    assert 0.0 < figures["accuracy"] < 100.0


@pytest.mark.parametrize(("calls", "has_changed"), [(206, False), (207, True)])
def test_gepa_gets_nothing_out_of_calls_past_the_limit(calls: int, has_changed: bool) -> None:
    """The first candidate is written and tried with 7 calls after the first 100, and measured with 100."""
    world = Scripted(1, seed=0)
    with dspy.context(lm=world.task_lm):
        program = gepa(world, calls, 0)
    assert len(world.log) == 207
    assert (program.answer.signature.instructions != TASK) == has_changed


def test_cells_are_found_whatever_the_tables_and_writers() -> None:
    """Those of the scripted world are about none of them."""
    found = chosen(["scripted"], ["gsm8k"], ["stock", "gepa"], ["bad"])
    assert [(c["predictors"], c["method"]) for c in found] == [
        (1, "stock"),
        (1, "gepa"),
        (3, "stock"),
        (3, "gepa"),
    ]


def test_gains_are_paired_by_seed() -> None:
    """Two seeds with gains of 4 and 6 points have a mean of 5 and a standard error of 1."""
    common = {
        "world": "scripted",
        "predictors": 1,
        "calls": 9,
        "n_val": 2,
        "program_calls": 8.0,
        "proposals": 1.0,
    }
    rows = [
        {**common, "method": "stock", "accuracy": 75.0, "regrets": [30.0, 20.0]},
        {**common, "method": "adaptive", "accuracy": 80.0, "regrets": [26.0, 14.0]},
    ]
    first, second = summary(rows).splitlines()[2:]
    assert first == "| 1 | stock | 75.0 | 8.0 | 1.0 | +5.00 ± 1.00 |"
    assert second == "| 1 | adaptive | 80.0 | 8.0 | 1.0 |  |"


def test_texts_with_common_words_are_close() -> None:
    """Vectors have length 1, also that of an empty text."""
    vectors = embed(["state the units", "state the dates", "write poems now", ""])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
