"""Reasons to doubt a result, and what to do about them, as sentences with code between backquotes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mpromptune.show.analysis import baseline, chance_of_gain, example_scores, never_solved, rivals, winner
from mpromptune.show.words import counted, percent, unit
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record

# NOTE: with fewer examples, the standard error of a fraction of right answers may exceed 0.09.
_FEW_EXAMPLES = 30
# Probability of a gain from which on it is not doubted, and `confirm="auto"` ends its comparison.
_SURE = 0.95
# NOTE: uninformative embeddings get this warning four times in five; artificial embeddings that determine the
# scores, and those of the recorded GSM8K prompts, had p-values of at most 0.1.
_LIKELY_CHANCE = 0.2


class Sign(NamedTuple):
    """A reason to doubt a result, and what to do about it; empty if there is nothing to do."""

    reason: str
    advice: str = ""


def warning_signs(findings: Findings) -> list[Sign]:
    """Reasons to doubt the result, the most urgent first."""
    parts = (_about_the_search, _about_the_winner, _about_the_gain, _about_the_examples, _about_the_texts)
    return [sign for part in parts for sign in part(findings)]


def texts_are_chance(findings: Findings) -> bool:
    """Whether the embeddings of the texts explain the scores no better than chance."""
    return findings.text_chance is not None and findings.text_chance > _LIKELY_CHANCE


def _about_the_search(findings: Findings) -> Iterator[Sign]:
    if findings.stopped_by is not None:
        yield Sign(
            f"The search was ended by {findings.stopped_by} before it had made all its calls.",
            f"Raise `{findings.stopped_by}`; with `storage=` the same call continues the search.",
        )
    record = read_record(findings.study)
    if running := sum(recorded.is_open for recorded in record):
        yield Sign(f"The search has not ended; open trials: {running}.", "Wait, or continue it.")
    measured = (r for r in record if not r.is_open and (r.proposal is None or r.proposal.refused is None))
    cut = sum(len(r.scores) < len(r.examples or ()) for r in measured)
    if cut:
        yield Sign(f"Trials that failed or were cut short: {cut}; their scores count.")
    if len(findings.configurations) == 1:
        yield Sign(
            "Only one configuration was measured, so there is nothing to compare it with.",
            "Give the search more candidates (`num_candidates`) or more calls (`max_calls`).",
        )


def _about_the_winner(findings: Findings) -> Iterator[Sign]:
    best, own = winner(findings), baseline(findings)
    if best is None:
        return
    score, n_scores = unit(findings), len(best.scores)
    if best.fully and n_scores < findings.n_examples:
        yield Sign(
            f"Scores are means over {n_scores} of {findings.n_examples} validation examples: no "
            "configuration could be measured on the others."
        )
    entries = {"the winner": best, "the baseline": None if own is best else own}
    partly = [
        f"{name} was measured on {len(one.scores)} of {findings.n_examples} validation examples"
        for name, one in entries.items()
        if one is not None and not one.fully
    ]
    if partly:
        yield Sign(
            f"{' and '.join(partly)}: ".capitalize()
            + ("its score is an estimate." if len(partly) == 1 else "both scores are estimates."),
            "Run it with `confirm=True`, which measures winner and baseline on the whole validation set.",
        )
    if equal := rivals(findings):
        measurable = not all(one.fully for one in (best, *equal))
        more = f", or tell them apart with a larger `{findings.stopped_by or 'max_calls'}`" * measurable
        number = counted(len(equal), "configuration")
        yield Sign(
            f"The top is flat: {number} cannot be distinguished from the winner.",
            f"Take the shortest or cheapest of these{more}.",
        )
    if is_lucky(best):
        expected = f"{score(best.posterior_mean)} ± {score(best.posterior_std)}"
        yield Sign(
            f"Risk of overfitting: the winner scored {score(best.mean)} on the "
            f"{counted(n_scores, 'example')} that it was measured on, but on many new ones the model expects "
            f"only {expected}; some of its score may be luck."
        )


def is_lucky(measured: Measured) -> bool:
    """Whether a configuration's score is more than a standard deviation above the model's estimate."""
    return measured.mean - measured.posterior_mean > max(measured.posterior_std, 1e-9)


def _about_the_gain(findings: Findings) -> Iterator[Sign]:
    best = winner(findings)
    if best is not None and best.params == findings.baseline_params:
        yield Sign(
            "No configuration better than the baseline was found, so the baseline is the winner.",
            "Give it other candidates: more of them (`num_candidates`), a stronger `prompt_model`, or a "
            "better instruction of your own to start from.",
        )
    chance = chance_of_gain(findings)
    if chance is not None and chance < _SURE:
        yield Sign(
            f"The gain may be chance: the winner is better with a probability of only {percent(chance)}.",
            "Compare winner and baseline on examples that the search has not seen.",
        )


def _about_the_examples(findings: Findings) -> Iterator[Sign]:
    if findings.n_examples < _FEW_EXAMPLES:
        yield Sign(
            f"The validation set has only {counted(findings.n_examples, 'example')}: the best configuration "
            "on it may not be the best on others.",
            "Add validation examples: it takes a hundred or more to distinguish small gains from chance.",
        )
    scores = {score for m in findings.configurations for score in m.scores.values()}
    if len(scores) == 1:
        yield Sign(
            f"Every score is {unit(findings)(scores.pop())}: the metric does not distinguish configurations.",
            "Check the metric, or give it finer steps.",
        )
    hard, seen = len(never_solved(findings)), len(example_scores(findings))
    if 2 * hard > seen:
        yield Sign(
            f"No configuration solves {hard} of {seen} examples: the candidates may all lack something.",
            "Look at the examples that no configuration solves.",
        )


def _about_the_texts(findings: Findings) -> Iterator[Sign]:
    if texts_are_chance(findings):
        yield Sign(
            "The embeddings explain no more than chance: assigned to the candidates at random, "
            f"they explain the scores as well in {percent(findings.text_chance or 0.0)} of cases.",
            "Try another embedder, or `embedder='index'`, which ignores the texts.",
        )
