"""What scores by example say about every configuration of a space: the Rasch model on its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr

from mpromptune.model import rasch
from mpromptune.model.embedding import FloatArray
from mpromptune.model.geometry import Geometry
from mpromptune.model.likelihood import likelihood_of
from mpromptune.model.rasch import Posterior
from mpromptune.model.skills import Option, groups_of
from mpromptune.model.space import IndexArray, IndexSpace, Row

# NOTE: a bound on the work: pairs of candidates of a predictor that are latents of their own.
_MAX_LATENTS = 4096
# NOTE: hyper-parameters are chosen anew when there are so many times as many scores as at the last time.
_GROWTH = 1.5
# NOTE: where a skill is a sum, the deviation in logits of a configuration from it, which only scores of its
# own tell: stages of a pipeline act together. It decides between the few that are measured often.
_INTERACTION = 0.3
# Configurations whose estimates are computed at once.
_CHUNK = 256


@dataclass(frozen=True)
class Latents:
    """Latents that are looked at.

    Attributes:
        rows: Per group, ``n x C`` distinct rows, of which the columns of its own components count.
        posterior: Of all of them, one group after the other.
    """

    rows: tuple[IndexArray, ...]
    posterior: Posterior

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Values of all latents, ``L x ...``, by group."""
        return np.split(values, np.cumsum([len(rows) for rows in self.rows])[:-1])


class Beliefs:
    """Skills of the configurations of a space, as far as the scores tell them.

    Args:
        space: The configurations.
        geometries: Distances of its components' candidates.
    """

    def __init__(self, space: IndexSpace, geometries: Sequence[Geometry]) -> None:
        self.groups = groups_of(geometries, _MAX_LATENTS, is_product=space.combinations is None)
        self.space = space
        self._options = [group.options()[1] for group in self.groups]
        self._refit = 0.0
        self._measured: Latents | None = None

    @property
    def is_additive(self) -> bool:
        """Whether a configuration's skill is a sum of several latents."""
        return len(self.groups) > 1

    @property
    def posterior(self) -> Posterior:
        """Of the latents of measured configurations."""
        return self._known.posterior

    @property
    def _known(self) -> Latents:
        assert self._measured is not None  # something was told
        return self._measured

    def tell(self, rows: Sequence[Row], scores: FloatArray) -> None:
        """Fits to all scores so far.

        Args:
            rows: The configurations measured, m.
            scores: ``m x N``, not a number where one was not measured.
        """
        distinct, indices = self._distinct(np.array(rows, dtype=np.int64))
        design = rasch.design_of(indices, sum(map(len, distinct)))
        likelihood = likelihood_of(scores)
        start = self._start(distinct)
        best = rasch.fit(design, scores, self._covariance(distinct, self._options), likelihood, start)
        number = int(np.isfinite(scores).sum())
        if number >= self._refit:
            self._refit = _GROWTH * number
            best = self._choose(distinct, design, scores, best)
        self._measured, self._data = Latents(distinct, best), (design, scores)
        if self.is_additive:
            own = np.stack(best.own(design, scores, _INTERACTION), axis=1)
            self._own = dict(zip(rows, own.tolist(), strict=True))

    def _start(self, distinct: Sequence[IndexArray]) -> tuple[FloatArray, FloatArray] | None:
        """Where the last fit ended: few scores more change little."""
        if self._measured is None:
            return None
        known = self._measured.posterior
        means = dict(zip(self._names(self._measured.rows), known.mean.tolist(), strict=True))
        return np.array([means.get(name, 0.0) for name in self._names(distinct)]), known.difficulty

    def _names(self, rows: Sequence[IndexArray]) -> list[tuple[int, ...]]:
        """Each latent's group and candidates."""
        return [
            (g, *own)
            for g, (group, part) in enumerate(zip(self.groups, rows, strict=True))
            for own in part[:, list(group.components)].tolist()
        ]

    def _choose(
        self, distinct: tuple[IndexArray, ...], design: FloatArray, scores: FloatArray, best: Posterior
    ) -> Posterior:
        """Climbs the evidence of the hyper-parameters, one group after the other."""
        for g, group in enumerate(self.groups):
            for option in group.options():
                options = [*self._options[:g], option, *self._options[g + 1 :]]
                covariance = self._covariance(distinct, options)
                found = rasch.fit(design, scores, covariance, best.likelihood, (best.mean, best.difficulty))
                gain = option.log_prior - self._options[g].log_prior
                if found.log_evidence + gain > best.log_evidence:
                    self._options, best = options, found
        return best

    def _distinct(self, rows: IndexArray) -> tuple[tuple[IndexArray, ...], IndexArray]:
        """Latents of ``k x C`` configurations: the distinct ones by group, and each one's, ``k x G``."""
        distinct, indices, offset = [], [], 0
        for group in self.groups:
            own = rows[:, list(group.components)]
            _, first, inverse = np.unique(own, axis=0, return_index=True, return_inverse=True)
            distinct.append(rows[first])
            indices.append(inverse.reshape(-1) + offset)
            offset += len(first)
        return tuple(distinct), np.stack(indices, axis=1)

    def _covariance(self, rows: Sequence[IndexArray], options: Sequence[Option]) -> FloatArray:
        """Prior covariance of latents, of which those of different groups are independent."""
        blocks = [g.covariance(r, r, o) for g, r, o in zip(self.groups, rows, options, strict=True)]
        total = np.zeros((sum(map(len, blocks)),) * 2)
        end = 0
        for block in blocks:
            total[end : end + len(block), end : end + len(block)] = block
            end += len(block)
        return total

    def latents(self, others: Sequence[IndexArray]) -> Latents:
        """The measured latents, and others.

        Args:
            others: Per group, ``n x C`` rows.
        """
        known = self._known
        rows: list[IndexArray] = []
        where, offset = [], 0
        for group, measured, more in zip(self.groups, known.rows, others, strict=True):
            columns = list(group.components)
            both = np.concatenate([measured, more])
            _, first = np.unique(both[:, columns], axis=0, return_index=True)
            kept = np.sort(first)  # the measured ones come first, in their order
            rows.append(both[kept])
            where.append(offset + np.arange(len(measured)))
            offset += len(kept)
        covariance = self._covariance(rows, self._options)
        return Latents(tuple(rows), known.posterior.extended(covariance, np.concatenate(where)))

    def skills(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and variance of the skills of any configurations."""
        chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        means, variances = zip(*map(self._skills, chunks), strict=True)
        return np.concatenate(means), np.concatenate(variances)

    def _skills(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        wanted = np.array(rows, dtype=np.int64)
        latents = self.latents([wanted] * len(self.groups))
        design = rasch.design_of(self.indices(latents, wanted), len(latents.posterior.mean))
        mean, variance = design @ latents.posterior.mean, latents.posterior.variance(design)
        own = np.array([self._own_of(row) for row in rows])
        return mean + own[:, 0], variance + own[:, 1]

    def _own_of(self, row: Row) -> tuple[float, float]:
        """Mean and variance of what a configuration has of its own, beside the sum."""
        return self._own.get(tuple(row), (0.0, _INTERACTION**2)) if self.is_additive else (0.0, 0.0)

    def indices(self, latents: Latents, rows: IndexArray) -> IndexArray:
        """Where the latents of configurations are, ``k x G``."""
        place = {name: i for i, name in enumerate(self._names(latents.rows))}
        owners = self._names([rows] * len(self.groups))
        found = np.array([place[name] for name in owners], dtype=np.int64)
        return found.reshape(len(self.groups), -1).T

    def estimates(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of mean scores over all examples."""
        means, variances = self.skills(rows)
        deviations = np.sqrt(variances)
        score = self.posterior.score
        return score(means), np.abs(score(means + deviations) - score(means - deviations)) / 2.0

    def chance_of_gain(self, row: Row, other: Row) -> float:
        """Posterior probability that the skill of ``row`` is above that of ``other``."""
        wanted = np.array([row, other], dtype=np.int64)
        latents = self.latents([wanted] * len(self.groups))
        first, second = rasch.design_of(self.indices(latents, wanted), len(latents.posterior.mean))
        difference = first - second
        own = [self._own_of(one) for one in (row, other)]
        mean = float(difference @ latents.posterior.mean) + own[0][0] - own[1][0]
        variance = float(latents.posterior.variance(difference[None])[0]) + own[0][1] + own[1][1]
        deviation = np.sqrt(variance)
        return float(ndtr(mean / deviation)) if deviation else 0.5

    def without_likeness(self) -> Latents:
        """The measured latents under a prior in which candidates are only the same or different."""
        design, scores = self._data
        options = [replace(option, share=0.0) for option in self._options]
        covariance = self._covariance(self._known.rows, options)
        return Latents(self._known.rows, rasch.fit(design, scores, covariance, self.posterior.likelihood))
