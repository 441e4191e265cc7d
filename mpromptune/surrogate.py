"""The Gaussian process over configurations: fitting it, and its posterior of the mean score."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from botorch.exceptions import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import lazily_evaluate_kernels
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.memoize import cached
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from mpromptune.geometry import Geometry
from mpromptune.kernels import PromptKernel, SharedKernel

# NOTE: a step that gains less than a hundred-thousandth of a nat per observation ends a fit. On 100
# trials of 2000 configurations that is after 8 evaluations instead of 11, and moves no posterior mean by
# more than 0.002. The bound on iterations is for the rare fit that creeps along a flat ridge.
_FIT = {"options": {"ftol": 1e-5, "maxiter": 75}}
# Rounding may leave a variance of what is known exactly below zero.
_LEAST_VARIANCE = 1e-12


# Told of a fitted surrogate, and of the measured configuration with its highest posterior mean.
OnRanked = Callable[[SingleTaskGP, Sequence[int]], None]


def unheard(model: SingleTaskGP, leader: Sequence[int]) -> None:
    """The default `OnRanked`: nobody wants to know."""


def on_cpu() -> AbstractContextManager[object]:
    """New tensors on the CPU, whatever the user's default device is.

    Where it is the CPU already nothing is done: torch's own context costs a third of a fit.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def quiet_single_thread() -> Iterator[None]:
    """One torch thread and no advice about scaling: small index-valued GPs need neither.

    Threads cost more than they give below a few thousand points, and they fight with the pool that
    evaluates programs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", NumericalWarning)
            yield
    finally:
        torch.set_num_threads(threads)


def fit(
    train_X: Tensor,
    train_Y: Tensor,
    train_Yvar: Tensor | None,
    geometries: Sequence[Geometry],
    shared: Tensor | None = None,
) -> SingleTaskGP:
    r"""Fits the surrogate by maximum a posteriori (`fit_gpytorch_mll`).

    Args:
        train_X: ``n x (C + 1)`` candidate indices and, last, the observation's index (-1: none).
        train_Y: ``n x 1`` observed values, to be maximised.
        train_Yvar: ``n x 1`` variances of the observations, or None to infer one for all.
        geometries: Distances of the C components.
        shared: Further covariance of the observations, by their indices, in units of ``train_Y`` squared.

    Returns:
        A BoTorch model whose posterior is in the units of ``train_Y``.
    """
    with quiet_single_thread():
        scale = _scale(train_Y)
        kernel = PromptKernel(geometries)
        if shared is not None and len(shared):
            kernel = kernel + SharedKernel(shared / scale**2)
        model = SingleTaskGP(
            train_X,
            train_Y,
            train_Yvar,
            covar_module=kernel,
            outcome_transform=Standardize(m=1),
        )
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        # A fit that fails is tried again from a draw of the priors, by torch's global generator.
        with torch.random.fork_rng(devices=[]), lazily_evaluate_kernels(False):
            torch.manual_seed(0)
            fit_gpytorch_mll(mll, optimizer_kwargs=_FIT)
    return model


def _scale(train_Y: Tensor) -> float:
    """The standard deviation by which BoTorch's `Standardize` divides."""
    deviation = float(train_Y.std()) if len(train_Y) > 1 else 0.0
    return deviation if deviation > 1e-8 else 1.0


def posterior_mean_and_variance(model: SingleTaskGP, rows: Tensor) -> tuple[Tensor, Tensor]:
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
    with torch.no_grad(), quiet_single_thread():
        X, kernel = at_average_example(rows), model.covar_module
        weights, half = solved(model)
        cross = kernel(model.train_inputs[0], X).to_dense()
        mean = model.mean_module(X) + weights @ cross
        explained = torch.linalg.solve_triangular(half, cross, upper=False).square().sum(dim=0)
        variance = kernel(X, diag=True) - explained
    scale = cast(Standardize, model.outcome_transform)
    units = scale.untransform(mean.unsqueeze(-1), variance.clamp_min(_LEAST_VARIANCE).unsqueeze(-1))
    return units[0].squeeze(-1), cast(Tensor, units[1]).squeeze(-1)


@cached(name="solution")  # type: ignore[untyped-decorator]
def solved(model: SingleTaskGP) -> tuple[Tensor, Tensor]:
    """``K^{-1} (y - m)`` and L, computed once for a fitted model; L is the factor of K."""
    noisy = model.likelihood(model.forward(model.train_inputs[0]))
    half = psd_safe_cholesky(noisy.covariance_matrix)
    residuals = (model.train_targets - noisy.mean).unsqueeze(-1)
    return torch.cholesky_solve(residuals, half).squeeze(-1), half


def at_average_example(rows: Tensor) -> Tensor:
    """Appends the index -1: ``... x C`` to ``... x (C + 1)``."""
    return torch.nn.functional.pad(rows.to(torch.float64), (0, 1), value=-1.0)
