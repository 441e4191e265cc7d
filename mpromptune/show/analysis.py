"""Analysis of a finished search: growth, effects, hard examples, and the uncertainty of its gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from mpromptune.model.statistics import expected_best
from mpromptune.show.progress import QUANTILE
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record


class Step(NamedTuple):
    """One trial in the course of a search.

    Attributes:
        calls: Calls of the search up to and including those of this trial.
        score: Mean of the trial's own scores.
        best: Highest posterior mean, at the end of the search, of the configurations measured so far.
        met: Number of configurations measured so far.
    """

    calls: int
    score: float
    best: float
    met: int


def is_share(findings: Findings) -> bool:
    """Whether all scores are between 0 and 1, and so are shown in percent."""
    return all(0 <= s <= 1 for m in findings.configurations for s in m.scores.values())


def winner(findings: Findings) -> Measured | None:
    """The entry of the winner; None if it was never measured."""
    return _entry(findings, findings.best_params)


def baseline(findings: Findings) -> Measured | None:
    """The entry of the baseline; None if it was never measured."""
    return _entry(findings, findings.baseline_params)


def _entry(findings: Findings, params: Mapping[str, int] | None) -> Measured | None:
    return next((m for m in findings.configurations if m.params == params), None)


def whole_score(findings: Findings, measured: Measured) -> tuple[float, float, float]:
    """The score of a configuration on the whole validation set, and the ends of its 95 % interval.

    It is measured, and the interval has no width, or predicted as far as examples are missing.
    """
    margin = QUANTILE * measured.posterior_std
    score, interval = measured.posterior_mean, None
    if measured.params == findings.best_params:
        score, interval = findings.best_score, findings.best_interval
    elif measured.params == findings.baseline_params:
        score, interval = findings.baseline_score, findings.baseline_interval
    elif measured.fully:
        score = measured.mean
    if measured.fully:
        return score, score, score
    low, high = interval or (measured.posterior_mean - margin, measured.posterior_mean + margin)
    return (score, max(low, 0.0), min(high, 1.0)) if is_share(findings) else (score, low, high)


def _compared(findings: Findings) -> tuple[Measured, Measured] | None:
    """Winner and baseline; None if they are the same, or one of them was never measured."""
    best, own = winner(findings), baseline(findings)
    return None if best is None or own is None or best is own else (best, own)


def differences(findings: Findings) -> list[float]:
    """Winner's score minus baseline's on each example that both have; empty if the baseline is the winner."""
    pair = _compared(findings)
    if pair is None:
        return []
    best, own = pair
    return [best.scores[e] - own.scores[e] for e in sorted(best.scores.keys() & own.scores.keys())]


def expected_gain(findings: Findings) -> tuple[float, float] | None:
    """Posterior mean and deviation of the winner's gain over the baseline; None without both.

    The two normal distributions are assumed to be independent, which is cautious for similar prompts.
    """
    pair = _compared(findings)
    if pair is None:
        return None
    best, own = pair
    return best.posterior_mean - own.posterior_mean, math.hypot(best.posterior_std, own.posterior_std)


def chance_of_gain(findings: Findings) -> float | None:
    """Posterior probability that the winner is better than the baseline; None without both."""
    found = expected_gain(findings)
    if found is None:
        return None
    return 1.0 - NormalDist(*found).cdf(0.0) if found[1] else float(found[0] > 0.0)


def rivals(findings: Findings) -> list[Measured]:
    """Configurations whose estimate is within one standard deviation of the difference to the winner's."""
    best = winner(findings)
    if best is None:
        return []
    return [
        m
        for m in findings.configurations
        if m is not best
        and abs(best.posterior_mean - m.posterior_mean) <= math.hypot(best.posterior_std, m.posterior_std)
    ]


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
            steps.append(Step(calls, fmean(scores), best, len(met)))
    return steps


def _key(params: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(params.items())


def random_in_full(findings: Findings) -> list[float]:
    """The expected best of 1, 2, ... random configurations, all measured in full, with the same calls.

    Configurations are drawn from the whole space and measured on the whole validation set, so the k-th is
    known after k times as many calls as there are examples. The uncertainty of the surrogate about a
    configuration counts as chance. Plans that drop poor configurations early would do better.

    Returns:
        One value for each full measurement that the search's calls allow, within the range of all scores;
        empty if nothing is known of configurations that were not measured.
    """
    scores = [score for m in findings.configurations for score in m.scores.values()]
    if findings.drawn is None or not scores:
        return []
    draws = min(findings.calls // findings.n_examples, len(findings.drawn))
    best = expected_best(findings.drawn[:, 0], findings.drawn[:, 1], draws)
    # The model's normal distributions go beyond the range in which scores are.
    return list(map(float, np.clip(best, min(scores), max(scores))))


def random_in_hindsight(findings: Findings) -> list[float]:
    """The expected highest posterior mean of as many random configurations as the search had measured.

    It has one value for each step of `growth`, with the same posterior means of the end of the search: it
    shows how much of the growth chance alone would have brought.
    """
    steps = growth(findings)
    if findings.drawn is None or not steps:
        return []
    draws = [min(step.met, len(findings.drawn)) for step in steps]
    best = expected_best(findings.drawn[:, 0], np.zeros(len(findings.drawn)), max(draws))
    return [float(best[k - 1]) for k in draws]


def main_effects(findings: Findings) -> dict[str, dict[int, list[float]]]:
    """Component to candidate, best first, to the posterior means of the configurations measured with it."""
    found: dict[str, dict[int, list[float]]] = {}
    for measured in findings.configurations:
        for name, index in measured.params.items():
            found.setdefault(name, {}).setdefault(index, []).append(measured.posterior_mean)
    return {
        name: dict(sorted(by.items(), key=lambda one: (-fmean(one[1]), one[0]))) for name, by in found.items()
    }


def example_scores(findings: Findings) -> dict[int, list[float]]:
    """The scores of the measured configurations on each validation example, hardest example first."""
    found: dict[int, list[float]] = {}
    for measured in findings.configurations:
        for example, score in measured.scores.items():
            found.setdefault(example, []).append(score)
    return dict(sorted(found.items(), key=lambda item: (fmean(item[1]), item[0])))


def never_solved(findings: Findings) -> list[int]:
    """Examples on which no configuration scores above the lowest score of the whole search."""
    examples = example_scores(findings)
    lowest = min((min(scores) for scores in examples.values()), default=0.0)
    hard = sorted(example for example, scores in examples.items() if max(scores) <= lowest)
    return hard if len(hard) < len(examples) else []
