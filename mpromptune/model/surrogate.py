r"""The surrogate for plain Optuna studies, with one value per trial: a Gaussian process over configurations.

Notation
    C       components; the columns of an input are candidate indices
    d_cv^2  squared distance between two candidates of component c in view v (see `embedding`)
    k_c     component kernel, in [0, 1]; k_g group (predictor) kernel
    K_zf    covariances of the M inducing points Z with the n observed configurations

This is own code because GPyTorch has neither a kernel over indices that looks up tables computed once per
fit, nor the posterior of single rows without the covariances between all rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import Any, cast

import torch
from botorch.exceptions import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.inducing_point_allocators import GreedyVarianceReduction
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import NormalPrior
from gpytorch.settings import lazily_evaluate_kernels
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import Geometry

# Priors, in units of the standard deviation of the observed trial values. All positive
# hyper-parameters are optimised as logarithms, so a normal prior is a log-normal one.
#
# NOTE: d^2 has median 1, so a length-scale of 1 gives a typical pair a correlation of 0.6. The prior standard
# deviation of 0.5 covers 0.4 to 2.7 within two standard deviations.
_LOG_LENGTHSCALE = (0.0, 0.5)
# NOTE: on the real tables the main effects of instructions and of demos and the residual are of the same
# order; a standard deviation of 1 lets the data change each variance by a factor of 7 up or down.
_LOG_VARIANCE = (math.log(0.3), 1.0)
# NOTE: predictors act mostly independently; their interaction starts at a tenth of their variance.
_LOG_INTERACTION = (math.log(0.05), 1.0)
# NOTE: prior of the softmax logits of (views..., identity). A priori no view explains half of a component's
# variance, for any number of views: with equal weights for all, uninformative embeddings cost 0.3 points on
# GSM8K s43 (0.81 +- 0.16; 0.58 +- 0.13 with half, 0.51 +- 0.12 without texts; 60 seeds). With informative
# ones nothing is lost: -0.09 +- 0.06 on four tables, 70 seeds each.
_LOGIT = 1.0
# NOTE: a fit ends when a step gains less than 1e-5 nats per observation. On 100 trials of 2000 configurations
# this takes 8 evaluations instead of 11, and changes no posterior mean by more than 0.002. The limit on
# iterations is for the rare fit that moves slowly along a flat ridge.
_FIT = {"options": {"ftol": 1e-5, "maxiter": 75}}
# NOTE: most observations for an exact fit, which takes n^3 steps. With more, the hyper-parameters are fitted
# to this many, and the model has this many inducing points.
_EXACT = 512
# NOTE: number of configurations per inducing point among which the spread half of these points is chosen.
_POOL = 3
# NOTE: number of rows whose covariances with the points are computed at once: 8 MB per array.
_ROWS = 2048
# Rounding may make the variance of a known value negative, and the scale of equal values positive.
_LEAST_VARIANCE, _LEAST_SCALE = 1e-12, 1e-8


class PromptKernel(Kernel):
    r"""Covariance of configurations, by the texts of their candidates.

    For the candidates of one component, with weights :math:`w` on the simplex,

    .. math:: k_c(i, j) = \sum_v w_v \exp(-d_{cv}^2(i, j) / 2 \ell_v^2) + w_0 1[i = j]

    The identity part is the variance that the views do not explain: if texts are not informative,
    :math:`w_0` dominates, and the kernel is no worse than one without texts. The kernel of a predictor is a
    weighted sum of the kernels of its components and, if there are several, of their product. The kernel of
    the program is the sum over predictors and a small interaction of every pair:

    .. math::
        k_g = \sum_{c \in g} a_c k_c + a_{g} \prod_{c \in g} k_c, \qquad
        k = \sum_g k_g + a_\times \binom{G}{2}^{-1} \sum_{g < h} \bar k_g \bar k_h

    where :math:`\bar k_g = k_g / k_g(x, x)`.

    Args:
        geometries: The geometry of each component, in the order of the input's columns.
    """

    is_stationary = False

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        super().__init__()
        self.views = [geometry.views for geometry in geometries]
        groups = [geometry.group for geometry in geometries]
        self.members = [[c for c, g in enumerate(groups) if g == group] for group in sorted(set(groups))]
        self._frozen: list[Tensor] | None = None
        variance = (_LOG_VARIANCE[0] - math.log(len(self.members)), _LOG_VARIANCE[1])
        self._add("log_variance", (len(geometries),), variance)
        self._add("log_product", (len(self.members),), variance)
        if len(self.members) > 1:
            self._add("log_interaction", (), _LOG_INTERACTION)
        for c, views in enumerate(self.views):
            self._add(f"log_lengthscale_{c}", (len(views),), _LOG_LENGTHSCALE)
            modes = torch.zeros(len(views) + 1, dtype=torch.float64)
            modes[-1] = math.log(max(1, len(views)))
            self._add(f"logits_{c}", modes.shape, (modes, _LOGIT))

    def _add(self, name: str, shape: Sequence[int], prior: tuple[float | Tensor, float]) -> None:
        """Register a parameter that starts at the mode of its normal prior."""
        value = torch.as_tensor(prior[0], dtype=torch.float64).expand(tuple(shape)).clone()
        self.register_parameter(name, torch.nn.Parameter(value))
        if value.numel():
            self.register_prior(f"{name}_prior", NormalPrior(*prior), name)

    def freeze(self) -> None:
        """Fix the hyper-parameters, and compute the covariances of candidates once."""
        with torch.no_grad():
            self._frozen = [self.table(c) for c in range(len(self.views))]

    def table(self, component: int) -> Tensor:
        """k_c of all candidates of a component, ``n x n``."""
        if self._frozen is not None:
            return self._frozen[component]
        views = self.views[component]
        weights = torch.softmax(getattr(self, f"logits_{component}"), dim=0)
        scales = 2.0 * torch.exp(2.0 * getattr(self, f"log_lengthscale_{component}"))
        similar = torch.exp(-views / scales.view(-1, 1, 1))
        text: Tensor = (weights[:-1].view(-1, 1, 1) * similar).sum(dim=0)
        return text + weights[-1] * torch.eye(views.shape[-1], dtype=views.dtype, device=views.device)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        """``... x n x C`` and ``... x m x C`` indices to ``... x n x m`` covariances."""
        i1, i2 = (x[..., : len(self.views)].long() for x in (x1, x2))
        if diag or i1.dim() > 2 or i2.dim() > 2 or not torch.equal(i1, i2):
            return self._covariance(i1, i2, diag)
        # Several trials may have one configuration, so only distinct rows are computed.
        distinct, position = torch.unique(i1, dim=0, return_inverse=True)
        return _lookup(self._covariance(distinct, distinct, False), position, position, False)

    def _covariance(self, i1: Tensor, i2: Tensor, diag: bool) -> Tensor:
        """Sum over groups and over products of all pairs, from power sums: e_2 = (s_1^2 - s_2) / 2."""
        sums: list[Tensor] = []
        for group in range(len(self.members)):  # in a loop, so that no array is larger than the result
            covariance, variance = self._group(group, i1, i2, diag)
            normal = covariance / variance
            parts = [covariance, normal, normal**2]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        total = sums[0]
        if len(self.members) > 1:
            pairs = math.comb(len(self.members), 2)
            total = total + torch.exp(self.log_interaction) * ((sums[1] ** 2 - sums[2]) / 2) / pairs
        return total if diag else total.expand(*total.shape[:-1], i2.shape[-2])

    def _group(self, group: int, i1: Tensor, i2: Tensor, diag: bool) -> tuple[Tensor, Tensor]:
        """Covariances of one group, and its variance (the covariance of a point with itself)."""
        members = self.members[group]
        i1, i2 = i1[..., members], i2[..., members] if diag else _first_if_equal(i2[..., members])
        tables = [_lookup(self.table(c), i1[..., j], i2[..., j], diag) for j, c in enumerate(members)]
        variance = torch.exp(self.log_variance[members])
        covariance = reduce(add, (v * table for v, table in zip(variance, tables, strict=True)))
        if len(members) == 1:
            return covariance, variance.sum()
        product = torch.exp(self.log_product[group])
        return covariance + product * reduce(mul, tables), variance.sum() + product


def _lookup(table: Tensor, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
    """``table[x1, x2]`` for every pair, or with ``diag`` elementwise."""
    if diag:
        return table[x1, x2]
    if x1.dim() == x2.dim() == 1:  # selecting columns and then rows is much faster than indexing pairs
        return table.index_select(-1, x2).index_select(-2, x1)
    return table[x1.unsqueeze(-1), x2.unsqueeze(-2)]


def _first_if_equal(rows: Tensor) -> Tensor:
    """The first row if all are equal, as for the components that a local search does not change."""
    return rows[:1] if rows.dim() == 2 and bool((rows == rows[:1]).all()) else rows


@dataclass(frozen=True)
class Surrogate:
    r"""A fitted Gaussian process: the posterior of the mean score, given through M points.

    .. math:: \mu(x) = m + w^T k_x, \quad cov(x, x') = k(x, x') - v_x^T v_{x'}, \quad v_x = B L^{-1} k_x

    with :math:`k_x` the covariances of x with the points. Rows may be on any device; results are on the CPU
    and in the units of the observations.

    Attributes:
        model: The kernel, the prior mean and the noise, in units of ``scale``.
        points: ``M x C`` candidate indices.
        weights: w, of length M.
        half: L, lower triangular.
        basis: B, ``M x M``; None for the identity.
        centre: Mean of the observations.
        scale: Standard deviation of the observations.
    """

    model: SingleTaskGP
    points: Tensor
    weights: Tensor
    half: Tensor
    basis: Tensor | None
    centre: Tensor
    scale: Tensor

    @plain_torch()
    @torch.no_grad()
    def single(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of ``N x C`` rows: two tensors of length N."""
        X = rows.to(self.points)
        mean, explained = self._explained(X)
        variance = self.model.covar_module(X, diag=True) - explained.square().sum(dim=0)
        return mean.cpu(), (variance.clamp_min(_LEAST_VARIANCE) * self.scale**2).cpu()

    @plain_torch()
    @torch.no_grad()
    def joint(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means and covariances of ``N x C`` rows: ``N`` and ``N x N``."""
        X = rows.to(self.points)
        mean, explained = self._explained(X)
        covariance = self.model.covar_module(X, X).to_dense() - explained.T @ explained
        return mean.cpu(), (covariance * self.scale**2).cpu()

    def _explained(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means, and v of all rows, ``M x N``."""
        cross = _cross(self.model.covar_module, self.points, X)
        v = torch.linalg.solve_triangular(self.half, cross, upper=False)
        mean = self.model.mean_module(X) + self.weights @ cross
        return self.centre + self.scale * mean, v if self.basis is None else self.basis @ v


def _cross(kernel: Kernel, points: Tensor, X: Tensor) -> Tensor:
    """Covariances ``M x N``, computed in parts."""
    return torch.cat([kernel(points, part).to_dense() for part in torch.split(X, _ROWS)], dim=-1)


@contextmanager
def quiet_single_thread() -> Iterator[None]:
    """`plain_torch` without warnings about the scaling of inputs, which does not matter for indices."""
    with plain_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore", InputDataWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        yield


@plain_torch()
def fit(train_X: Tensor, train_Y: Tensor, geometries: Sequence[Geometry]) -> Surrogate:
    r"""Fit the surrogate by maximum a posteriori (`fit_gpytorch_mll`).

    With up to 512 observations the posterior is exact: :math:`w = K^{-1} (y - m)`, :math:`K = L L^T`, where K
    is their covariance including noise [Rasmussen2006]_. With more, the hyper-parameters are fitted to 512
    evenly spread ones, and the posterior of all is computed through at most 512 inducing points.

    Args:
        train_X: ``n x C`` candidate indices.
        train_Y: ``n x 1`` observed values, which are maximised.
        geometries: Distances of the C components; the model is on their device.

    .. [Rasmussen2006] C. E. Rasmussen, C. Williams. Gaussian Processes for Machine Learning. MIT
        Press 2006, algorithm 2.1.
    """
    device = geometries[0].views.device
    X, y = train_X.to(device), train_Y.to(device).squeeze(-1)
    centre, scale = y.mean(), y.std() if len(y) > 1 else torch.ones_like(y[0])
    scale = torch.where(scale >= _LEAST_SCALE, scale, 1.0)
    y = (y - centre) / scale
    evenly = torch.linspace(0, len(X) - 1, min(len(X), _EXACT), dtype=torch.float64, device=device)
    with quiet_single_thread():
        model = _fitted(X[evenly.round().long()], y[evenly.round().long()], PromptKernel(geometries))
        with torch.no_grad():
            posterior = _exact if len(X) <= _EXACT else _through_points
            points, weights, half, basis = posterior(model, X, y)
            return Surrogate(model, points, weights, half, basis, centre, scale)


def _fitted(X: Tensor, y: Tensor, kernel: Kernel) -> SingleTaskGP:
    """A model with the maximum-a-posteriori hyper-parameters."""
    model = SingleTaskGP(X, y.unsqueeze(-1), covar_module=kernel, outcome_transform=None).to(X)
    # A fit that fails is repeated from a draw of the priors, which uses torch's global generator.
    with torch.random.fork_rng(devices=[]), lazily_evaluate_kernels(False):
        torch.manual_seed(0)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=_FIT)
    kernel.freeze()
    return model


def _exact(model: SingleTaskGP, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The exact posterior, whose points are the observations."""
    half = psd_safe_cholesky(
        model.covar_module(X, X).to_dense() + model.likelihood.noise * torch.eye(len(X)).to(X)
    )
    residuals = (y - model.mean_module(X)).unsqueeze(-1)
    return X, torch.cholesky_solve(residuals, half).squeeze(-1), half, None


def _through_points(
    model: SingleTaskGP, X: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    r"""The posterior of all observations through inducing points Z (FITC).

    With :math:`K_{zz} = L L^T`, D the diagonal matrix of the noise plus the variance of each observation that
    the points do not explain, :math:`A = L^{-1} K_{zf} D^{-1/2}` and :math:`A A^T = U S U^T`,

    .. math:: w = L^{-T} U (I + S)^{-1} U^T A D^{-1/2} (y - m), \quad B = (S / (I + S))^{1/2} U^T

    [Snelson2006]_ [Titsias2009]_. If every configuration is an inducing point, the posterior is exact. The
    posterior of a configuration takes :math:`O(M^2)`, independent of n. GPyTorch's `InducingPointKernel`
    gives the same posterior, but computes covariances with all n for every batch.

    .. [Snelson2006] E. Snelson, Z. Ghahramani. Sparse Gaussian Processes using Pseudo-inputs. NeurIPS 2006.
    .. [Titsias2009] M. Titsias. Variational Learning of Inducing Variables in Sparse Gaussian Processes.
        AISTATS 2009.
    """
    kernel, points = model.covar_module, inducing_points(model, X, y, _EXACT)
    half = psd_safe_cholesky(kernel(points, points).to_dense())
    whitened = torch.linalg.solve_triangular(half, _cross(kernel, points, X), upper=False)
    unexplained = kernel(X, diag=True) - whitened.square().sum(dim=0)
    deviation = (model.likelihood.noise + unexplained.clamp_min(0.0)).sqrt()
    scaled = whitened / deviation
    s, u = torch.linalg.eigh(scaled @ scaled.T)
    s = s.clamp_min(0.0)
    means = u @ ((u.T @ (scaled @ ((y - model.mean_module(X)) / deviation))) / (1.0 + s))
    weights = torch.linalg.solve_triangular(half.T, means.unsqueeze(-1), upper=True).squeeze(-1)
    return points, weights, half, (s / (1.0 + s)).sqrt().unsqueeze(-1) * u.T


def inducing_points(model: SingleTaskGP, X: Tensor, y: Tensor, count: int) -> Tensor:
    """At most ``count`` of the observed configurations, ``M x C``.

    If there are more, half of the points are those with the highest observed means, shrunk by their noise
    (because a search needs to know which one is best), and half are spread over the others by
    `GreedyVarianceReduction`. The result depends only on the observations.
    """
    rows, owner, counts = torch.unique(X, dim=0, return_inverse=True, return_counts=True)
    if len(rows) <= count:
        return cast(Tensor, rows)
    totals = torch.zeros(len(rows)).to(X).index_add_(0, owner, y)
    best = (totals / (counts + model.likelihood.noise)).argsort(descending=True, stable=True)
    others = best[count // 2 :]
    spread = torch.linspace(0, len(others) - 1, min(len(others), _POOL * count), device=rows.device)
    pool = rows[others[spread.round().long()].sort().values]
    room = count - count // 2
    chosen = GreedyVarianceReduction().allocate_inducing_points(pool, model.covar_module, room, torch.Size())
    return torch.cat([rows[best[: count // 2]], chosen])
