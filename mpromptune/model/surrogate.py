"""The Gaussian process over configurations: fitting it, and its posterior of the mean score.

The model is where the geometries are; rows may come from anywhere, and what comes back is on the CPU: a few
numbers for each configuration, of which a proposal is made in the same way whatever the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from botorch.exceptions import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.posteriors import GPyTorchPosterior
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import lazily_evaluate_kernels
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.memoize import cached
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.geometry import Geometry
from mpromptune.model.kernels import PromptKernel
from mpromptune.model.sparse import Observations, SparseGP, inducing_points, units_of

Surrogate = SingleTaskGP | SparseGP

# NOTE: a step that gains less than a hundred-thousandth of a nat per observation ends a fit. On 100
# trials of 2000 configurations that is after 8 evaluations instead of 11, and moves no posterior mean by
# more than 0.002. The bound on iterations is for the rare fit that creeps along a flat ridge.
_FIT = {"options": {"ftol": 1e-5, "maxiter": 75}}
# NOTE: trials of an exact model, whose hyper-parameters are fitted in n^3 steps; with more, those of as
# many are taken for the model of all. And the inducing points of that.
_EXACT = 512
_INDUCING = 512
# NOTE: entries of the covariances of rows with what the model was fitted to, at once: 8 MB, of which a
# dozen are held at a time.
_ENTRIES = 2**20
# Rounding may leave a variance of what is known exactly below zero.
_LEAST_VARIANCE = 1e-12


@contextmanager
def quiet_single_thread() -> Iterator[None]:
    """`plain_torch`, and no advice about scaling: small index-valued GPs need none."""
    with plain_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore", InputDataWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        yield


@plain_torch()
def fit(
    train_X: Tensor,
    train_Y: Tensor,
    train_Yvar: Tensor | None,
    geometries: Sequence[Geometry],
) -> Surrogate:
    r"""Fits the surrogate by maximum a posteriori (`fit_gpytorch_mll`).

    Up to 512 observations the model is exact. With more, its hyper-parameters are those of 512 of them,
    evenly spread, and its posterior is that of all through inducing points (`SparseGP`).

    Args:
        train_X: ``n x C`` candidate indices.
        train_Y: ``n x 1`` observed values, to be maximised.
        train_Yvar: ``n x 1`` variances of the observations, or None to infer one for all.
        geometries: Distances of the C components. The model is on their device.

    Returns:
        A BoTorch model whose posterior is in the units of ``train_Y``.
    """
    device = geometries[0].views.device
    is_exact = len(train_Y) <= _EXACT
    kernel: Kernel = PromptKernel(geometries)
    observed, kernel = Observations(train_X, train_Y, train_Yvar).to(device), kernel.to(device)
    units = Standardize(m=1).to(device)
    with quiet_single_thread():
        if is_exact:
            return _fit_exact(observed, kernel, units)
        units(observed.Y)
        units.eval()  # the units of all, not of those below
        evenly = torch.linspace(0, len(observed) - 1, _EXACT, dtype=torch.float64, device=device)
        fitted = _fit_exact(observed.at(evenly.round().long()), kernel, units)
        return SparseGP(fitted, observed, inducing_points(fitted, observed, _INDUCING))


def _fit_exact(observed: Observations, kernel: Kernel, units: Standardize) -> SingleTaskGP:
    model = SingleTaskGP(observed.X, observed.Y, observed.Yvar, covar_module=kernel, outcome_transform=units)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    # A fit that fails is tried again from a draw of the priors, by torch's global generator.
    with torch.random.fork_rng(devices=[]), lazily_evaluate_kernels(False):
        torch.manual_seed(0)
        fit_gpytorch_mll(mll, optimizer_kwargs=_FIT)
    return model


@plain_torch()
def posterior_mean_and_variance(model: Surrogate, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Posterior of the mean score on an average example, of each row by itself.

    .. math:: \mu(x) = m + k^T K^{-1} (y - m), \quad \sigma^2(x) = k(x, x) - \| L^{-1} k \|^2, \quad K = L L^T

    with k the covariances of x and the training inputs [Rasmussen2006]_. The model's own posterior
    would compute the covariances of all rows with one another, only to drop them.

    Args:
        model: A fitted surrogate.
        rows: ``n x C`` candidate indices.

    Returns:
        Two tensors of length n, in the units of the observations.

    .. [Rasmussen2006] C. E. Rasmussen, C. Williams. Gaussian Processes for Machine Learning. MIT
        Press 2006, algorithm 2.1.
    """
    inputs = _inputs(model)
    X = rows.to(inputs)
    with quiet_single_thread(), torch.no_grad():
        chunks = [_single(model, part) for part in torch.split(X, max(1, _ENTRIES // len(inputs)))]
        mean, variance = (torch.cat(parts).unsqueeze(-1) for parts in zip(*chunks, strict=True))
        units = units_of(model).untransform(mean, variance.clamp_min(_LEAST_VARIANCE))
    return units[0].squeeze(-1).cpu(), cast(Tensor, units[1]).squeeze(-1).cpu()


@plain_torch()
def joint_posterior(model: Surrogate, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``n x C`` rows at an average example, ``n`` and ``n x n``."""
    X = rows.to(_inputs(model))
    with torch.no_grad():
        posterior = cast(GPyTorchPosterior, model.posterior(X))
        return posterior.mean.squeeze(-1).cpu(), posterior.distribution.covariance_matrix.cpu()


def _inputs(model: Surrogate) -> Tensor:
    """What the covariances of a row are computed with."""
    return cast(Tensor, model.inducing if isinstance(model, SparseGP) else model.train_inputs[0])


def _single(model: Surrogate, X: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of inputs by themselves, in the units of the model."""
    if isinstance(model, SparseGP):
        return cast(SparseGP, model).single(X)
    kernel = model.covar_module
    weights, half = solved(model)
    cross = kernel(model.train_inputs[0], X).to_dense()
    explained = torch.linalg.solve_triangular(half, cross, upper=False).square().sum(dim=0)
    return model.mean_module(X) + weights @ cross, kernel(X, diag=True) - explained


@cached(name="solution")  # type: ignore[untyped-decorator]
def solved(model: SingleTaskGP) -> tuple[Tensor, Tensor]:
    """``K^{-1} (y - m)`` and L, computed once for a fitted model; L is the factor of K."""
    noisy = model.likelihood(model.forward(model.train_inputs[0]))
    half = psd_safe_cholesky(noisy.covariance_matrix)
    residuals = (model.train_targets - noisy.mean).unsqueeze(-1)
    return torch.cholesky_solve(residuals, half).squeeze(-1), half
