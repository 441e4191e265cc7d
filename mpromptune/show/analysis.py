"""What a reader wants to know of a search, in numbers: growth, effects and hard examples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpromptune.model.statistics import expected_best
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record

_MIPRO_NAME = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
_SHORT = {"instruction": "instr.", "demos": "demos"}


@dataclass(frozen=True)
class Step:
    """One trial in the course of a search.

    Attributes:
        calls: Program calls up to and including this trial's.
        score: Mean of the trial's own scores.
        best: The highest posterior mean, as it is at the end, of the configurations met so far.
        met: How many these are.
    """

    calls: int
    score: float
    best: float
    met: int


@dataclass(frozen=True)
class Effect:
    """A candidate, over the configurations that have it.

    Attributes:
        candidate: Its index.
        mean: Mean of their posterior means.
        count: How many they are.
    """

    candidate: int
    mean: float
    count: int


@dataclass(frozen=True)
class ExampleScores:
    """A validation example, over the configurations that were measured on it.

    Attributes:
        example: Its index.
        mean: Mean of their scores; the share that is right, where a score is 0 or 1.
        best: The highest of them.
        count: How many they are.
    """

    example: int
    mean: float
    best: float
    count: int


def label(params: Mapping[str, int]) -> str:
    """A configuration in a few words: ``0: instr. 2, demos 1``."""
    parts: dict[str, list[str]] = {}
    for name, index in params.items():
        match = _MIPRO_NAME.match(name)
        group, short = (f"{match[1]}: ", _SHORT[match[2]]) if match else ("", name)
        parts.setdefault(group, []).append(f"{short} {index}")
    return " | ".join(group + ", ".join(words) for group, words in parts.items())


def title(component: str) -> str:
    """A component's name for people."""
    match = _MIPRO_NAME.match(component)
    return f"Predictor {match[1]}, {match[2]}" if match else component


def winner(findings: Findings) -> Measured | None:
    """The winner's own entry; None where it was never measured."""
    return next((m for m in findings.configurations if m.params == findings.best_params), None)


def growth(findings: Findings) -> list[Step]:
    """The trials that have a score, in the order in which they were asked."""
    estimates = {_key(m.params): m.posterior_mean for m in findings.configurations}
    steps: list[Step] = []
    calls, best, met = 0, -math.inf, set()
    for recorded in read_record(findings.study):
        scores = list(recorded.scores.values())
        if scores:
            key = _key(recorded.params)
            calls, best = calls + len(scores), max(best, estimates.get(key, -math.inf))
            met.add(key)
            steps.append(Step(calls, _mean(scores), best, len(met)))
    return steps


def random_in_full(findings: Findings) -> list[float]:
    """What random choice could expect of the same calls: the best of 1, 2, ... that it measures in full.

    Each configuration is drawn anew from all that exist and measured on the whole validation set, so
    that its score is then as well known as the winner's; the k-th is known after k times as many
    calls as there are examples. What the surrogate does not know of a configuration counts as
    chance, for good and bad. Plans that drop poor configurations early would do better.

    Returns:
        One value for each whole measurement of the search's calls; none where nothing is known of
        configurations that were not measured.
    """
    if findings.drawn is None:
        return []
    draws = min(findings.calls // findings.n_examples, len(findings.drawn))
    return list(map(float, expected_best(findings.drawn[:, 0], findings.drawn[:, 1], draws)))


def random_in_hindsight(findings: Findings) -> list[float]:
    """The expected highest posterior mean of as many random configurations as the search had met.

    Step by step as in `growth`, and with the same hindsight: it says how much of the rise chance
    alone would have brought, had it known as well which configuration is the best of those met.
    """
    steps = growth(findings)
    if findings.drawn is None or not steps:
        return []
    draws = [min(step.met, len(findings.drawn)) for step in steps]
    best = expected_best(findings.drawn[:, 0], np.zeros(len(findings.drawn)), max(draws))
    return [float(best[k - 1]) for k in draws]


def main_effects(findings: Findings) -> dict[str, list[Effect]]:
    """For each component, the candidates that were measured, by index."""
    found: dict[str, dict[int, list[float]]] = {}
    for measured in findings.configurations:
        for name, index in measured.params.items():
            found.setdefault(name, {}).setdefault(index, []).append(measured.posterior_mean)
    return {
        name: [Effect(i, _mean(means), len(means)) for i, means in sorted(by_index.items())]
        for name, by_index in found.items()
    }


def example_scores(findings: Findings) -> list[ExampleScores]:
    """The examples that were measured, the hardest first."""
    found: dict[int, list[float]] = {}
    for measured in findings.configurations:
        for example, score in measured.scores.items():
            found.setdefault(example, []).append(score)
    examples = [ExampleScores(e, _mean(s), max(s), len(s)) for e, s in found.items()]
    return sorted(examples, key=lambda one: (one.mean, one.example))


def never_solved(findings: Findings) -> list[ExampleScores]:
    """Examples on which no configuration scores above the lowest score of the whole search."""
    examples = example_scores(findings)
    lowest = min((s for m in findings.configurations for s in m.scores.values()), default=0.0)
    if all(one.best <= lowest for one in examples):
        return []
    return [one for one in examples if one.best <= lowest]


def gain(findings: Findings) -> tuple[float, float] | None:
    """The winner's gain over the baseline on the examples that both have, and its standard error.

    None where they share fewer than two examples, or are the same.
    """
    baseline, best = findings.baseline_params, winner(findings)
    other = next((m for m in findings.configurations if m.params == baseline), None)
    if best is None or other is None or best is other:
        return None
    differences = [best.scores[e] - other.scores[e] for e in best.scores.keys() & other.scores.keys()]
    n = len(differences)
    if n < 2:
        return None
    mean = _mean(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, math.sqrt(variance / n)


def _key(params: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(params.items())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
