r"""Chooses the configurations of a batch by top-two Thompson sampling of future posterior means.

Notation
    u       latents (see `beliefs`), with posterior N(mu, B^{-1})
    R       remaining calls
    pi      probability that a latent is the best of its group
    S       posterior draws
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import cho_solve, cholesky

from mpromptune.model.beliefs import Beliefs, Latents
from mpromptune.model.space import FloatArray, IndexArray, IndexSpace, Row

# NOTE: number of unmeasured latents of a group among which a batch is chosen. It bounds the work: a proposal
# among 2000 configurations takes 50 ms.
_OTHERS = 400
_DRAWS = 256
# Iterations between the future information of latents and their probabilities to be the best.
_ITERATIONS = 2
# NOTE: probability of measuring the rival instead of the best of a draw: a half is optimal up to a constant.
_RIVAL = 0.5


def propose(
    beliefs: Beliefs,
    n: int,
    calls_left: int,
    is_open: Callable[[Row], bool],
    rng: np.random.Generator,
    offer: Row | None = None,
) -> list[Row]:
    """A batch of ``n`` configurations, one for each block; a configuration may occur several times.

    Top-two Thompson sampling [Russo2020]_ of the posterior means after the remaining calls.

    Args:
        beliefs: Fitted to at least one score.
        n: Blocks in the batch.
        calls_left: Remaining calls of the search, including those of this batch.
        is_open: Whether a configuration may be measured further.
        rng: Source of all draws.
        offer: A configuration with a candidate that is not written yet, but whose origin the space knows.

    Returns:
        At most ``n`` configurations; none if no configuration drawn is open.

    .. [Russo2020] D. Russo. Simple Bayesian Algorithms for Best-Arm Identification. Operations Research
        68(6), 2020.
    """
    candidates = [_candidates(beliefs, g, rng) for g in range(len(beliefs.groups))]
    if offer is not None:
        candidates = [np.concatenate([rows, np.array([offer], dtype=np.int64)]) for rows in candidates]
    latents = beliefs.latents(candidates)
    known = _future_means(latents, calls_left, max(_DRAWS, 4 * n), rng)
    parts = latents.split(known)
    best = np.stack([part.argmax(axis=0) for part in parts])  # G x S
    chosen: list[Row] = []
    for draw in range(best.shape[1]):
        if len(chosen) == n:
            break
        for indices in _duel(parts, best, draw, rng):
            row = _row(beliefs, latents, indices)
            if beliefs.space.is_next(row) or (beliefs.space.exists(row) and is_open(row)):
                chosen.append(row)
                break
    return chosen


def best_of(beliefs: Beliefs, group: int, rows: Sequence[Row], rng: np.random.Generator) -> int:
    """Position of the configuration that is the best of ``rows`` in a posterior draw of a group's latents."""
    wanted = np.array(rows, dtype=np.int64)
    latents = beliefs.latents([wanted] * len(beliefs.groups))
    drawn = latents.posterior.mean + latents.posterior.deviations(rng, 1)[:, 0]
    parts = [np.zeros_like(part) for part in latents.split(drawn)]
    parts[group] = latents.split(drawn)[group]
    return int((beliefs.design(latents.rows, wanted) @ np.concatenate(parts)).argmax())


def largest_gain(
    beliefs: Beliefs, leader: Row, is_open: Callable[[Row], bool], rng: np.random.Generator
) -> float:
    r"""The largest expected gain over the leader if a configuration were known exactly.

    .. math:: \max_x E[\max(f(x) - f(L), 0)]

    where f is the mean score and x an open configuration that is the best in some draw. The expectation is
    over joint draws, so it includes the correlation of the two. 0 if no such configuration is open.
    """
    wanted = np.array([leader], dtype=np.int64)
    candidates = [_candidates(beliefs, g, rng) for g in range(len(beliefs.groups))]
    latents = beliefs.latents([np.concatenate([wanted, rows]) for rows in candidates])
    parts = latents.split(latents.posterior.mean[:, None] + latents.posterior.deviations(rng, _DRAWS))
    best = {tuple(draw) for draw in np.stack([part.argmax(axis=0) for part in parts]).T.tolist()}
    rivals = [row for row in (_row(beliefs, latents, indices) for indices in sorted(best)) if is_open(row)]
    if not rivals:
        return 0.0
    rows = np.array([leader, *rivals], dtype=np.int64)
    scores = latents.posterior.score(beliefs.design(latents.rows, rows) @ np.concatenate(parts))
    return float(np.maximum(scores[1:] - scores[0], 0.0).mean(axis=1).max())


def _candidates(beliefs: Beliefs, group: int, rng: np.random.Generator) -> IndexArray:
    """Rows of the latents of a group; a random sample if there are many."""
    space, columns = beliefs.space, list(beliefs.groups[group].components)
    if space.combinations is not None:
        rows = space.combinations
    else:
        own = IndexSpace([space.sizes[c] for c in columns]).rows()
        rows = np.zeros((len(own), len(space.sizes)), dtype=np.int64)
        rows[:, columns] = own
    if space.closed:
        rows = np.array([row for row in rows.tolist() if space.exists(row)], dtype=np.int64)
    return rows if len(rows) <= _OTHERS else rows[rng.choice(len(rows), _OTHERS, replace=False)]


def _future_means(latents: Latents, calls_left: int, n: int, rng: np.random.Generator) -> FloatArray:
    r"""Draws of the posterior means after the remaining calls, ``L x S``.

    If a latent gains the information :math:`a = R \pi \bar w`, where :math:`\bar w` is that of one call, a
    draw :math:`\tilde u` of the truth leads to

    .. math:: \mu + (B + \operatorname{diag}(a))^{-1}
        (\operatorname{diag}(a) (\tilde u - \mu) + \operatorname{diag}(a)^{1/2} z), \quad z \sim N(0, I).

    So calls are not spent on differences that the remaining calls cannot resolve.
    """
    posterior = latents.posterior
    truth = posterior.deviations(rng, n)
    noise = rng.standard_normal(truth.shape)
    precision = posterior.root @ posterior.root.T
    information = _information(latents)
    chance = _chance(latents, truth)
    later = truth
    for _ in range(_ITERATIONS):
        gained = calls_left * chance * information + 1e-9
        root = cholesky(precision + np.diag(gained), lower=True, check_finite=False)
        told = gained[:, None] * truth + np.sqrt(gained)[:, None] * noise
        later = cho_solve((root, True), told, check_finite=False)
        chance = (chance + _chance(latents, later)) / 2.0
    return posterior.mean[:, None] + later


def _information(latents: Latents) -> FloatArray:
    """Information of one call about each latent, combined with the best of the other groups; length L."""
    posterior = latents.posterior
    means = latents.split(posterior.mean)
    top = sum(float(mean.max()) for mean in means)
    skills = np.concatenate([mean - mean.max() + top for mean in means])
    information: FloatArray = posterior.information(skills).mean(axis=-1)
    return information


def _chance(latents: Latents, deviations: FloatArray) -> FloatArray:
    """Probability of each latent to be the best of its group; length L."""
    drawn = latents.split(latents.posterior.mean[:, None] + deviations)
    counts = [np.bincount(part.argmax(axis=0), minlength=len(part)) for part in drawn]
    chance: FloatArray = np.concatenate(counts) / deviations.shape[1]
    return chance


def _duel(
    parts: Sequence[FloatArray], best: IndexArray, draw: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Three choices of G indices, by priority: a random mixture of the next two, rivals, the draw's best."""
    leader = best[:, draw]
    rival = leader.copy()
    for g, part in enumerate(parts):
        others = best[g][best[g] != leader[g]]
        if len(others):
            rival[g] = others[rng.integers(len(others))]
        elif len(part) > 1:
            rival[g] = np.where(np.arange(len(part)) == leader[g], -np.inf, part[:, draw]).argmax()
    mixed = np.where(rng.random(len(parts)) < _RIVAL, rival, leader)
    return [tuple(mixed.tolist()), tuple(rival.tolist()), tuple(leader.tolist())]


def _row(beliefs: Beliefs, latents: Latents, indices: Sequence[int]) -> Row:
    """The configuration that consists of one latent of every group."""
    row = [0] * len(beliefs.space.sizes)
    for group, rows, index in zip(beliefs.groups, latents.rows, indices, strict=True):
        for c in group.components:
            row[c] = int(rows[index, c])
    return tuple(row)
