"""The posterior of all configurations of a space given scores by example: a Rasch model of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import block_diag
from scipy.special import ndtr

from mpromptune.model import rasch
from mpromptune.model.embedding import Geometry
from mpromptune.model.likelihood import likelihood_of
from mpromptune.model.lineage import gains_between
from mpromptune.model.rasch import Posterior
from mpromptune.model.skills import Option, groups_of
from mpromptune.model.space import Birth, FloatArray, Gain, IndexArray, IndexSpace, Row

# NOTE: most pairs of candidates of a predictor that have one latent each; it bounds the work.
_MAX_LATENTS = 4096
# NOTE: hyper-parameters are chosen again when the number of scores has grown by this factor.
_GROWTH = 1.5
# NOTE: in additive models, the prior standard deviation, in logits, of a configuration's skill from the sum
# of its latents, because the stages of a pipeline interact. Only the configuration's own scores inform it, so
# it matters for the few configurations that are measured often.
_INTERACTION = 0.3
# Number of configurations whose estimates are computed at once.
_CHUNK = 256


@dataclass(frozen=True)
class Latents:
    """A selection of latents.

    Attributes:
        rows: ``n x C`` rows for each group, distinct in the columns of its components; others are ignored.
        posterior: Posterior of all of them, one group after another.
    """

    rows: tuple[IndexArray, ...]
    posterior: Posterior

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Split values of all latents, ``L x ...``, by group."""
        return np.split(values, np.cumsum([len(rows) for rows in self.rows])[:-1])


class Beliefs:
    """Posterior skills of the configurations of a space.

    Args:
        space: The configurations.
        geometries: Distances between the candidates of its components.
    """

    def __init__(self, space: IndexSpace, geometries: Sequence[Geometry]) -> None:
        is_product = space.combinations is None
        self.groups = groups_of(geometries, space.births, _MAX_LATENTS, is_product)
        self.space = space
        self._options = [group.options()[1] for group in self.groups]
        self._refit = 0.0
        self._measured: Latents | None = None

    @property
    def is_additive(self) -> bool:
        """Whether the skill of a configuration is a sum of several latents."""
        return len(self.groups) > 1

    @property
    def posterior(self) -> Posterior:
        """The posterior of the latents of measured configurations."""
        return self._known.posterior

    @property
    def _known(self) -> Latents:
        assert self._measured is not None  # scores were told before
        return self._measured

    def tell(self, rows: Sequence[Row], scores: FloatArray) -> None:
        """Fit to all scores so far.

        Args:
            rows: The m measured configurations.
            scores: ``m x N``; NaN where a configuration was not measured.
        """
        wanted = np.array(rows, dtype=np.int64)
        own = [wanted[:, list(group.components)] for group in self.groups]
        distinct = tuple(wanted[np.unique(part, axis=0, return_index=True)[1]] for part in own)
        design, start = self.design(distinct, wanted), None
        if self._measured is not None:  # start from the last fit, which a few more scores change little
            names, last = self._names(self._measured.rows), self._measured.posterior
            means = dict(zip(names, last.mean.tolist(), strict=True))
            start = np.array([means.get(name, 0.0) for name in self._names(distinct)]), last.difficulty
        prior, centre = self._covariance(distinct, self._options), self._centre(distinct)
        best = rasch.fit(design, scores, prior, likelihood_of(scores), start, centre)
        number = int(np.isfinite(scores).sum())
        if number >= self._refit:
            self._refit = _GROWTH * number
            best = self._choose(distinct, design, scores, best)
        self._measured, self._data = Latents(distinct, best), (design, scores)
        if self.is_additive:
            beside = np.stack(best.own(design, scores, _INTERACTION), axis=1)
            self._own = dict(zip(rows, beside.tolist(), strict=True))

    def _choose(
        self, distinct: tuple[IndexArray, ...], design: FloatArray, scores: FloatArray, best: Posterior
    ) -> Posterior:
        """Maximise the evidence of the hyper-parameters, one group after another."""
        for g, group in enumerate(self.groups):
            for option in group.options():
                options = [*self._options[:g], option, *self._options[g + 1 :]]
                prior, start = self._covariance(distinct, options), (best.mean, best.difficulty)
                found = rasch.fit(design, scores, prior, best.likelihood, start, self._centre(distinct))
                gain = option.log_prior - self._options[g].log_prior
                if found.log_evidence + gain > best.log_evidence:
                    self._options, best = options, found
        return best

    def _covariance(self, rows: Sequence[IndexArray], options: Sequence[Option]) -> FloatArray:
        """Prior covariance of latents; latents of different groups are independent."""
        blocks = [g.covariance(r, o) for g, r, o in zip(self.groups, rows, options, strict=True)]
        covariance: FloatArray = block_diag(*blocks)
        return covariance

    def _centre(self, rows: Sequence[IndexArray]) -> FloatArray:
        """Prior means of latents."""
        return np.concatenate([group.centre(some) for group, some in zip(self.groups, rows, strict=True)])

    def _names(self, rows: Sequence[IndexArray]) -> list[tuple[int, ...]]:
        """The group and the candidates of each latent."""
        return [
            (g, *own)
            for g, (group, part) in enumerate(zip(self.groups, rows, strict=True))
            for own in part[:, list(group.components)].tolist()
        ]

    def design(self, latents: Sequence[IndexArray], rows: IndexArray) -> FloatArray:
        """Z of configurations: ``k x C`` rows to ``k x L``, with a 1 for each of their latents."""
        place = {name: i for i, name in enumerate(self._names(latents))}
        design = np.zeros((len(rows), len(place)))
        owners = np.tile(np.arange(len(rows)), len(self.groups))
        design[owners, [place[name] for name in self._names([rows] * len(self.groups))]] = 1.0
        return design

    def latents(self, others: Sequence[IndexArray]) -> Latents:
        """The measured latents and others.

        Args:
            others: ``n x C`` rows for each group.
        """
        rows: list[IndexArray] = []
        where, offset = [], 0
        for group, measured, more in zip(self.groups, self._known.rows, others, strict=True):
            both = np.concatenate([measured, more])
            _, first = np.unique(both[:, list(group.components)], axis=0, return_index=True)
            rows.append(both[np.sort(first)])  # the measured ones come first, in their order
            where.append(offset + np.arange(len(measured)))
            offset += len(first)
        covariance = self._covariance(rows, self._options)
        posterior = self.posterior.extended(covariance, np.concatenate(where), self._centre(rows))
        return Latents(tuple(rows), posterior)

    def skills(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and variance of the skills of any configurations."""
        chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        means, variances = zip(*(self._combined(chunk, np.eye(len(chunk))) for chunk in chunks), strict=True)
        return np.concatenate(means), np.concatenate(variances)

    def _combined(self, rows: Sequence[Row], weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Means and variances of j weighted sums of skills; weights are ``j x k``."""
        wanted = np.array(rows, dtype=np.int64)
        latents = self.latents([wanted] * len(self.groups))
        design = weights @ self.design(latents.rows, wanted)
        mean, variance = design @ latents.posterior.mean, latents.posterior.variance(design)
        if self.is_additive:  # add the deviation of each configuration from the sum of its latents
            own = np.array([self._own.get(tuple(row), (0.0, _INTERACTION**2)) for row in rows])
            mean, variance = mean + weights @ own[:, 0], variance + weights**2 @ own[:, 1]
        return mean, variance

    def estimates(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of mean scores over all examples."""
        means, variances = self.skills(rows)
        deviations = np.sqrt(variances)
        score = self.posterior.score
        return score(means), np.abs(score(means + deviations) - score(means - deviations)) / 2.0

    def chance_of_gain(self, row: Row, other: Row) -> float:
        """Posterior probability that the skill of ``row`` is above that of ``other``."""
        (mean,), (variance,) = self._combined([row, other], np.array([[1.0, -1.0]]))
        return float(ndtr(mean / np.sqrt(variance))) if variance else 0.5

    def gains(self) -> dict[tuple[int, str], Gain]:
        r"""Posterior of the gain of each proposer in each group, by number of the group and name.

        With :math:`c` the prior covariance of a gain and the latents, its mean changes by
        :math:`c^T K^{-1} (u - m)` and its variance by :math:`c^T K^{-1} (\Sigma - K) K^{-1} c`.
        """
        known, found = self._known, {}
        covariance = self._covariance(known.rows, self._options)
        for g, (group, rows) in enumerate(zip(self.groups, known.rows, strict=True)):
            for name, gain in {birth.proposer: birth.gain for birth in group.births}.items():
                own = group.paths(rows) @ gains_between(group.births, [Birth(name, gain=gain)])[:, 0]
                parts = [np.zeros(len(some)) for some in known.rows]
                parts[g] = own
                c = np.concatenate(parts)
                solved: FloatArray = np.linalg.solve(covariance, c).astype(np.float64)
                change = float(known.posterior.variance(solved[None])[0] - c @ solved)
                mean = gain.mean + float(c @ known.posterior.weights)
                found[g, name] = Gain(mean, float(np.sqrt(gain.deviation**2 + change)))
        return found

    def without_similarity(self) -> Latents:
        """The measured latents under a prior without similarities between candidates."""
        design, scores = self._data
        options = [option._replace(share=0.0) for option in self._options]
        rows, likelihood = self._known.rows, self.posterior.likelihood
        prior, centre = self._covariance(rows, options), self._centre(rows)
        return Latents(rows, rasch.fit(design, scores, prior, likelihood, centre=centre))
