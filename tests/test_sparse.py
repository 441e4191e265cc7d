"""The surrogate of thousands of trials, against the exact one and against GPyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from gpytorch.kernels import InducingPointKernel

from mpromptune.model import surrogate
from mpromptune.model.geometry import Geometry, numeric_views
from mpromptune.model.sparse import Observations, SparseGP, inducing_points
from mpromptune.model.surrogate import (
    Surrogate,
    fit,
    joint_posterior,
    posterior_mean_and_variance,
    quiet_single_thread,
)

N_CANDIDATES = 12
GEOMETRIES = [
    Geometry(numeric_views(np.random.default_rng(c).normal(size=N_CANDIDATES).tolist()), c // 2)
    for c in range(4)
]


def observations(n: int, known_noise: bool = True, distinct: int = 30) -> Observations:
    """Additive scores of a few configurations, each observed several times."""
    rng = np.random.default_rng(n)
    rows = rng.integers(0, N_CANDIDATES, size=(distinct, 4))
    owner = rng.integers(distinct, size=n)
    scores = rows[owner].sum(axis=1) / 40 + rng.normal(0, 0.1, n)
    X = torch.from_numpy(rows[owner]).double()
    noise = torch.from_numpy(rng.uniform(0.005, 0.02, (n, 1))) if known_noise else None
    return Observations(X, torch.from_numpy(scores).unsqueeze(-1), noise)


def fitted(observed: Observations) -> Surrogate:
    return fit(observed.X, observed.Y, observed.Yvar, GEOMETRIES)


def sparse_of(exact: Surrogate, observed: Observations, points: torch.Tensor) -> SparseGP:
    assert isinstance(exact, SingleTaskGP)
    with quiet_single_thread():
        return SparseGP(exact, observed, points)


def rows(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(0, N_CANDIDATES, size=(n, 4))).double()


@pytest.mark.parametrize("known_noise", [True, False])
def test_with_every_configuration_inducing_it_is_the_exact_posterior(known_noise: bool) -> None:
    """Means, variances and covariances of rows measured and not."""
    observed = observations(120, known_noise)
    exact = fitted(observed)
    assert isinstance(exact, SingleTaskGP)
    points = inducing_points(exact, observed, 200)
    assert len(points) == len(torch.unique(observed.X, dim=0))
    sparse = sparse_of(exact, observed, points)
    asked = torch.cat([observed.X[:20], rows()])
    for ours, expected in zip(
        (*posterior_mean_and_variance(sparse, asked), *joint_posterior(sparse, asked)),
        (*posterior_mean_and_variance(exact, asked), *joint_posterior(exact, asked)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_with_few_inducing_points_it_is_the_posterior_of_gpytorch() -> None:
    """`InducingPointKernel` predicts the same from the same points and hyper-parameters."""
    observed = observations(150)
    exact = fitted(observed)
    points = inducing_points(exact, observed, 16)
    sparse = sparse_of(exact, observed, points)
    other = SingleTaskGP(
        observed.X,
        observed.Y,
        observed.Yvar,
        covar_module=InducingPointKernel(exact.covar_module, points, exact.likelihood),
        mean_module=exact.mean_module,
        outcome_transform=Standardize(m=1),
    ).eval()
    with torch.no_grad(), quiet_single_thread():
        expected = other.posterior(rows())
        mean, variance = posterior_mean_and_variance(sparse, rows())
        torch.testing.assert_close(mean, expected.mean.squeeze(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, expected.variance.squeeze(-1), rtol=1e-3, atol=1e-5)


def test_single_posteriors_are_those_of_the_joint_one() -> None:
    """The quick posterior of single rows has the joint one's means and variances."""
    observed = observations(150)
    exact = fitted(observed)
    sparse = sparse_of(exact, observed, inducing_points(exact, observed, 16))
    mean, covariance = joint_posterior(sparse, rows())
    single = posterior_mean_and_variance(sparse, rows())
    torch.testing.assert_close(single[0], mean)
    torch.testing.assert_close(single[1], covariance.diagonal())


def test_inducing_points_hold_the_best() -> None:
    """At most as many as asked for, without repeats; the configuration of the highest mean among them."""
    observed = observations(200, distinct=60)
    exact = fitted(observed)
    points = inducing_points(exact, observed, 24)
    assert len(points) <= 24
    assert len(torch.unique(points, dim=0)) == len(points)
    means = {
        tuple(row.tolist()): float(observed.Y[(row == observed.X).all(dim=1)].mean())
        for row in torch.unique(observed.X, dim=0)
        if int((row == observed.X).all(dim=1).sum()) >= 4
    }
    assert max(means, key=lambda row: means[row]) in set(map(tuple, points.tolist()))


def test_beyond_a_number_of_trials_the_model_is_sparse_and_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function of what was observed: hyper-parameters of a part, posterior of all."""
    monkeypatch.setattr(surrogate, "_EXACT", 50)
    monkeypatch.setattr(surrogate, "_INDUCING", 60)
    observed = observations(300)
    first, again = fitted(observed), fitted(observed)
    assert isinstance(first, SparseGP)
    assert isinstance(fitted(observed.at(torch.arange(50))), SingleTaskGP)
    for a, b in zip(
        posterior_mean_and_variance(first, rows()), posterior_mean_and_variance(again, rows()), strict=True
    ):
        assert torch.equal(a, b)


def test_chunks_do_not_change_a_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are asked for in parts where there are many; the answers are those of all at once."""
    observed = observations(60)
    model = fitted(observed)
    whole = posterior_mean_and_variance(model, rows())
    monkeypatch.setattr(surrogate, "_ENTRIES", 7 * len(observed))
    for a, b in zip(whole, posterior_mean_and_variance(model, rows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
