r"""Prior skills of candidates that are proposed during a search: a child is its parent plus a difference.

Notation
    o       proposer of a child
    g_o     mean gain of the children of o over their parents, in logits
    e       a child's own deviation

Model
    .. math:: \theta_{child} = \theta_{parent} + g_o + e, \quad g_o \sim N(m_o, t_o^2), \quad e \sim N(0, s^2)

The gains of different proposers are correlated, because they write for the same task. A child without a
parent is like a further initial candidate: a new skill with the same prior, plus :math:`g_o`. All of these
are latents of one normal prior, so the scores of every child teach the gain of its proposer, and a child
that is not written yet has a predictive distribution like any other configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpromptune.model.space import UNKNOWN, Birth, FloatArray, Gain, IndexArray

# NOTE: s, in logits: what the simulated writers of `benchmarks.proposals` have. Prompts of the recorded
# tables differ by 0.3 to 1.5.
OWN = 0.4
# NOTE: correlation of the gains of two proposers. It was reasoned, not tuned: half of a gain is the task (how
# much better can a text be at all?), half is the way of writing.
ALIKE = 0.5
# NOTE: deviation, in logits, of a child's gain beside one candidate of the other component (an instruction
# beside a demo set) from its mean gain: small compared with `OWN`, because it is the same text.
BESIDE = 0.2


@dataclass(frozen=True)
class Lineage:
    """The candidates of one component.

    Attributes:
        initial: Number of candidates before the search.
        births: The candidates proposed since, in order; the list grows with the search.
    """

    initial: int
    births: Sequence[Birth]

    def roots(self, candidates: IndexArray) -> IndexArray:
        """The initial candidates that these descend from; one without a parent is its own root."""
        roots = list(range(self.initial + len(self.births)))
        for index, birth in enumerate(self.births, self.initial):
            if birth.parent is not None:
                roots[index] = roots[birth.parent]
        return np.array(roots, dtype=np.int64)[candidates]

    def paths(self) -> FloatArray:
        """Candidates x births: 1 for the birth of the candidate and those of its ancestors."""
        paths = np.zeros((self.initial + len(self.births), len(self.births)))
        for k, birth in enumerate(self.births):
            if birth.parent is not None:
                paths[self.initial + k] = paths[birth.parent]
            paths[self.initial + k, k] = 1.0
        return paths


def means_of(births: Sequence[Birth]) -> FloatArray:
    """Prior means of the differences between children and their parents, length K."""
    return np.array([birth.gain.mean for birth in births], dtype=np.float64)


def covariance_of(births: Sequence[Birth]) -> FloatArray:
    """Prior covariance of the differences between children and their parents, ``K x K``."""
    own = [OWN**2 if birth.parent is not None else 0.0 for birth in births]
    return gains_between(births, births) + np.diag(own)


def gains_between(births: Sequence[Birth], others: Sequence[Birth]) -> FloatArray:
    """Prior covariance of the gains of the proposers of two lists of births."""
    mine, theirs = ([birth.gain.deviation for birth in some] for some in (births, others))
    names, other_names = (np.array([birth.proposer for birth in some]) for some in (births, others))
    same = names[:, None] == other_names
    covariance: FloatArray = np.outer(mine, theirs) * (ALIKE + (1.0 - ALIKE) * same)
    return covariance


def average(gains: Sequence[Gain]) -> Gain:
    """One gain for those of several predictors."""
    means, variances = zip(*((gain.mean, gain.deviation**2) for gain in gains), strict=True)
    return Gain(sum(means) / len(means), (sum(variances) / len(variances)) ** 0.5)


def for_another_search(gain: Gain) -> Gain:
    """The prior of a proposer's gain in another search, whose task may be another one."""
    variance = gain.deviation**2 + (1.0 - ALIKE) * UNKNOWN.deviation**2
    return Gain(gain.mean, min(variance**0.5, UNKNOWN.deviation))
