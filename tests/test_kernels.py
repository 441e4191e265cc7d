"""Covariances over indices, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpromptune.model.geometry import Geometry, identity_views, numeric_views, squared_distances
from mpromptune.model.kernels import ComponentKernel, PromptKernel
from mpromptune.model.surrogate import fit, posterior_mean_and_variance


def grid(n: int, components: int = 1) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64).unsqueeze(-1).expand(n, components)


def test_component_kernel_is_text_share_plus_identity_share() -> None:
    """At the prior mode: half exp(-d^2 / 2), half identity."""
    d2 = squared_distances(np.array([[0.0], [1.0], [3.0]]))
    table = ComponentKernel(torch.from_numpy(d2)[None]).table().detach()
    assert table.diagonal().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert table[0, 1].item() == pytest.approx(0.5 * math.exp(-d2[0, 1] / 2))


def test_identity_has_half_of_a_component_however_many_views_it_has() -> None:
    """At the prior mode two views have a quarter each: (exp(-1 / 2) + exp(-0)) / 4 where they are 1 and 0."""
    views = torch.stack([1.0 - torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)])
    table = ComponentKernel(views).table().detach()
    assert table[0, 1].item() == pytest.approx((math.exp(-0.5) + 1.0) / 4.0)
    assert table[0, 0].item() == pytest.approx(1.0)


def test_component_without_views_compares_by_identity() -> None:
    """No text: the covariance is the identity matrix."""
    assert torch.equal(ComponentKernel(identity_views(3)).table().detach(), torch.eye(3, dtype=torch.float64))


def test_prompt_kernel_sums_components_and_their_product() -> None:
    """Two components of one predictor: a_1 k_1 + a_2 k_2 + a_12 k_1 k_2."""
    kernel = PromptKernel([Geometry(identity_views(2), 0), Geometry(identity_views(2), 0)])
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    covariance = kernel(x, x).to_dense().detach()
    first = kernel.log_variance.exp()[0].item()
    whole = kernel.log_variance.exp().sum().item() + kernel.log_product.exp().item()
    assert covariance[0, 1].item() == pytest.approx(first)
    assert covariance[0, 0].item() == pytest.approx(whole)


def test_predictors_interact_in_pairs() -> None:
    """Three predictors: sum of their kernels plus the mean product over the three pairs."""
    kernel = PromptKernel([Geometry(identity_views(2), g) for g in range(3)])
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    covariance = kernel(x, x).to_dense().detach()
    a = kernel.log_variance.exp().detach()
    b = kernel.log_interaction.exp().item()
    assert covariance[0, 0].item() == pytest.approx(a.sum().item() + b)
    assert covariance[0, 1].item() == pytest.approx(a[:2].sum().item() + b / 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True), st.integers(0, 2**16))
def test_prompt_kernel_is_a_covariance(values: list[float], seed: int) -> None:
    """Whatever the hyper-parameters, the matrix is symmetric and positive semi-definite."""
    kernel = PromptKernel([Geometry(numeric_views(values), 0), Geometry(identity_views(len(values)), 1)])
    generator = torch.Generator().manual_seed(seed)
    for parameter in kernel.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = grid(len(values), 2)
    covariance = kernel(x, x).to_dense().detach()
    assert torch.allclose(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-8


def test_diagonal_equals_that_of_the_whole_matrix() -> None:
    """`diag=True` agrees with the dense matrix."""
    kernel = PromptKernel([Geometry(numeric_views([0.0, 1.0, 2.0]), g) for g in range(2)])
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    dense = kernel(x, x).to_dense().detach()
    assert torch.allclose(kernel(x, x, diag=True).detach(), dense.diagonal())


def test_fit_predicts_what_was_observed() -> None:
    """Means come back in the units of the scores."""
    y = torch.tensor([[10.0], [12.0], [30.0]], dtype=torch.float64)
    model = fit(grid(3), y, torch.full_like(y, 0.01), [Geometry(numeric_views([0.0, 0.1, 1.0]), 0)])
    mean, variance = posterior_mean_and_variance(model, torch.arange(3).unsqueeze(-1))
    assert mean.tolist() == pytest.approx([10.0, 12.0, 30.0], abs=0.5)
    assert bool((variance > 0).all())


def test_default_device_and_dtype_do_not_matter() -> None:
    """Fitting is in float64 even where the caller's default is float32."""
    y = torch.tensor([[0.1], [0.5]], dtype=torch.float64)
    model = fit(grid(2), y, None, [Geometry(identity_views(2), 0)])
    assert model.posterior(grid(2)).mean.dtype == torch.float64
