"""What a search has to decide by: the scores that came in, and the posterior that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpromptune.engine.scores import ScoreTable
from mpromptune.model.allocation import gains, propose
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.space import FloatArray, Row
from mpromptune.model.statistics import LARGEST, chance_of_likeness, pooled_variance
from mpromptune.sampling.encoding import Encoding

# NOTE: the standard normal quantile of 97.5 %: the posterior of a mean score is normal.
QUANTILE = 1.959964
# NOTE: the expected best of a few of so many differs from that of all by less than can be drawn.
_DRAWN = 500


@dataclass
class Evidence:
    """The table of scores, and the model of all of them.

    Attributes:
        encoding: Configurations as the model sees them.
        table: The scores.
        min_cold_start: Configurations measured before the model chooses any.
        ranking: Measured configurations by posterior mean, as they were last ranked.
    """

    encoding: Encoding
    table: ScoreTable
    min_cold_start: int = 1

    def __post_init__(self) -> None:
        self._beliefs = Beliefs(self.encoding.space, self.encoding.geometries)
        self._told = 0
        self._information: FloatArray | None = None
        self._range = (-math.inf, math.inf)  # of all scores: nothing beyond them is foreseen
        self.ranking: list[Row] = []

    @property
    def is_additive(self) -> bool:
        """Whether a configuration's skill is a sum, of which every trial tells a part."""
        return self._beliefs.is_additive

    @property
    def is_fitted(self) -> bool:
        """Whether the model knows all that was told."""
        return self._told == self.table.calls > 0

    def _model(self) -> Beliefs | None:
        """Fitted again only when another score has been told; None before the first."""
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

        What was not measured is foreseen, within the range of all scores so far; not a number where nothing
        was measured.
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
        """Configurations by their posterior means, the highest first."""
        if not rows:
            return []
        self.ranking = [rows[i] for i in np.argsort(-self.posterior(rows)[0], kind="stable")]
        return self.ranking

    def propose(
        self, n: int, calls_left: int, is_open: Callable[[Row], bool], rng: np.random.Generator
    ) -> list[Row]:
        """Configurations for the ``n`` places of a batch; those never asked for, before there is a model."""
        model = self._model()
        rows: list[Row] = []
        if model is not None and len(self.table.rows) >= self.min_cold_start:
            rows = propose(model, n, calls_left, is_open, rng)
        if not rows:
            sample = map(tuple, rng.permutation(self.encoding.space.sample(_DRAWN, rng)).tolist())
            open_ = [row for row in sample if is_open(row)]
            rows = sorted(open_, key=self.table.started.__contains__)[:n]
        return rows

    def information(self) -> FloatArray | None:
        """What a score on each example says about the leader; None before there is any score."""
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
        """The most that is expected from any open configuration over ``leader``; infinite unfitted."""
        model = self._model()
        if model is None:
            return math.inf
        return gains(model, leader, is_open, np.random.default_rng(self.table.batches))

    def standard_error(self, n_examples: int) -> float:
        """Of a configuration's mean over a whole validation set."""
        scores = [np.array(list(self.table.means(row).values())) for row in self.table.rows]
        cut = [np.clip(some, -LARGEST, LARGEST) for some in scores]
        return float(np.sqrt(pooled_variance(cut) / n_examples))

    def drawn(self) -> FloatArray:
        """Posterior means and standard deviations of configurations drawn at random, ``m x 2``."""
        rows = self.encoding.space.sample(_DRAWN, np.random.default_rng(0))
        pairs: FloatArray = np.stack(self.posterior([tuple(row) for row in rows.tolist()]), axis=1)
        return pairs

    def text_chance(self) -> float | None:
        """How easily chance explains as much as the embeddings do; None where there are none."""
        model = self._model()
        if model is None or not any(geometry.has_text for geometry in self.encoding.geometries):
            return None
        return chance_of_likeness(model, self.encoding.geometries)
