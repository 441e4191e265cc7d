r"""Which configurations a batch of calls is spent on: top-two Thompson sampling of what will be known.

Notation
    u       latents (see `beliefs`), with posterior N(mu, B^{-1})
    R       calls that are left
    pi      probability that a latent is the best of its group
    S       posterior draws
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import cho_solve, cholesky

from mpromptune.model.beliefs import Beliefs, Latents
from mpromptune.model.space import FloatArray, IndexArray, IndexSpace, Row

# NOTE: a bound on the work, of which a proposal among 2000 configurations takes 50 ms: latents of a group,
# beside the measured ones, that a batch is chosen from.
_OTHERS = 400
_DRAWS = 256
# Times that what the calls left will tell is derived from who is likely to be best, and the other way round.
_ITERATIONS = 2
# NOTE: the probability of trying the likely best's rival instead: half is optimal to a constant.
_RIVAL = 0.5


def propose(
    beliefs: Beliefs,
    n: int,
    calls_left: int,
    is_open: Callable[[Row], bool],
    rng: np.random.Generator,
) -> list[Row]:
    """A batch of ``n`` configurations, each to be measured on a few examples; one may be there several times.

    Top-two Thompson sampling [Russo2020]_ of the posterior means that the calls left will lead to.

    Args:
        beliefs: Fitted to at least one score.
        n: Places in the batch.
        calls_left: Calls that the search has left, those of this batch included.
        is_open: Whether measuring a configuration further could matter.
        rng: Of all draws.

    Returns:
        At most ``n``; none where nothing that was drawn is open.

    .. [Russo2020] D. Russo. Simple Bayesian Algorithms for Best-Arm Identification. Operations Research
        68(6), 2020.
    """
    latents = beliefs.latents([_candidates(beliefs, g, rng) for g in range(len(beliefs.groups))])
    known = _known_later(latents, calls_left, max(_DRAWS, 4 * n), rng)
    parts = latents.split(known)
    best = np.stack([part.argmax(axis=0) for part in parts])  # G x S
    chosen: list[Row] = []
    for draw in range(best.shape[1]):
        if len(chosen) == n:
            break
        for indices in _duel(parts, best, draw, rng):
            row = _row(beliefs, latents, indices)
            if beliefs.space.exists(row) and is_open(row):
                chosen.append(row)
                break
    return chosen


def gains(beliefs: Beliefs, leader: Row, is_open: Callable[[Row], bool], rng: np.random.Generator) -> float:
    r"""The most that knowing a configuration exactly would gain over keeping the leader.

    .. math:: \max_x E[\max(f(x) - f(L), 0)]

    with f the mean score, over open configurations that are the best in some draw; the expectation is over
    the same draws, so it counts what the two have in common. 0 where none is open.
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
    """Rows of the latents of a group; where these are many, a sample."""
    space, columns = beliefs.space, list(beliefs.groups[group].components)
    if space.combinations is not None:
        rows = space.combinations
    else:
        own = IndexSpace([space.sizes[c] for c in columns]).rows()
        rows = np.zeros((len(own), len(space.sizes)), dtype=np.int64)
        rows[:, columns] = own
    return rows if len(rows) <= _OTHERS else rows[rng.choice(len(rows), _OTHERS, replace=False)]


def _known_later(latents: Latents, calls_left: int, n: int, rng: np.random.Generator) -> FloatArray:
    r"""Draws of the posterior mean that the calls left will lead to, ``L x S``.

    If a latent gets :math:`a = R \pi \bar w` of information, :math:`\bar w` that of one call, a draw
    :math:`\tilde u` of the truth leads to

    .. math:: \mu + (B + \operatorname{diag}(a))^{-1}
        (\operatorname{diag}(a) (\tilde u - \mu) + \operatorname{diag}(a)^{1/2} z), \quad z \sim N(0, I).

    What can no longer be found out is not worth a call.
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
    """Of one call about each latent, beside the best of the other groups, L."""
    posterior = latents.posterior
    means = latents.split(posterior.mean)
    top = sum(float(mean.max()) for mean in means)
    skills = np.concatenate([mean - mean.max() + top for mean in means])
    information: FloatArray = posterior.information(skills).mean(axis=-1)
    return information


def _chance(latents: Latents, deviations: FloatArray) -> FloatArray:
    """Probability of each latent to be the best of its group, L."""
    drawn = latents.split(latents.posterior.mean[:, None] + deviations)
    counts = [np.bincount(part.argmax(axis=0), minlength=len(part)) for part in drawn]
    chance: FloatArray = np.concatenate(counts) / deviations.shape[1]
    return chance


def _duel(
    parts: Sequence[FloatArray], best: IndexArray, draw: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """A draw's best and a rival of it, the one that is to be measured first: G indices each."""
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
    """The configuration that is made of one latent of every group."""
    row = [0] * len(beliefs.space.sizes)
    for group, rows, index in zip(beliefs.groups, latents.rows, indices, strict=True):
        for c in group.components:
            row[c] = int(rows[index, c])
    return tuple(row)
