"""The surrogate of plain studies: covariances and posteriors, against closed forms, BoTorch and GPyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from embedders import on_a_line
from gpytorch.kernels import InducingPointKernel
from hypothesis import given, settings
from hypothesis import strategies as st

from mpromptune.model import surrogate
from mpromptune.model.embedding import Geometry, identity_views, squared_distances
from mpromptune.model.surrogate import PromptKernel, Surrogate, fit, quiet_single_thread

N_CANDIDATES = 12
GEOMETRIES = [on_a_line(np.random.default_rng(c).normal(size=N_CANDIDATES), c // 2) for c in range(4)]


def identities(*groups: int) -> PromptKernel:
    """Two candidates a component, which are only the same or different."""
    return PromptKernel([Geometry(identity_views(2), group) for group in groups])


def covariance_of(kernel: PromptKernel, rows: list[list[float]]) -> torch.Tensor:
    x = torch.tensor(rows, dtype=torch.float64)
    return kernel(x, x).to_dense().detach()


def test_candidates_have_half_text_and_half_identity() -> None:
    """At the prior mode, of one view: exp(-d^2 / 2) / 2 between two; of two views a quarter each."""
    d2 = squared_distances(np.array([[0.0], [1.0], [3.0]]))
    table = PromptKernel([Geometry(torch.from_numpy(d2)[None], 0)]).table(0).detach()
    assert table.diagonal().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert table[0, 1].item() == pytest.approx(0.5 * math.exp(-d2[0, 1] / 2))
    views = torch.stack([1.0 - torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)])
    table = PromptKernel([Geometry(views, 0)]).table(0).detach()
    assert table[0, 1].item() == pytest.approx((math.exp(-0.5) + 1.0) / 4.0)
    assert table[0, 0].item() == pytest.approx(1.0)
    assert torch.equal(identities(0).table(0).detach(), torch.eye(2, dtype=torch.float64))


def test_a_predictor_sums_its_components_and_their_product() -> None:
    """Two components: a_1 k_1 + a_2 k_2 + a_12 k_1 k_2."""
    kernel = identities(0, 0)
    covariance = covariance_of(kernel, [[0.0, 0.0], [0.0, 1.0]])
    variances = kernel.log_variance.exp()
    assert covariance[0, 1].item() == pytest.approx(variances[0].item())
    assert covariance[0, 0].item() == pytest.approx(variances.sum().item() + kernel.log_product.exp().item())


def test_predictors_interact_in_pairs() -> None:
    """Three predictors: sum of their kernels plus the mean product over the three pairs."""
    kernel = identities(0, 1, 2)
    covariance = covariance_of(kernel, [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    a, b = kernel.log_variance.exp().detach(), kernel.log_interaction.exp().item()
    assert covariance[0, 0].item() == pytest.approx(a.sum().item() + b)
    assert covariance[0, 1].item() == pytest.approx(a[:2].sum().item() + b / 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True), st.integers(0, 2**16))
def test_prompt_kernel_is_a_covariance(values: list[float], seed: int) -> None:
    """Whatever the hyper-parameters: symmetric, positive semi-definite, and `diag=True` is its diagonal."""
    kernel = PromptKernel([on_a_line(values), Geometry(identity_views(len(values)), 1)])
    generator = torch.Generator().manual_seed(seed)
    for parameter in kernel.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64).unsqueeze(-1).expand(len(values), 2)
    covariance = kernel(x, x).to_dense().detach()
    assert torch.allclose(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-8
    assert torch.allclose(kernel(x, x, diag=True).detach(), covariance.diagonal())


def observations(n: int, distinct: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive scores of a few configurations, each observed several times."""
    rng = np.random.default_rng(n)
    rows = rng.integers(0, N_CANDIDATES, size=(distinct, 4))
    owner = rng.integers(distinct, size=n)
    scores = rows[owner].sum(axis=1) / 40 + rng.normal(0, 0.1, n)
    return torch.from_numpy(rows[owner]).double(), torch.from_numpy(scores).unsqueeze(-1)


def rows(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(0, N_CANDIDATES, size=(n, 4))).double()


def through(points: int, monkeypatch: pytest.MonkeyPatch, n: int = 120, distinct: int = 30) -> Surrogate:
    """Fitted to so many observations through so many inducing points."""
    monkeypatch.setattr(surrogate, "_EXACT", points)
    return fit(*observations(n, distinct), GEOMETRIES)


def assert_same(model: Surrogate, mean: torch.Tensor, covariance: torch.Tensor, asked: torch.Tensor) -> None:
    """Joint and single posteriors are those expected, up to rounding."""
    for ours, expected in zip(
        (*model.joint(asked), *model.single(asked)),
        (mean, covariance, mean, covariance.diagonal()),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def posterior_of(model: SingleTaskGP, y: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A BoTorch model's own posterior, of values standardised as ours are, in their units."""
    with torch.no_grad(), quiet_single_thread():
        posterior = model.eval().posterior(asked)
        covariance = posterior.distribution.covariance_matrix * y.std() ** 2
        return posterior.mean.squeeze(-1) * y.std() + y.mean(), covariance


def test_the_posterior_is_botorchs() -> None:
    """Of rows measured and not: that of the exact model that was fitted; positive variances, in float64."""
    X, y = observations(120)
    model, asked = fit(X, y, GEOMETRIES), torch.cat([X[:20], rows()])
    assert_same(model, *posterior_of(model.model, y, asked), asked)
    assert model.single(asked)[0].dtype == torch.float64
    assert bool((model.single(asked)[1] > 0).all())


def test_the_posterior_through_inducing_points_is_gpytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`InducingPointKernel` predicts the same from the same points and hyper-parameters."""
    X, y = observations(120)
    model = through(16, monkeypatch)
    assert len(model.points) == 16
    exact = model.model
    kernel = InducingPointKernel(exact.covar_module, model.points, exact.likelihood)
    standard = (y - y.mean()) / y.std()
    with quiet_single_thread():
        other = SingleTaskGP(
            X,
            standard,
            covar_module=kernel,
            mean_module=exact.mean_module,
            likelihood=exact.likelihood,
            outcome_transform=None,
        )
    mean, covariance = posterior_of(other, y, rows())
    ours = model.single(rows())
    torch.testing.assert_close(ours[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], covariance.diagonal(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.joint(rows())[1].diagonal(), ours[1])


def test_with_every_configuration_inducing_it_is_the_exact_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows measured and not: that of all observations, by dense algebra."""
    X, y = observations(120)
    model = through(40, monkeypatch)
    assert len(model.points) == len(torch.unique(X, dim=0)) <= 30
    asked = torch.cat([X[:20], rows()])
    standard, fitted = ((y - y.mean()) / y.std()).squeeze(-1), model.model
    with torch.no_grad():
        k = fitted.covar_module
        total = k(X, X).to_dense() + fitted.likelihood.noise * torch.eye(len(X))
        gain = torch.linalg.solve(total, k(X, asked).to_dense()).T
        mean = fitted.mean_module(asked) + gain @ (standard - fitted.mean_module(X))
        covariance = k(asked, asked).to_dense() - gain @ k(X, asked).to_dense()
    assert_same(model, mean * y.std() + y.mean(), covariance * y.std() ** 2, asked)


def test_inducing_points_hold_the_best_and_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as many as asked for, without repeats; a function of what was observed."""
    X, y = observations(200, distinct=60)
    model = through(24, monkeypatch, 200, 60)
    assert len(torch.unique(model.points, dim=0)) == len(model.points) <= 24
    means = {
        tuple(row.tolist()): float(y[(row == X).all(dim=1)].mean())
        for row in torch.unique(X, dim=0)
        if int((row == X).all(dim=1).sum()) >= 4
    }
    assert max(means, key=lambda row: means[row]) in set(map(tuple, model.points.tolist()))
    again = through(24, monkeypatch, 200, 60)
    for a, b in zip(model.single(rows()), again.single(rows()), strict=True):
        assert torch.equal(a, b)


def test_parts_do_not_change_a_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covariances are computed in parts where there are many; the answers are those of all at once."""
    model = fit(*observations(60), GEOMETRIES)
    whole = model.single(rows())
    monkeypatch.setattr(surrogate, "_ROWS", 7)
    for a, b in zip(whole, model.single(rows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
