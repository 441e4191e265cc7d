"""Warning signs of a search, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mpromptune.show.analysis import example_scores, gain, never_solved, winner
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record

# NOTE: on fewer examples, the standard error of a share of right answers is up to 0.09 and more.
_FEW_EXAMPLES = 30
# NOTE: of standard errors; what chance exceeds about once in twenty times.
_CLEAR = 2.0
# NOTE: embeddings that say nothing get the sign four times in five; made-up ones that determine the
# scores, and those of the recorded GSM8K prompts, had shares of 0.1 at most.
_LIKELY_CHANCE = 0.2


def warning_signs(findings: Findings) -> list[str]:
    """What speaks against taking the result at its word, a sentence each."""
    return [
        *_about_the_search(findings),
        *_about_the_winner(findings),
        *_about_the_examples(findings),
        *_about_the_texts(findings),
    ]


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
    if best.fully and len(best.scores) < findings.n_examples:
        yield (
            f"Scores are means over {len(best.scores)} of {findings.n_examples} validation examples: no "
            "configuration could be measured on the others."
        )
    elif len(best.scores) < findings.n_examples:
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


def _about_the_texts(findings: Findings) -> Iterator[str]:
    chance = findings.text_chance
    if chance is not None and chance > _LIKELY_CHANCE:
        yield (
            "The embeddings explain nothing that could be told from chance: dealt out at random among the "
            f"candidates, they explain the scores as well in {100 * chance:.0f} % of cases. Try another "
            "embedder, or embedder='index', which ignores the texts."
        )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
