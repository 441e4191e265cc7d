"""Batch expected improvement, against answers found in other ways."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.models import SingleTaskGP

from mpromptune.model.acquisition import (
    expected_improvement,
    log_expected_improvement,
    propose,
    ranked,
)
from mpromptune.model.geometry import Geometry, numeric_views
from mpromptune.model.surrogate import fit, posterior_mean_and_variance

VALUES = [0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.8, 1.0]
# Less than a standard deviation above the uncertain candidates: farther out, few of the samples improve.
BEST_F = 0.62


@pytest.fixture(scope="module")
def model() -> SingleTaskGP:
    """A surrogate of one numeric component with eight candidates, four of them measured."""
    train_X = torch.tensor([[0], [2], [4], [7]], dtype=torch.float64)
    train_Y = torch.tensor([[0.2], [0.9], [0.4], [0.1]], dtype=torch.float64)
    return fit(train_X, train_Y, torch.full_like(train_Y, 0.01), [Geometry(numeric_views(VALUES), 0)])


def rows(*indices: int) -> torch.Tensor:
    return torch.tensor([[i] for i in indices], dtype=torch.float64)


def joint_posterior(model: SingleTaskGP, indices: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        posterior = model.posterior(rows(*indices))
        return posterior.mean.squeeze(-1).numpy(), posterior.distribution.covariance_matrix.numpy()


def brute_force_ei(model: SingleTaskGP, indices: tuple[int, ...], best_f: float) -> float:
    """E[max(max f - best_f, 0)] by plain sampling of the multivariate normal posterior."""
    mean, covariance = joint_posterior(model, indices)
    samples = np.random.default_rng(0).multivariate_normal(mean, covariance, size=400_000)
    return float(np.maximum(samples.max(axis=1) - best_f, 0.0).mean())


def test_one_candidate_equals_analytic_log_ei(model: SingleTaskGP) -> None:
    """q = 1 agrees with the closed form within Monte-Carlo error."""
    X = rows(*range(8)).unsqueeze(-2)
    with torch.no_grad():
        sampled = expected_improvement(model, best_f=BEST_F)(X)
        analytic = LogExpectedImprovement(model, best_f=BEST_F)(X)
    likely = analytic > np.log(1e-3)
    assert likely.sum() >= 4
    assert torch.allclose(sampled[likely], analytic[likely], atol=0.15)


@pytest.mark.parametrize("indices", [(1, 3), (1, 2), (3, 5, 6)])
def test_joint_value_equals_brute_force(model: SingleTaskGP, indices: tuple[int, ...]) -> None:
    """The joint qEI of several candidates is that of the multivariate normal posterior."""
    with torch.no_grad():
        sampled = expected_improvement(model, best_f=BEST_F)(rows(*indices))
    expected = brute_force_ei(model, indices, BEST_F)
    assert float(sampled.exp()) == pytest.approx(expected, rel=0.1, abs=2e-3)


def test_greedy_batch_equals_asks_with_pending(model: SingleTaskGP) -> None:
    """A batch of q is what q single proposals choose, each with the earlier ones pending."""
    choices = rows(*range(8))
    batch = propose(model, choices, q=3, best_f=0.7, seed=1)
    pending = torch.empty(0, 1)
    for expected in batch:
        left = choices[~(choices[:, None] == pending[None]).all(-1).any(-1)]
        chosen = propose(model, left, q=1, best_f=0.7, X_pending=pending, seed=1)
        assert chosen[0].tolist() == expected.tolist()
        pending = torch.cat([pending, chosen])


def test_pending_configuration_is_not_chosen_again(model: SingleTaskGP) -> None:
    """A configuration that is being measured has nothing more to offer."""
    alone = propose(model, rows(*range(8)), q=1, best_f=0.7, seed=0)
    beside = propose(model, rows(*range(8)), q=1, best_f=0.7, X_pending=alone, seed=0)
    assert beside.tolist() != alone.tolist()


def test_random_batches_can_beat_the_greedy_one(model: SingleTaskGP) -> None:
    """With n_batches, the result is at least as good jointly, and sometimes better than greedy."""
    acqf = expected_improvement(model, best_f=0.85, seed=3)
    best = max(
        itertools.combinations(range(8), 2),
        key=lambda pair: float(acqf(rows(*pair)).detach()),
    )
    batch = propose(model, rows(*range(8)), q=2, best_f=0.85, n_batches=2000, seed=3)
    assert sorted(batch.flatten().tolist()) == sorted(best)


def test_fewer_choices_than_q_returns_them_all(model: SingleTaskGP) -> None:
    """q larger than the choice set yields every choice once."""
    assert sorted(propose(model, rows(1, 3), q=5, best_f=0.7).flatten().tolist()) == [1, 3]


def test_incumbent_is_the_highest_posterior_mean(model: SingleTaskGP) -> None:
    """best_f is a posterior mean, not the luckiest observation."""
    measured = rows(0, 2, 4, 7)
    mean, _ = posterior_mean_and_variance(model, measured)
    first, means = ranked(model, measured)
    assert means.tolist() == sorted(mean.tolist(), reverse=True)
    assert first[0].tolist() == measured[mean.argmax()].tolist()
    assert means[0] < 0.9


def test_single_posteriors_are_those_of_the_model() -> None:
    """The quick posterior of single rows equals BoTorch's own, with and without known noise."""
    train_X = torch.tensor([[0], [2], [4], [7]], dtype=torch.float64)
    train_Y = torch.tensor([[0.1], [0.5], [0.2], [0.9]], dtype=torch.float64)
    for train_Yvar in (None, torch.full((4, 1), 0.01, dtype=torch.float64)):
        fitted = fit(train_X, train_Y, train_Yvar, [Geometry(numeric_views(VALUES), "x")])
        with torch.no_grad():
            own = fitted.posterior(rows(*range(8)).unsqueeze(-2))
        mean, variance = posterior_mean_and_variance(fitted, rows(*range(8)))
        torch.testing.assert_close(mean, own.mean.flatten(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(variance, own.variance.flatten(), rtol=1e-6, atol=1e-10)


def test_proposal_leaves_global_state_alone(model: SingleTaskGP) -> None:
    """Neither the global RNG nor the number of torch threads changes."""
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    propose(model, rows(*range(8)), q=2, best_f=0.7, n_batches=8, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_shortlist_keeps_the_best_of_a_large_space() -> None:
    """Of 600 choices the one with the highest expected improvement is found."""
    values = np.linspace(0.0, 1.0, 600)
    train_X = torch.tensor([[0], [200], [400], [599]], dtype=torch.float64)
    train_Y = torch.tensor([[0.2], [0.9], [0.4], [0.1]], dtype=torch.float64)
    large = fit(train_X, train_Y, torch.full_like(train_Y, 0.01), [Geometry(numeric_views(values), 0)])
    alone = log_expected_improvement(large, 0.7, rows(*range(600)))
    (chosen,) = propose(large, rows(*range(600)), q=1, best_f=0.7).flatten().tolist()
    assert alone[int(chosen)] == pytest.approx(float(alone.max()), abs=0.15)
