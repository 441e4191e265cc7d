"""What a reader wants to know of a search, in numbers: growth, effects, hard examples, warning signs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mpromptune.findings import Findings, Measured
from mpromptune.record import read_record

# NOTE: on fewer examples, the standard error of a share of right answers is up to 0.09 and more.
_FEW_EXAMPLES = 30
# NOTE: of standard errors; what chance exceeds about once in twenty times.
_CLEAR = 2.0

_MIPRO_NAME = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
_SHORT = {"instruction": "instr.", "demos": "demos"}


@dataclass(frozen=True)
class Step:
    """One trial in the course of a search.

    Attributes:
        calls: Program calls up to and including this trial's.
        score: Mean of the trial's own scores.
        best: The highest posterior mean, as it is at the end, of the configurations met so far.
    """

    calls: int
    score: float
    best: float


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
    calls, best = 0, -math.inf
    for recorded in read_record(findings.study):
        scores = list(recorded.scores.values())
        if scores:
            calls += len(scores)
            best = max(best, estimates.get(_key(recorded.params), -math.inf))
            steps.append(Step(calls, _mean(scores), best))
    return steps


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


def warning_signs(findings: Findings) -> list[str]:
    """What speaks against taking the result at its word, a sentence each."""
    return [*_about_the_search(findings), *_about_the_winner(findings), *_about_the_examples(findings)]


def _about_the_search(findings: Findings) -> Iterator[str]:
    if findings.stopped_by is not None:
        yield f"The search was ended by {findings.stopped_by} before it had made all its calls."
    record = read_record(findings.study)
    if running := sum(recorded.is_open for recorded in record):
        yield f"The search is not over: trials that are open: {running}."
    cut = sum(len(r.scores) < len(r.examples or ()) for r in record if not r.is_open)
    if cut:
        yield f"Trials that failed or were cut off: {cut}; what they had measured counts."
    if len(findings.configurations) == 1:
        yield "Only one configuration was measured, so there is nothing to compare it with."


def _about_the_winner(findings: Findings) -> Iterator[str]:
    best = winner(findings)
    if best is None:
        return
    if len(best.scores) < findings.n_examples:
        yield (
            f"The winner was measured on {len(best.scores)} of {findings.n_examples} validation examples: "
            "its score is an estimate."
        )
    if equal := _rivals(findings, best):
        yield (
            f"The top is flat: {_count(equal, 'configuration')} cannot be told from the winner (the "
            "difference is within one standard deviation), so prefer the shortest or cheapest of them."
        )
    if best.mean - best.posterior_mean > max(best.posterior_std, 1e-9):
        yield (
            f"Risk of overfitting: the winner scored {best.mean:.4g}, but the model expects only "
            f"{best.posterior_mean:.4g} ± {best.posterior_std:.2g} of it; some of its score may be luck."
        )
    yield from _about_the_gain(findings)


def _rivals(findings: Findings, best: Measured) -> int:
    """How many are within a standard deviation of the difference."""
    others = (m for m in findings.configurations if m is not best)
    return sum(
        abs(best.posterior_mean - m.posterior_mean) <= math.hypot(best.posterior_std, m.posterior_std)
        for m in others
    )


def _about_the_gain(findings: Findings) -> Iterator[str]:
    if findings.best_params == findings.baseline_params:
        yield "Nothing was found that beats the baseline, which is the winner."
    found = gain(findings)
    if found is not None and found[0] < _CLEAR * found[1]:
        yield (
            f"The gain over the baseline, {found[0]:.3g} ± {found[1]:.2g} (standard error), may be chance: "
            "compare both on examples that the search has not seen."
        )


def _about_the_examples(findings: Findings) -> Iterator[str]:
    if findings.n_examples < _FEW_EXAMPLES:
        yield (
            f"The validation set has only {_count(findings.n_examples, 'example')}: what is best on it need "
            "not be best elsewhere."
        )
    scores = {score for m in findings.configurations for score in m.scores.values()}
    if len(scores) == 1:
        yield f"Every score is {scores.pop():.4g}: the metric tells no configuration from another."
    hard, seen = len(never_solved(findings)), len(example_scores(findings))
    if 2 * hard > seen:
        yield f"No configuration solves {hard} of {seen} examples: the candidates may all lack something."


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _key(params: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(params.items())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
