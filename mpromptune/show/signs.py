"""Reasons to doubt a result, and what to do about them, as sentences."""

from __future__ import annotations

from collections.abc import Iterator

from mpromptune.show.analysis import example_scores, gain, is_share, never_solved, rivals, unit, winner
from mpromptune.storage.findings import Findings, Measured
from mpromptune.storage.record import read_record

# NOTE: with fewer examples, the standard error of a fraction of right answers may exceed 0.09.
_FEW_EXAMPLES = 30
# NOTE: in standard errors; chance exceeds this about once in twenty times.
_CLEAR = 2.0
# NOTE: uninformative embeddings get this warning four times in five; artificial embeddings that determine the
# scores, and those of the recorded GSM8K prompts, had p-values of at most 0.1.
_LIKELY_CHANCE = 0.2

Sign = tuple[str, str]  # the reason, and the advice; either may be empty


def warning_signs(findings: Findings) -> list[str]:
    """Reasons to doubt the result, one sentence each."""
    return [noticed for noticed, _ in _signs(findings)]


def next_steps(findings: Findings) -> list[str]:
    """The next steps, most urgent first."""
    advised = dict.fromkeys(advice for _, advice in _signs(findings) if advice)
    last = "Measure the program on a test set: on the examples by which it was chosen, "
    return [*advised, f"{last}the score of the best of many is a little too high."]


def _signs(findings: Findings) -> Iterator[Sign]:
    yield from _about_the_search(findings)
    best = winner(findings)
    if best is not None:
        yield from _about_the_winner(findings, best)
        yield from _about_the_gain(findings)
    yield from _about_the_examples(findings)
    chance = findings.text_chance
    if chance is not None and chance > _LIKELY_CHANCE:
        yield (
            "The embeddings explain no more than chance: assigned to the candidates at random, "
            f"they explain the scores as well in {100 * chance:.0f} % of cases.",
            "Try another embedder, or embedder='index', which ignores the texts.",
        )


def _about_the_search(findings: Findings) -> Iterator[Sign]:
    if findings.stopped_by is not None:
        yield (
            f"The search was ended by {findings.stopped_by} before it had made all its calls.",
            f"Raise {findings.stopped_by}; with storage= the same call continues the search.",
        )
    record = read_record(findings.study)
    if running := sum(recorded.is_open for recorded in record):
        yield f"The search has not ended; open trials: {running}.", "Wait, or continue it."
    measured = (r for r in record if not r.is_open and (r.proposal is None or r.proposal.refused is None))
    cut = sum(len(r.scores) < len(r.examples or ()) for r in measured)
    if cut:
        yield f"Trials that failed or were cut short: {cut}; their scores count.", ""
    if len(findings.configurations) == 1:
        yield (
            "Only one configuration was measured, so there is nothing to compare it with.",
            "Give the search more candidates or more calls (num_candidates, max_calls).",
        )


def _about_the_winner(findings: Findings, best: Measured) -> Iterator[Sign]:
    measured, score = f"{len(best.scores)} of {findings.n_examples} validation examples", unit(findings)
    if best.fully and len(best.scores) < findings.n_examples:
        yield f"Scores are means over {measured}: no configuration could be measured on the others.", ""
    elif len(best.scores) < findings.n_examples:
        yield (
            f"The winner was measured on {measured}: its score is an estimate.",
            "Run it with confirm=True, which measures winner and baseline on the whole validation set.",
        )
    equal = len(rivals(findings))
    if equal:
        yield (
            f"The top is flat: {_count(equal, 'configuration')} cannot be distinguished from the winner (the "
            "difference is within one standard deviation).",
            "Of the configurations that are as good as the winner, prefer the shortest or cheapest.",
        )
    if is_lucky(best):
        expected = f"{score(best.posterior_mean)} ± {score(best.posterior_std)}"
        yield (
            f"Risk of overfitting: the winner scored {score(best.mean)}, but the model expects only "
            f"{expected} of it; some of its score may be luck.",
            "",
        )


def is_lucky(measured: Measured) -> bool:
    """Whether a configuration's score is more than a standard deviation above the model's estimate."""
    return measured.mean - measured.posterior_mean > max(measured.posterior_std, 1e-9)


def _about_the_gain(findings: Findings) -> Iterator[Sign]:
    if findings.best_params == findings.baseline_params:
        yield (
            "No configuration better than the baseline was found, so the baseline is the winner.",
            "Give it other candidates: more of them (num_candidates), a stronger prompt_model, or a better "
            "instruction of your own to start from.",
        )
    found = gain(findings)
    if found is not None and found[0] < _CLEAR * found[1]:
        factor, points = (100, " points") if is_share(findings) else (1, "")
        yield (
            f"The gain over the baseline, {factor * found[0]:.3g} ± {factor * found[1]:.2g}{points} "
            "(standard error), may be chance.",
            "Compare winner and baseline on examples that the search has not seen.",
        )


def _about_the_examples(findings: Findings) -> Iterator[Sign]:
    if findings.n_examples < _FEW_EXAMPLES:
        yield (
            f"The validation set has only {_count(findings.n_examples, 'example')}: the best configuration "
            "on it may not be the best on others.",
            "Add validation examples: it takes a hundred or more to distinguish small gains from chance.",
        )
    scores = {score for m in findings.configurations for score in m.scores.values()}
    if len(scores) == 1:
        yield (
            f"Every score is {unit(findings)(scores.pop())}: the metric does not distinguish configurations.",
            "Check the metric, or give it finer steps.",
        )
    hard, seen = len(never_solved(findings)), len(example_scores(findings))
    if 2 * hard > seen:
        yield (
            f"No configuration solves {hard} of {seen} examples: the candidates may all lack something.",
            "Look at the examples that no configuration solves.",
        )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
