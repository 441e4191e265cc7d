r"""The surrogate of thousands of trials: a Gaussian process through inducing points.

Notation
    Z       M inducing points; K_uu, K_uf their covariances with one another and with the n observations
    D       diagonal: noise of the observations, and what Z does not explain of them
    A       L^{-1} K_uf D^{-1/2} with K_uu = L L^T; its left singular vectors U, A A^T = U diag(s) U^T
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms import Standardize
from botorch.models.utils.inducing_point_allocators import GreedyVarianceReduction
from botorch.posteriors import GPyTorchPosterior, Posterior
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import Mean
from linear_operator import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

# NOTE: configurations that the spread half of the inducing points is chosen among, for each of these.
_POOL = 3
# NOTE: observations whose covariances with the inducing points are computed at once: 8 MB an array.
_COLUMNS = 2048


@dataclass(frozen=True)
class Observations:
    """Inputs, values and noise: ``n x C``, ``n x 1``, and ``n x 1`` or None (to be inferred)."""

    X: Tensor
    Y: Tensor
    Yvar: Tensor | None

    def __len__(self) -> int:
        return len(self.X)

    def at(self, index: Tensor) -> Observations:
        """Some of them."""
        return Observations(self.X[index], self.Y[index], None if self.Yvar is None else self.Yvar[index])

    def to(self, device: torch.device) -> Observations:
        """The same, on a device."""
        noise = None if self.Yvar is None else self.Yvar.to(device)
        return Observations(self.X.to(device), self.Y.to(device), noise)


class SparseGP(Model):
    r"""The posterior of all observations under the hyper-parameters of a fitted exact model (FITC).

    .. math:: \mu(x) = m + k_u^T L^{-T} U (I + S)^{-1} U^T A D^{-1/2} (y - m), \quad
        cov(x, x') = k(x, x') - k_u^T R^T R k_u', \quad R = (S / (I + S))^{1/2} U^T L^{-1}

    [Snelson2006]_ [Titsias2009]_. Where every configuration is an inducing point, this is the exact
    posterior. After :math:`O(n M^2)` once, a configuration takes :math:`O(M^2)`, whatever n is; GPyTorch's
    `InducingPointKernel` has the same posterior, and covariances with all n for every batch.

    Args:
        fitted: For kernel, mean, units and, where no variances are known, noise.
        observed: All of them, in the units of the scores.
        inducing: ``M x C`` indices.

    .. [Snelson2006] E. Snelson, Z. Ghahramani. Sparse Gaussian Processes using Pseudo-inputs. NeurIPS 2006.
    .. [Titsias2009] M. Titsias. Variational Learning of Inducing Variables in Sparse Gaussian Processes.
        AISTATS 2009.
    """

    kernel: Kernel
    mean: Mean
    units: Standardize
    inducing: Tensor

    def __init__(self, fitted: SingleTaskGP, observed: Observations, inducing: Tensor) -> None:
        super().__init__()
        self.kernel, self.mean, self.units = fitted.covar_module, fitted.mean_module, units_of(fitted)
        self.inducing = inducing
        with torch.no_grad():
            values, noise = standardised(fitted, observed)
            half = psd_safe_cholesky(self.kernel(inducing, inducing).to_dense())
            parts = torch.split(observed.X, _COLUMNS)
            cross = torch.cat([self.kernel(inducing, part).to_dense() for part in parts], dim=-1)
            whitened = torch.linalg.solve_triangular(half, cross, upper=False)
            unexplained = self.kernel(observed.X, diag=True) - whitened.square().sum(dim=0)
            deviation = (noise + unexplained.clamp_min(0.0)).sqrt()
            scaled = whitened / deviation
            s, u = torch.linalg.eigh(scaled @ scaled.T)
            s = s.clamp_min(0.0)
            residuals = (values - self.mean(observed.X)) / deviation
            back = torch.linalg.solve_triangular(half.T, u, upper=True).T  # U^T L^{-1}
            self.weights = (u.T @ (scaled @ residuals) / (1.0 + s)) @ back
            self.root = (s / (1.0 + s)).sqrt().unsqueeze(-1) * back

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    def single(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of inputs by themselves, standardised."""
        cross = self.kernel(self.inducing, X).to_dense()
        explained = (self.root @ cross).square().sum(dim=0)
        return self.mean(X) + self.weights @ cross, self.kernel(X, diag=True) - explained

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Joint, of ``n x C`` inputs, in the units of the scores."""
        cross = self.kernel(self.inducing, X).to_dense()
        explained = self.root @ cross
        covariance = self.kernel(X, X).to_dense() - explained.T @ explained
        mean = self.mean(X) + self.weights @ cross
        posterior = self.units.untransform_posterior(
            GPyTorchPosterior(MultivariateNormal(mean, to_linear_operator(covariance)))
        )
        return posterior if posterior_transform is None else posterior_transform(posterior)


def units_of(model: SingleTaskGP | SparseGP) -> Standardize:
    """What stands between the units of the model and those of the scores."""
    return cast(Standardize, model.units if isinstance(model, SparseGP) else model.outcome_transform)


def standardised(fitted: SingleTaskGP, observed: Observations) -> tuple[Tensor, Tensor]:
    """Values and noise variances in the units of a fitted model, n each."""
    values, noise = units_of(fitted)(observed.Y, observed.Yvar)
    if noise is None:
        noise = cast(GaussianLikelihood, fitted.likelihood).noise.detach().expand_as(values)
    return values.squeeze(-1), noise.squeeze(-1)


def inducing_points(fitted: SingleTaskGP, observed: Observations, count: int) -> Tensor:
    """At most ``count`` of the configurations that were observed, ``M x C``.

    Where there are more, half of the points are those of the highest means of their own, shrunk by their
    noise (what is asked of a search is which of them is best), and half are spread over others by
    `GreedyVarianceReduction`. A function of what was observed alone.
    """
    rows, owner = torch.unique(observed.X, dim=0, return_inverse=True)
    if len(rows) <= count:
        return cast(Tensor, rows)
    own = _own_means(*standardised(fitted, observed), owner, len(rows))
    best = own.argsort(descending=True, stable=True)
    others = best[count // 2 :]
    spread = torch.linspace(0, len(others) - 1, min(len(others), _POOL * count), device=rows.device)
    pool = rows[others[spread.round().long()].sort().values]
    allocator, room = GreedyVarianceReduction(), count - count // 2
    chosen = allocator.allocate_inducing_points(pool, fitted.covar_module, room, torch.Size())
    return torch.cat([rows[best[: count // 2]], chosen])


def _own_means(values: Tensor, noise: Tensor, owner: Tensor, n: int) -> Tensor:
    """Posterior means of n configurations from their own observations alone, under a variance of 1."""
    precision = torch.zeros(n, dtype=values.dtype, device=values.device).index_add_(0, owner, 1.0 / noise)
    total = torch.zeros_like(precision).index_add_(0, owner, values / noise)
    means: Tensor = total / (precision + 1.0)
    return means
