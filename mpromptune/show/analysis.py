"""Analysis of a finished search: growth, effects, hard examples, and the uncertainty of its gain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

from mpromptune.model.space import Candidate
from mpromptune.model.statistics import expected_best
from mpromptune.storage.attributes import PREDICTORS
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record

_MIPRO_NAME = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
# Characters that no name is shown with: they would act on a terminal, turn the direction of what follows, or
# be half of one, which cannot be drawn.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# NOTE: characters in an excerpt of a text, a few words that fit beside a figure; and in the beginning that
# comes before the difference from another text, one or two words.
_EXCERPT, _HEAD = 28, 12


class Step(NamedTuple):
    """One trial in the course of a search.

    Attributes:
        calls: Program calls up to and including those of this trial.
        score: Mean of the trial's own scores.
        best: Highest posterior mean, at the end of the search, of the configurations measured so far.
        met: Number of configurations measured so far.
    """

    calls: int
    score: float
    best: float
    met: int


def title(findings: Findings, component: str) -> str:
    """A readable name of a component, with the predictor's name in the program if the study has it."""
    match = _MIPRO_NAME.match(component)
    if match is None:
        return _visible(component)
    return ", ".join(filter(None, (_predictor(findings, int(match[1])), match[2])))


def _visible(text: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _predictor(findings: Findings, index: int) -> str:
    """The name of a predictor in its program, without ``.predict``; empty if it is alone and has none."""
    names: list[str] = findings.study.user_attrs.get(PREDICTORS, [])
    names = [*map(_visible, names)]
    short = [name.removesuffix(".predict") for name in names]
    if index < len(names) and names != ["self"]:  # which is DSPy's name of a program that is a predictor
        return short[index] if len({*short}) == len(short) else names[index]
    is_alone = all(component.startswith(f"{index}_predictor_") for component in findings.best_params)
    return "" if is_alone else f"predictor {index + 1}"


def is_compile(findings: Findings) -> bool:
    """Whether the configurations are those of a DSPy program."""
    return all(map(_MIPRO_NAME.match, findings.best_params))


def label(findings: Findings, params: Mapping[str, int]) -> str:
    """A configuration in a few words: ``solve: “Think step by step.”, 2 demos``."""
    parts: dict[str, list[str]] = {}
    for component, index in params.items():
        match = _MIPRO_NAME.match(component)
        group = _predictor(findings, int(match[1])) if match else _visible(component)
        parts.setdefault(group, []).append(candidate_name(findings, component, index))
    return "; ".join(f"{group}: {', '.join(words)}".removeprefix(": ") for group, words in parts.items())


def beside_winner(findings: Findings, params: Mapping[str, int]) -> str:
    """A configuration in a few words: only what differs, if it shares candidates with the winner."""
    others = {name: index for name, index in params.items() if findings.best_params.get(name) != index}
    is_near = 0 < len(others) < len(params) and params != findings.baseline_params
    return f"winner, but {label(findings, others)}" if is_near else label(findings, params)


def candidate_name(findings: Findings, component: str, index: int, in_short: bool = False) -> str:
    """A name of a candidate that is unique in its component; ``in_short`` only the number of its demos."""
    if in_short and findings.space is not None:
        candidate = findings.space.components[component][index]
        if not isinstance(candidate, str):
            return counted(len(candidate), "demo")
    return _candidate_names(findings, component).get(index, f"no. {index}")


def _candidate_names(findings: Findings, component: str) -> dict[int, str]:
    """Names of candidates by index; empty if the texts are not known."""
    if findings.space is None or component not in findings.space.components:
        return {}
    candidates = findings.space.components[component]
    names = [_name(c, text) for c, text in zip(candidates, _excerpts(candidates), strict=True)]
    match, own = _MIPRO_NAME.match(component), (findings.baseline_params or {}).get(component)
    if match and own is not None and candidates[own]:
        names[own] = f"own {match[2]}"
    return dict(enumerate(names))


def _name(candidate: Candidate, excerpt: str) -> str:
    if isinstance(candidate, str):
        return f"“{excerpt}”"
    number = counted(len(candidate), "demo")
    return f"{number} (“{excerpt}”)" if candidate else number


def counted(number: int, what: str) -> str:
    """A number of things in words: ``no demos``, ``1 demo``, ``2 demos``."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _excerpts(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The beginnings of texts; where several begin alike, also what is at their first difference."""
    texts = (" ".join((c if isinstance(c, str) else "\n".join(c)).split()) for c in candidates)
    return _distinct(tuple(map(_visible, texts)))


@lru_cache(maxsize=16)  # a page names each candidate many times, and all pairs of texts are compared
def _distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for text in texts:
        alike = [other for other in texts if other != text and other[:_EXCERPT] == text[:_EXCERPT]]
        differs = max((_first_difference(text, other) for other in alike), default=0)
        start = text.rfind(" ", 0, max(min(differs, len(text) - _EXCERPT), 0)) + 1
        end = start + _EXCERPT if len(text) > start + _EXCERPT + _HEAD else len(text)
        head = f"{text[: text.find(' ', _HEAD)]} … " if start > 2 * _HEAD else "…" if start else ""
        found.append(f"{head}{text[start:end]}{'…' if end < len(text) else ''}")
    return tuple(found)


def _first_difference(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)) - 1)


def is_share(findings: Findings) -> bool:
    """Whether all scores are between 0 and 1, and so are shown in percent."""
    return all(0 <= s <= 1 for m in findings.configurations for s in m.scores.values())


def unit(findings: Findings) -> Callable[[float], str]:
    """A function that formats a score: in percent, or in the unit of the metric."""
    formatted: Callable[[float], str] = "{:.1%}".format if is_share(findings) else "{:.4g}".format
    return lambda score: formatted(score).replace("%", " %") if math.isfinite(score) else "not measured"


def points(findings: Findings, sign: str = "+") -> Callable[[float], str]:
    """A function that formats a difference of scores, by default with its sign: in points, or as `unit`."""
    if is_share(findings):
        return lambda difference: f"{100 * difference:{sign}.1f} points"
    return lambda difference: f"{difference:{sign}.4g}"


def winner(findings: Findings) -> Measured | None:
    """The entry of the winner; None if it was never measured."""
    return _entry(findings, findings.best_params)


def baseline(findings: Findings) -> Measured | None:
    """The entry of the baseline; None if it was never measured."""
    return _entry(findings, findings.baseline_params)


def _entry(findings: Findings, params: Mapping[str, int] | None) -> Measured | None:
    return next((m for m in findings.configurations if m.params == params), None)


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


def gain(findings: Findings) -> tuple[float, float] | None:
    """The mean of `differences` and its standard error; None for fewer than two."""
    found = differences(findings)
    return (fmean(found), stdev(found) / math.sqrt(len(found))) if len(found) > 1 else None


def gain_in_examples(findings: Findings) -> str:
    """The gain as a number of examples, if answers are right or wrong; otherwise empty."""
    found = findings.best_score - findings.baseline_score
    if found != found or not {s for m in findings.configurations for s in m.scores.values()} <= {0.0, 1.0}:
        return ""
    both = winner(findings), baseline(findings)
    about = "" if all(m is not None and m.fully for m in both) else "about "
    right = round(found * findings.n_examples)
    return f"{about}{abs(right)} {'more' if right >= 0 else 'fewer'} of {findings.n_examples} right"


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


def percent(chance: float) -> str:
    """A probability in words; never one of 0 or 100 %."""
    number = "over 99" if chance > 0.99 else "under 1" if chance < 0.01 else f"{100 * chance:.0f}"
    return f"{number} %"


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
        One value for each full measurement that the search's calls allow; empty if nothing is known of
        configurations that were not measured.
    """
    if findings.drawn is None:
        return []
    draws = min(findings.calls // findings.n_examples, len(findings.drawn))
    return list(map(float, expected_best(findings.drawn[:, 0], findings.drawn[:, 1], draws)))


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
    """The posterior means of the measured configurations with each candidate, by component and candidate."""
    found: dict[str, dict[int, list[float]]] = {}
    for measured in findings.configurations:
        for name, index in measured.params.items():
            found.setdefault(name, {}).setdefault(index, []).append(measured.posterior_mean)
    return {name: dict(sorted(by_index.items())) for name, by_index in found.items()}


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
