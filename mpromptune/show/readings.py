"""What each figure of the report says, in sentences."""

from __future__ import annotations

from statistics import fmean

from mpromptune.show import analysis, signs, words
from mpromptune.storage.findings import Findings

# NOTE: largest share of shuffled texts with which a likeness of scores is no longer said to be chance.
_CLEAR = 0.05


# What a figure says of the search, and how to read it.
Reading = tuple[str, str]


def growth(findings: Findings) -> Reading:
    """Of `plots.plot_growth`."""
    steps, random = analysis.growth(findings), analysis.random_in_hindsight(findings)
    first = next(step for step in steps if step.best == steps[-1].best)
    text = (
        "The configuration with the highest estimate was first measured after "
        f"{first.calls} of the {steps[-1].calls} calls of the search."
    )
    if not random:
        return text, ""
    more = words.points(findings, sign="")(steps[-1].best - random[-1])
    text += (
        f" Its estimate is {more} above what the best of as many random configurations would have on average."
        if _is_more(more)
        else " The best of as many random configurations would be as good on average."
    )
    return text, (
        "Dotted: the highest estimate of as many random configurations. Dashed: the highest score of random "
        "configurations that are all measured in full; it contains luck, which estimates do not, and so may "
        "be above them."
    )


def examples(findings: Findings) -> Reading:
    """Of `plots.plot_examples`."""
    hard, of = len(analysis.never_solved(findings)), len(analysis.example_scores(findings))
    if not hard:
        return "The lower a dot, the harder the example.", ""
    text = f"{hard} of {of} examples {'is' if hard == 1 else 'are'} not solved by any configuration."
    return text, "Not solved: no configuration scores above the lowest score of the search."


def leaders(findings: Findings) -> Reading:
    """Of `plots.plot_leaders`."""
    near = len(analysis.rivals(findings))
    if not near:
        return "No other configuration is within one standard deviation of the winner.", ""
    return (
        f"{words.counted(near, 'configuration')} of {len(findings.configurations)} "
        f"{'is' if near == 1 else 'are'} too close to the winner to say which is better: within one "
        "standard deviation.",
        "",
    )


def effects(findings: Findings) -> Reading:
    """Of `plots.plot_effects`."""
    spreads = {}
    for component, candidates in analysis.main_effects(findings).items():
        means = [*map(fmean, candidates.values())]
        spreads[component] = means[0] - means[-1]
    most = max(spreads, key=lambda component: spreads[component])
    points = words.points(findings, sign="")(spreads[most])
    text = "All candidates have nearly the same mean estimate."
    if _is_more(points):
        title = words.title(findings, most)
        text = f"{title} matters most: {points} from its worst candidate to its best."
    return text, "Mean estimate of the configurations that were measured with it."


def similarity(findings: Findings) -> Reading:
    """Of `plots.plot_map`."""
    chance = findings.text_chance
    if chance is None:
        text = "If similar prompts have similar scores, near dots have similar colours."
    else:
        if signs.texts_are_chance(findings):
            text = "The texts do not help to foresee the scores"
        elif chance > _CLEAR:
            text = "Similar prompts seem to have similar scores, but it may be chance"
        else:
            text = "Similar prompts have similar scores"
        text += f": shuffled texts explain the scores as well in {words.percent(chance)} of all trials."
    written = ", of those written before the search" if findings.proposals else ""
    return text, f"The nearer two dots, the more similar the embeddings of their texts{written}."


def _is_more(points: str) -> bool:
    """Whether a difference is positive after rounding."""
    return float(points.split()[0]) > 0
