r"""Statistics of a search: noise, what random choice would find, whether texts say anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

from mpromptune.model.beliefs import Beliefs
from mpromptune.model.embedding import Geometry
from mpromptune.model.space import FloatArray, IndexArray

# NOTE: larger values stand for failures: whatever they are, they leave no digit for the others once these are
# scaled to one deviation. float32, of which some of BoTorch's constants are, ends at 3.4e38.
LARGEST = 1e30
# NOTE: of the integral over normal distributions; its error is below a hundredth of their deviation.
_POINTS, _DEVIATIONS = 400, 5.0
# NOTE: the smallest share that can be told is one in five hundred.
_PERMUTATIONS = 499
# NOTE: fewer candidates can be dealt out in six ways at most, which tells nothing.
_LEAST_CANDIDATES = 4


def pooled_variance(samples: Sequence[FloatArray]) -> float:
    """Variance within samples, pooled over samples; of all scores when no sample has two."""
    df = sum(len(scores) - 1 for scores in samples)
    if not df:
        return float(np.var(np.concatenate(samples)))
    return sum(float(((scores - scores.mean()) ** 2).sum()) for scores in samples) / df


def expected_best(means: FloatArray, stds: FloatArray, draws: int) -> FloatArray:
    r"""Expected maximum of k values drawn from N at random, without replacement.

    .. math:: E_k = \int t \, dP_k(t), \quad P_k(t) = \binom{N}{k}^{-1} e_k(\Phi_1(t), \dots, \Phi_N(t))

    with :math:`\Phi_i` the distribution of value i, by itself :math:`N(\mu_i, \sigma_i^2)`, and
    :math:`e_k` the elementary symmetric polynomial: the mean, over all sets of k, of the probability
    that none of them exceeds t. Where all deviations are 0 the result is exact:
    :math:`\sum_i \binom{i - 1}{k - 1} v_{(i)} / \binom{N}{k}` of the sorted values.

    Args:
        means: :math:`\mu`, length N.
        stds: :math:`\sigma`, length N.
        draws: The largest k; at most N.

    Returns:
        For k = 1, ..., ``draws``.
    """
    exact = not stds.any()
    low, high = (means - _DEVIATIONS * stds).min(), (means + _DEVIATIONS * stds).max()
    points = np.sort(means) if exact else np.linspace(low, high, _POINTS)
    # P_k, one value after the other: of the sets of k among the first i, i - k in i lack the i-th.
    k = np.arange(1, draws + 1)[:, None]
    below = np.zeros((draws + 1, len(points)))
    below[0] = 1.0
    for i, (mean, std) in enumerate(zip(means, stds, strict=True), start=1):
        distribution = ndtr((points - mean) / std) if std else points >= mean
        below[1:] = (np.maximum(i - k, 0) * below[1:] + k * distribution * below[:-1]) / i
    steps = below[1:, :-1] if exact else (below[1:, :-1] + below[1:, 1:]) / 2
    best: FloatArray = points[-1] - steps @ np.diff(points)
    return best


def chance_of_likeness(beliefs: Beliefs, geometries: Sequence[Geometry], seed: int = 0) -> float | None:
    r"""Share of random assignments of embeddings to candidates that explain as much as the real one.

    A score test of the variance component that texts would add [Lin1997]_, by permutation: the
    statistic of a component c is

    .. math:: Q_c = v_c^T S_c v_c, \quad v_c = Z_c^T K^{-1} \hat u,

    with :math:`\hat u` and K the latents of the measured configurations and their prior covariance without
    texts (see `rasch`), :math:`Z_c` a 1 where a latent has a candidate, and :math:`S_c` the similarities of
    candidates by their texts, :math:`\exp(-d^2 / 2)`, 0 on the diagonal. It is large where candidates with
    like texts deviate alike. Those of the components are added up in units of their standard deviations under
    permutation. Only candidates that were measured take part, and only a view that comes from the embedder.

    Args:
        beliefs: Fitted to the scores.
        geometries: Of the components, with their texts.
        seed: Of the permutations.

    Returns:
        Near 0 where texts that are alike score alike; anything up to 1 where they say nothing. None
        where no component has four measured candidates with texts that differ.

    .. [Lin1997] X. Lin. Variance component testing in generalised linear models with random effects.
        Biometrika 84(2), 1997.
    """
    blind = beliefs.without_likeness()
    weights = blind.split(blind.posterior.weights)
    rng = np.random.default_rng(seed)
    parts = [
        _permuted(rows[:, c], own, geometries[c], rng)
        for group, rows, own in zip(beliefs.groups, blind.rows, weights, strict=True)
        for c in group.components
        if geometries[c].has_text and len(set(rows[:, c].tolist())) >= _LEAST_CANDIDATES
    ]
    if not parts:
        return None
    total = np.sum(parts, axis=0)
    return float(np.mean(total >= total[0]))


def _permuted(
    chosen: IndexArray, weights: FloatArray, geometry: Geometry, rng: np.random.Generator
) -> FloatArray:
    """The statistic as it is, and then under each permutation; in units of their deviation."""
    measured, places = np.unique(chosen, return_inverse=True)
    v = np.bincount(places, weights)
    similar = np.exp(-geometry.views[0].cpu().numpy()[np.ix_(measured, measured)] / 2.0)
    np.fill_diagonal(similar, 0.0)
    dealt = np.stack([v, *(rng.permutation(v) for _ in range(_PERMUTATIONS))])
    statistics: FloatArray = np.einsum("pi,ij,pj->p", dealt, similar, dealt, optimize=True)
    statistics -= statistics[1:].mean()
    scale = float(statistics[1:].std())
    return statistics / scale if scale > 0.0 else statistics
