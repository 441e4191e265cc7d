"""How candidates were written during a search: the descent of the winner, and the proposers, for reports."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from statistics import variance
from typing import NamedTuple

from mpromptune.execution.usage import Usage
from mpromptune.model.space import Candidate, Gain
from mpromptune.show.analysis import winner
from mpromptune.show.progress import QUANTILE
from mpromptune.show.words import candidate_name, points, title, unit
from mpromptune.storage.findings import Findings

# Numbers and quotations, in which refusals for the same reason differ.
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*\d|\d")
# Most characters of a reason, and most reasons of a proposer.
_REASON, _REASONS = 120, 3
# Fewest scores whose variance is worth a sentence.
_FEW = 5


class Descent(NamedTuple):
    """How the winner's candidate of one component was written.

    Attributes:
        title: The component.
        names: The candidate at the beginning, if it was made from one, and each that was written.
        proposers: Who wrote each of these.
        usage: What all of it took.
        texts: Those of ``names``; empty if they are not known.
    """

    title: str
    names: list[str]
    proposers: list[str]
    usage: Usage
    texts: list[Candidate]


class Proposed(NamedTuple):
    """What a proposer has written.

    Attributes:
        name: Its name.
        asked: Number of proposals.
        reasons: Why candidates were refused, with their numbers; the most frequent reasons first.
        usage: What all of it took.
        gain: Posterior of the mean gain of its candidates over their parents, in logits, if known.
    """

    name: str
    asked: int
    reasons: Mapping[str, int]
    usage: Usage
    gain: Gain | None

    @property
    def refused(self) -> int:
        """Number of refused candidates."""
        return sum(self.reasons.values())

    @property
    def interval(self) -> str:
        """The mean gain and its 95 % credible interval."""
        if self.gain is None:
            return "not known"
        margin = QUANTILE * self.gain.deviation
        return f"{self.gain.mean:+.2f} ({self.gain.mean - margin:+.2f} to {self.gain.mean + margin:+.2f})"

    @property
    def main_reasons(self) -> str:
        """The most frequent reasons with their numbers."""
        return "; ".join(f"{n} times: {reason}" for reason, n in [*self.reasons.items()][:_REASONS])


def descents(findings: Findings) -> list[Descent]:
    """The descent of each candidate of the winner that was written during the search."""
    found = (descent(findings, component) for component in findings.best_params)
    return [one for one in found if one is not None]


def descent(findings: Findings, component: str) -> Descent | None:
    """The descent of the winner's candidate of a component; None if it was written before the search."""
    chain = findings.lineage(component, findings.best_params[component])
    if not chain:
        return None
    places = [i for i in (chain[0].source, *(one.index for one in chain)) if i is not None]
    known = () if findings.space is None else findings.space.components[component]
    return Descent(
        title(findings, component),
        [candidate_name(findings, component, i) for i in places],
        [one.proposer for one in chain],
        sum((one.usage for one in chain), Usage()),
        [known[i] for i in places if i < len(known)],
    )


def by_proposer(findings: Findings) -> list[Proposed]:
    """What each proposer has written, in the order in which they were first asked."""
    found = []
    for name in dict.fromkeys(one.proposer for one in findings.proposals):
        own = [one for one in findings.proposals if one.proposer == name]
        reasons = Counter(_reason(one.refused) for one in own if one.refused is not None)
        usage = sum((one.usage for one in own), Usage())
        gain = findings.gains.get(name) if any(one.written is not None for one in own) else None
        found.append(Proposed(name, len(own), dict(reasons.most_common()), usage, gain))
    return found


def _reason(refused: str) -> str:
    """A refusal without what is particular to it."""
    said = " ".join(_PARTICULAR.sub("…", refused.removeprefix("ProposalRefusedError: ")).split())
    return said if len(said) <= _REASON else f"{said[:_REASON]}…"


def shares(findings: Findings) -> str:
    """What the winner's scores on visible and on hidden examples say; empty if one of them is not known."""
    visible, hidden, best = findings.visible_score, findings.hidden_score, winner(findings)
    if math.isnan(visible + hidden) or best is None:
        return ""
    say, scores = unit(findings), list(best.scores.values())
    text = f"On the examples that proposers may see, it scores {say(visible)}, on hidden ones {say(hidden)}"
    if len(scores) < _FEW or variance(scores) == 0:
        return f"{text}."
    n = len(best.scores.keys() & findings.visible)
    margin = QUANTILE * math.sqrt(variance(scores) * (1 / n + 1 / (len(scores) - n)))
    if visible - hidden > margin:
        return f"{text}: the written candidates fit the examples that were seen rather than the task."
    return f"{text}. A difference of up to {points(findings, sign='')(margin)} may be chance."
