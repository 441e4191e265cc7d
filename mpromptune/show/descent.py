"""How candidates were written during a search: the descent of the winner, and the proposers, for reports."""

from __future__ import annotations

import math
import re
from collections import Counter
from statistics import variance
from typing import Any, NamedTuple

from mpromptune.execution.usage import Usage
from mpromptune.model.space import Candidate
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


def descents(findings: Findings) -> dict[str, Descent]:
    """The descent of each candidate of the winner that was written during the search, by component."""
    found = {}
    for component, index in findings.best_params.items():
        chain = findings.lineage(component, index)
        if not chain:
            continue
        places = [i for i in (chain[0].source, *(one.index for one in chain)) if i is not None]
        known = () if findings.space is None else findings.space.components[component]
        found[component] = Descent(
            title(findings, component),
            [candidate_name(findings, component, i) for i in places],
            [one.proposer for one in chain],
            sum((one.usage for one in chain), Usage()),
            [known[i] for i in places if i < len(known)],
        )
    return found


def by_proposer(findings: Findings) -> list[dict[str, Any]]:
    """What each proposer has written, in the order in which they were first asked."""
    found = []
    for name in dict.fromkeys(one.proposer for one in findings.proposals):
        own = [one for one in findings.proposals if one.proposer == name]
        reasons = Counter(_reason(one.refused) for one in own if one.refused is not None)
        row = {
            "name": name,
            "asked": len(own),
            "refused": reasons.total(),
            "reasons": "; ".join(f"{n} times: {reason}" for reason, n in reasons.most_common(_REASONS)),
            "gain": "not known",
            "usage": sum((one.usage for one in own), Usage()),
        }
        if name in findings.gains and any(one.written is not None for one in own):
            gain, margin = findings.gains[name].mean, QUANTILE * findings.gains[name].deviation
            row["gain"] = f"{gain:+.2f} ({gain - margin:+.2f} to {gain + margin:+.2f})"
        found.append(row)
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
