r"""Whether texts that are alike score alike: a permutation test of the embeddings.

Notation
    y, m    observations, and the surrogate's constant mean
    V       covariance of the observations under a surrogate that ignores the texts
    S_c     similarities of the candidates of component c by their texts, exp(-d^2 / 2); 0 on the diagonal
    Z_c     observations x candidates: 1 where an observation has a candidate
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from botorch.models import SingleTaskGP

from mpromptune.model.embedding import FloatArray
from mpromptune.model.geometry import Geometry, identity_views
from mpromptune.model.space import IndexArray
from mpromptune.model.surrogate import quiet_single_thread, solved

# NOTE: the smallest share that can be told is one in five hundred.
_PERMUTATIONS = 499
# NOTE: fewer candidates can be dealt out in six ways at most, which tells nothing.
_LEAST_CANDIDATES = 4


def without_texts(geometries: Sequence[Geometry]) -> tuple[Geometry, ...]:
    """Geometries in which candidates are only the same or different."""
    return tuple(Geometry(identity_views(g.views.shape[-1]), g.group) for g in geometries)


def chance_of_likeness(blind: SingleTaskGP, geometries: Sequence[Geometry], seed: int = 0) -> float | None:
    r"""Share of random assignments of embeddings to candidates that explain as much as the real one.

    A score test of the variance component that texts would add [Lin1997]_, by permutation: the
    statistic of a component is

    .. math:: Q_c = u_c^T S_c u_c, \quad u_c = Z_c^T V^{-1} (y - m),

    which is large where candidates with like texts deviate alike. Those of the components are added
    up in units of their standard deviations under permutation. Only candidates that were measured
    take part, and only a view that comes from the embedder does.

    Args:
        blind: The surrogate fitted with `without_texts`.
        geometries: Of its components, with their texts.
        seed: Of the permutations.

    Returns:
        Near 0 where texts that are alike score alike; anything up to 1 where they say nothing. None
        where no component has four measured candidates with texts that differ.

    .. [Lin1997] X. Lin. Variance component testing in generalised linear models with random effects.
        Biometrika 84(2), 1997.
    """
    with quiet_single_thread(), torch.no_grad():
        weights = solved(blind)[0].cpu().numpy()
        X = blind.train_inputs[0].long().cpu().numpy()
    rng = np.random.default_rng(seed)
    parts = [
        _standardised(*_of_measured(X[:, c], weights, geometry), rng)
        for c, geometry in enumerate(geometries)
        if geometry.has_text and len(set(X[:, c].tolist())) >= _LEAST_CANDIDATES
    ]
    if not parts:
        return None
    total = np.sum(parts, axis=0)
    return float(np.mean(total >= total[0]))


def _of_measured(
    chosen: IndexArray, weights: FloatArray, geometry: Geometry
) -> tuple[FloatArray, FloatArray]:
    """``u`` and ``S`` of the candidates that were measured."""
    measured, places = np.unique(chosen, return_inverse=True)
    u: FloatArray = np.bincount(places, weights).astype(np.float64)
    similar: FloatArray = np.exp(-geometry.views[0].cpu().numpy()[np.ix_(measured, measured)] / 2.0)
    np.fill_diagonal(similar, 0.0)
    return u, similar


def _standardised(u: FloatArray, similar: FloatArray, rng: np.random.Generator) -> FloatArray:
    """The statistic as it is, and then under each permutation; in units of their deviation."""
    dealt = np.stack([u, *(rng.permutation(u) for _ in range(_PERMUTATIONS))])
    statistics: FloatArray = np.einsum("pi,ij,pj->p", dealt, similar, dealt, optimize=True)
    statistics -= statistics[1:].mean()
    scale = float(statistics[1:].std())
    return statistics / scale if scale > 0.0 else statistics
