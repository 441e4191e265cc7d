r"""Prior skills of candidates that are proposed during a search: a child is its parent plus a difference.

Notation
    o       proposer of a child
    g_o     mean gain of the children of o over their parents, in logits
    e       a child's own deviation

Model
    .. math:: \theta_{child} = \theta_{parent} + g_o + e, \quad g_o \sim N(m, t^2), \quad e \sim N(0, s^2)

The gains of different proposers are correlated, because they write for the same task. A child without a
parent is like a further initial candidate: a new skill with the same prior, plus :math:`g_o`. All of these
are latents of one normal prior, so the scores of every child teach the gain of its proposer, and a child
that is not written yet has a predictive distribution like any other configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpromptune.model.space import Birth, FloatArray, IndexArray

GAIN_MEAN = 0.0
GAIN_DEVIATION = 0.5
OWN = 0.4
ALIKE = 0.5
# NOTE: deviation, in logits, of a child's gain beside one candidate of the other component (an instruction
# beside a demo set) from its mean gain: small compared with OWN, because it is the same text.
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


def covariance_of_gains(births: Sequence[Birth]) -> FloatArray:
    """Prior covariance of the differences between children and parents, including their own deviations."""
    names = np.array([birth.proposer for birth in births])
    same = names[:, None] == names[None, :]
    own = np.array([OWN**2 if birth.parent is not None else 0.0 for birth in births])
    covariance: FloatArray = GAIN_DEVIATION**2 * (ALIKE + (1.0 - ALIKE) * same) + np.diag(own)
    return covariance
