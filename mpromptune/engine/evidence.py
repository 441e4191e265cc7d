"""The evidence that a search decides by: the scores so far, and the posterior given these scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpromptune.engine.growth import Growth, Offer
from mpromptune.engine.scores import ScoreTable
from mpromptune.model.allocation import largest_gain, propose
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.lineage import average
from mpromptune.model.space import FloatArray, Gain, Row
from mpromptune.model.statistics import LARGEST, chance_of_likeness, pooled_variance
from mpromptune.sampling.encoding import Encoding
from mpromptune.show.progress import QUANTILE

# NOTE: size of random samples of a space: enough for figures, and for the expected best of a few draws.
_DRAWN = 500


@dataclass
class Evidence:
    """The table of scores, and the model fitted to them.

    Attributes:
        encoding: The encoding of configurations for the model.
        table: The scores.
        min_cold_start: Number of measured configurations before the model chooses any.
        growth: Offers further configurations, with candidates that are not written yet.
        ranking: The configurations ranked last, by posterior mean.
    """

    encoding: Encoding
    table: ScoreTable
    min_cold_start: int = 1
    growth: Growth | None = None

    def __post_init__(self) -> None:
        self._beliefs = Beliefs(self.encoding.space, self.encoding.geometries)
        self._told = 0
        self._information: FloatArray | None = None
        self._range = (-math.inf, math.inf)  # of all scores; predictions are clipped to it
        self.ranking: list[Row] = []

    @property
    def is_additive(self) -> bool:
        """Whether the skill of a configuration is modelled as a sum over its candidates."""
        return self._beliefs.is_additive

    @property
    def is_fitted(self) -> bool:
        """Whether the model has been fitted to all scores told so far."""
        return self._told == self.table.calls > 0

    def _model(self) -> Beliefs | None:
        """The model, fitted again if scores have been told since; None before the first score."""
        table = self.table
        if table.calls and not self.is_fitted:
            rows = table.rows
            scores = np.full((len(rows), table.n_examples), np.nan)
            for by_example, row in zip(scores, rows, strict=True):
                means = table.means(row)
                by_example[list(means)] = list(means.values())
            self._beliefs.tell(rows, np.clip(scores, -LARGEST, LARGEST))
            self._told, self._information = table.calls, None
            self._range = float(np.nanmin(scores)), float(np.nanmax(scores))
        return self._beliefs if self._told else None

    def posterior(self, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
        """Posterior means and standard deviations of mean scores."""
        model = self._model()
        if model is None or not rows:  # every trial so far has failed
            return np.zeros(len(rows)), np.ones(len(rows))
        return model.estimates(rows)

    def whole_score(self, row: Row) -> tuple[float, float, float]:
        """Mean score over all examples that can be answered, and its 95 % credible interval.

        Missing scores are predicted, within the range of all scores so far. The result is NaN if the
        configuration has no score.
        """
        known, model = self.table.means(row), self._model()
        if model is None or not known:
            return self.table.mean(row), math.nan, math.nan
        left_out = known.keys() | self.table.unanswerable
        rest = [example for example in range(self.table.n_examples) if example not in left_out]
        means, variances = model.skills([row])
        total, deviation = model.posterior.sum_of(rest, float(means[0]), float(variances[0]))
        n = len(known) + len(rest)
        score, margin = (sum(known.values()) + total) / n, QUANTILE * deviation / n
        low, middle, high = np.clip([score - margin, score, score + margin], *self._range).tolist()
        return middle, low, high

    def best_first(self, rows: Sequence[Row]) -> list[Row]:
        """Configurations by posterior mean, highest first."""
        if not rows:
            return []
        self.ranking = [rows[i] for i in np.argsort(-self.posterior(rows)[0], kind="stable")]
        return self.ranking

    def propose(
        self,
        n: int,
        calls_left: int,
        is_open: Callable[[Row], bool],
        rng: np.random.Generator,
        may_grow: bool = True,
    ) -> list[Row | Offer]:
        """Configurations for the ``n`` blocks of a batch; random ones before there is a model.

        If it ``may_grow``, the space does: there may be one with a candidate that is not written yet.
        """
        model = self._model()
        rows: list[Row | Offer] = []
        if model is not None and len(self.table.rows) >= self.min_cold_start:
            growth = self.growth if may_grow else None
            rows = self._chosen(model, growth, n, calls_left, is_open, rng)
        if not rows:
            sample = map(tuple, rng.permutation(self.encoding.space.sample(_DRAWN, rng)).tolist())
            open_ = [row for row in sample if self.encoding.space.exists(row) and is_open(row)]
            rows = [*sorted(open_, key=self.table.started.__contains__)[:n]]
        return rows

    def _chosen(
        self,
        model: Beliefs,
        growth: Growth | None,
        n: int,
        calls_left: int,
        is_open: Callable[[Row], bool],
        rng: np.random.Generator,
    ) -> list[Row | Offer]:
        if growth is None:
            return list(propose(model, n, calls_left, is_open, rng))
        space = growth.space
        with growth.offered(model, self.table, rng) as offer:
            new = None if offer is None else offer.row(space.sizes[offer.component])
            rows = propose(model, n, calls_left, is_open, rng, new)
        if offer is None or new is None:
            return list(rows)
        # When everything else is measured, the rest of the budget is best spent on a new candidate.
        rows = rows or [new]
        # All blocks of the new candidate are of one configuration, because it is written only once.
        first = next(filter(space.is_next, rows), new)
        return [offer.beside(first) if space.is_next(row) else row for row in rows]

    def information(self) -> FloatArray | None:
        """Information of a score of the leader on each example; None before the first score."""
        model = self._model()
        if model is None:
            return None
        if self._information is None:
            self._information = model.posterior.information(float(model.skills(self.table.rows)[0].max()))
        return self._information

    def chance_of_gain(self, row: Row, other: Row) -> float:
        """Posterior probability that ``row`` is better than ``other``."""
        model = self._model()
        return 0.5 if model is None else model.chance_of_gain(row, other)

    def largest_gain(self, leader: Row, is_open: Callable[[Row], bool]) -> float:
        """Largest expected gain of an open configuration over ``leader``; infinite before the first score."""
        model = self._model()
        if model is None:
            return math.inf
        return largest_gain(model, leader, is_open, np.random.default_rng(self.table.batches))

    def standard_error(self, n_examples: int) -> float:
        """Standard error of a configuration's mean score over ``n_examples`` examples."""
        scores = [np.array(list(self.table.means(row).values())) for row in self.table.rows]
        cut = [np.clip(some, -LARGEST, LARGEST) for some in scores]
        return float(np.sqrt(pooled_variance(cut) / n_examples))

    def gains(self) -> dict[str, Gain]:
        """Posterior of each proposer's mean gain, in logits; the mean over the predictors it wrote for."""
        model = self._model()
        found: dict[str, list[Gain]] = {}
        for (_, name), gain in (model.gains() if model else {}).items():
            found.setdefault(name, []).append(gain)
        return {name: average(gains) for name, gains in found.items()}

    def drawn(self) -> FloatArray:
        """Posterior means and standard deviations of ``m`` random configurations, ``m x 2``."""
        sample = self.encoding.space.sample(_DRAWN, np.random.default_rng(0))
        rows = [tuple(row) for row in sample.tolist() if self.encoding.space.exists(row)]
        pairs: FloatArray = np.stack(self.posterior(rows), axis=1)
        return pairs

    def text_chance(self) -> float | None:
        """The p-value of a test whether the embeddings explain any of the scores; None without them."""
        model = self._model()
        if model is None or not any(geometry.has_text for geometry in self.encoding.geometries):
            return None
        return chance_of_likeness(model, self.encoding.geometries)
