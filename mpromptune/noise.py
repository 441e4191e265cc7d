r"""How noisy a trial's mean score is: variance components of per-example scores.

Notation
    y_ce    score of configuration c on example e
    m, n    configurations measured on a block, examples in the block
    \sigma_b^2, \sigma_e^2   variance of the examples' difficulty, and of what is left over
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mpromptune.embedding import FloatArray

Measurement = tuple[tuple[int, ...], FloatArray]  # examples, their scores

# NOTE: pseudo degrees of freedom of the prior. Twenty is two blocks of ten: the data take over
# within the first round or two. Half of the variance being difficulty is the middle of what the
# recorded tables show (effective sample size of shared blocks 1.7 to 5.7 times larger).
_PRIOR_DF = 20.0
_PRIOR_DIFFICULTY_SHARE = 0.5
# NOTE: smallest variance of one score, relative to the spread of the trials' values: keeps the
# covariance matrix regular when every score of a run is the same.
_FLOOR = 1e-4


@dataclass(frozen=True)
class VarianceComponents:
    r"""Variances of a single score: :math:`\sigma_b^2` of difficulty, :math:`\sigma_e^2` of the rest."""

    difficulty: float
    residual: float

    @property
    def difficulty_share(self) -> float:
        """Part of the variance that configurations on the same examples share."""
        total = self.difficulty + self.residual
        return self.difficulty / total if total > 0.0 else 0.0


def variance_components(measurements: Sequence[Measurement]) -> VarianceComponents:
    r"""Two-way analysis of variance (configuration + example), pooled over blocks.

    With the sums of squares of a block's :math:`m \times n` scores, :math:`E[SS_e] = (m-1)(n-1)
    \sigma_e^2` and :math:`E[SS_b] = (n-1)(\sigma_e^2 + m \sigma_b^2)` [Searle1992]_; both are
    shrunk to an even split of the pooled within-trial variance.

    .. [Searle1992] S. Searle, G. Casella, C. McCulloch. Variance Components. Wiley, 1992.
    """
    within = pooled_variance([scores for _, scores in measurements])
    residual_prior = (1.0 - _PRIOR_DIFFICULTY_SHARE) * within
    sums = [_sums_of_squares(np.stack(block)) for block in _by_block(measurements).values()]
    ss_residual = sum(s.ss_residual for s in sums) + _PRIOR_DF * residual_prior
    residual = ss_residual / (sum(s.df_residual for s in sums) + _PRIOR_DF)
    excess = sum(s.ss_example - s.df_example * residual for s in sums)
    weight = sum(s.m * s.df_example for s in sums)
    prior_excess = _PRIOR_DF * _PRIOR_DIFFICULTY_SHARE * within
    difficulty = max(excess + prior_excess, 0.0) / (weight + _PRIOR_DF)
    return VarianceComponents(difficulty, residual)


def observation_variances(
    measurements: Sequence[Measurement],
    owners: Sequence[Hashable],
    components: VarianceComponents,
) -> FloatArray:
    """``train_Yvar``: variance of every trial's mean score, difficulty apart.

    The variance of one score is its configuration's own, pooled over the configuration's trials and
    shrunk to that of all: a good configuration of a 0/1 metric is less noisy than a poor one, and a
    block that is all right or all wrong is not taken for certain.

    Args:
        measurements: One per trial.
        owners: The configuration of every trial.
        components: From `variance_components`.
    """
    pooled = pooled_variance([scores for _, scores in measurements])
    samples: dict[Hashable, list[FloatArray]] = defaultdict(list)
    for owner, (_, scores) in zip(owners, measurements, strict=True):
        samples[owner].append(scores)
    own = {owner: _shrunk_variance(trials, pooled) for owner, trials in samples.items()}
    means = np.array([scores.mean() for _, scores in measurements])
    spread = float(means.var())
    rounding = 1e-16 * max(1.0, float(means.mean()) ** 2)  # of equal means over unequal blocks
    floor = _FLOOR * (spread if spread > rounding else 1.0)
    noise_share = 1.0 - components.difficulty_share
    sizes = np.array([len(scores) for _, scores in measurements])
    variances: FloatArray = noise_share * np.array([own[owner] for owner in owners]) / sizes
    return np.maximum(variances, floor)


def pooled_variance(samples: Sequence[FloatArray]) -> float:
    """Variance within samples, pooled over samples; of all scores when no sample has two."""
    df = sum(len(scores) - 1 for scores in samples)
    if not df:
        return float(np.var(np.concatenate(samples)))
    return sum(float(((scores - scores.mean()) ** 2).sum()) for scores in samples) / df


def _shrunk_variance(samples: Sequence[FloatArray], pooled: float) -> float:
    df = sum(len(scores) - 1 for scores in samples)
    return (df * pooled_variance(samples) + _PRIOR_DF * pooled) / (df + _PRIOR_DF)


@dataclass(frozen=True)
class _SumsOfSquares:
    m: int
    ss_example: float
    df_example: int
    ss_residual: float
    df_residual: int


def _sums_of_squares(scores: FloatArray) -> _SumsOfSquares:
    """Of the ``m x n`` scores of one block."""
    m, n = scores.shape
    by_example = scores.mean(axis=0)
    residual = scores - scores.mean(axis=1, keepdims=True) - by_example + scores.mean()
    return _SumsOfSquares(
        m=m,
        ss_example=m * float(((by_example - scores.mean()) ** 2).sum()),
        df_example=n - 1,
        ss_residual=float((residual**2).sum()),
        df_residual=(m - 1) * (n - 1),
    )


def _by_block(measurements: Sequence[Measurement]) -> dict[tuple[int, ...], list[FloatArray]]:
    blocks: dict[tuple[int, ...], list[FloatArray]] = defaultdict(list)
    for examples, scores in measurements:
        blocks[examples].append(scores)
    return blocks
