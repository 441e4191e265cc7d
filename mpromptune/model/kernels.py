r"""Covariances over index-valued inputs, by the texts behind the indices.

Notation
    C       number of components; the columns of an input are candidate indices
    d_cv^2  squared distance between two candidates of component c in view v (see `geometry`)
    k_c     component kernel, in [0, 1]
    k_g     group (predictor) kernel
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add, mul
from typing import Any, cast

import torch
from gpytorch.kernels import Kernel
from gpytorch.priors import NormalPrior
from torch import Tensor

from mpromptune.model.geometry import Geometry

# Priors, in units of the standard deviation of the observed trial values. All positive
# hyper-parameters are optimised as logarithms, so a normal prior is a log-normal one.
#
# NOTE: d^2 has median 1, so a length-scale of 1 gives a typical pair a correlation of 0.6. The
# factor e^0.5 of prior spread covers 0.4 to 2.7 within two standard deviations.
_LOG_LENGTHSCALE = (0.0, 0.5)
# NOTE: on the real tables the instructions' main effect, the demos' and what is left over are of
# the same order; a deviation of 1 lets the data move each variance by a factor of 7 either way.
_LOG_VARIANCE = (math.log(0.3), 1.0)
# NOTE: predictors act mostly on their own; their interaction starts at a tenth of that.
_LOG_INTERACTION = (math.log(0.05), 1.0)
# NOTE: softmax logits of (views..., identity). A priori half of a component is what no view explains, however
# many there are: with equal shares for all, embeddings that say nothing cost 0.3 points on GSM8K s43 (0.81 +-
# 0.16; 0.58 +- 0.13 with half, 0.51 +- 0.12 without texts; 60 seeds). Where they say much nothing is lost:
# -0.09 +- 0.06 on four tables, 70 seeds each.
_LOGIT = 1.0


def _add(module: Kernel, name: str, shape: Sequence[int], prior: tuple[float | Tensor, float]) -> None:
    """Registers a parameter that starts at the mode of its normal prior; one for all, or one for each."""
    mode = torch.as_tensor(prior[0], dtype=torch.float64)
    value = mode.expand(tuple(shape)).clone()
    module.register_parameter(name, torch.nn.Parameter(value))
    if value.numel():
        module.register_prior(f"{name}_prior", NormalPrior(*prior), name)


def _lookup(table: Tensor, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
    """``table[..., x1, x2]`` for every pair (or, with ``diag``, position by position)."""
    if diag:
        return table[..., x1, x2]
    if x1.dim() == x2.dim() == 1:  # columns, then rows: many times faster than indexing pair by pair
        return table.index_select(-1, x2).index_select(-2, x1)
    return table[..., x1.unsqueeze(-1), x2.unsqueeze(-2)]


class ComponentKernel(Kernel):
    r"""Covariance of the candidates of one component.

    .. math:: k_c(i, j) = \sum_v w_v \exp(-d_{cv}^2(i, j) / 2 \ell_v^2) + w_0 1[i = j]

    with weights ``w`` on the simplex. The identity part is what the views cannot explain: where
    texts say nothing, ``w_0`` takes over and the kernel is no worse than one without texts.

    Args:
        views: ``v x n x n`` squared distances.
    """

    is_stationary = False
    views: Tensor
    identity: Tensor

    def __init__(self, views: Tensor) -> None:
        super().__init__()
        self.register_buffer("views", views)
        self.register_buffer("identity", torch.eye(views.shape[-1], dtype=torch.float64))
        self._fitted: Tensor | None = None
        _add(self, "log_lengthscale", (len(views),), _LOG_LENGTHSCALE)
        modes = torch.zeros(len(views) + 1, dtype=torch.float64)
        modes[-1] = math.log(max(1, len(views)))
        _add(self, "logits", modes.shape, (modes, _LOGIT))

    def train(self, mode: bool = True) -> ComponentKernel:
        """Hyper-parameters may change from here on, or may have."""
        self._fitted = None
        return cast(ComponentKernel, super().train(mode))

    def table(self) -> Tensor:
        """The whole covariance, ``n x n``; of a fitted kernel it is computed once."""
        if self.training or torch.is_grad_enabled():
            return self._table()
        if self._fitted is None:
            self._fitted = self._table()
        return self._fitted

    def _table(self) -> Tensor:
        weights = torch.softmax(self.logits, dim=0)
        scales = 2.0 * torch.exp(2.0 * self.log_lengthscale)
        similar = torch.exp(-self.views / scales.view(-1, 1, 1))
        text: Tensor = (weights[:-1].view(-1, 1, 1) * similar).sum(dim=0)
        return text + weights[-1] * self.identity

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        """``... x n x 1`` and ``... x m x 1`` indices to ``... x n x m`` covariances."""
        return _lookup(self.table(), x1[..., 0].long(), x2[..., 0].long(), diag)


class PromptKernel(Kernel):
    r"""Covariance of configurations, by the text of their components.

    Within a predictor, a weighted sum of its components and, where it has several, their product;
    across predictors, the sum of these and a small interaction of every pair:

    .. math::
        k_g = \sum_{c \in g} a_c k_c + a_{g} \prod_{c \in g} k_c, \qquad
        k = \sum_g k_g + a_\times \binom{G}{2}^{-1} \sum_{g < h} \bar k_g \bar k_h

    where :math:`\bar k_g = k_g / k_g(x, x)`.

    Args:
        geometries: One per component, in the order of the input's columns.
    """

    is_stationary = False

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        super().__init__()
        self.components = torch.nn.ModuleList(ComponentKernel(g.views) for g in geometries)
        groups = [g.group for g in geometries]
        self.members = [[c for c, g in enumerate(groups) if g == group] for group in sorted(set(groups))]
        share = math.log(len(self.members))
        main, product = _LOG_VARIANCE[0] - share, _LOG_VARIANCE[1]
        _add(self, "log_variance", (len(geometries),), (main, product))
        _add(self, "log_product", (len(self.members),), (main, product))
        if len(self.members) > 1:
            _add(self, "log_interaction", (), _LOG_INTERACTION)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        """``... x n x C`` and ``... x m x C`` indices to ``... x n x m`` covariances."""
        i1, i2 = (x[..., : len(self.components)].long() for x in (x1, x2))
        if diag or i1.dim() > 2 or i2.dim() > 2 or not torch.equal(i1, i2):
            return self._covariance(i1, i2, diag)
        # Many trials are of one configuration, on several blocks: a quarter of the work where it is half.
        distinct, position = torch.unique(i1, dim=0, return_inverse=True)
        return _lookup(self._covariance(distinct, distinct, False), position, position, False)

    def _covariance(self, i1: Tensor, i2: Tensor, diag: bool) -> Tensor:
        """Sum of the groups and of the products of all pairs, from power sums: e_2 = (s_1^2 - s_2) / 2."""
        sums: list[Tensor] = []
        for group in range(len(self.members)):  # one after the other: no array is larger than the result
            covariance, variance = self._group(group, i1, i2, diag)
            parts = [covariance]
            if len(self.members) > 1:
                normal = covariance / variance
                parts += [normal, normal**2]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        total = sums[0]
        if len(self.members) > 1:
            pairs = math.comb(len(self.members), 2)
            total = total + torch.exp(self.log_interaction) * ((sums[1] ** 2 - sums[2]) / 2) / pairs
        return total if diag else total.expand(*total.shape[:-1], i2.shape[-2])

    def _group(self, group: int, i1: Tensor, i2: Tensor, diag: bool) -> tuple[Tensor, Tensor]:
        """Covariances of one group, and its variance (the covariance of a point with itself)."""
        members = self.members[group]
        i1, i2 = i1[..., members], i2[..., members] if diag else _once(i2[..., members])
        kernels = [cast(ComponentKernel, self.components[c]) for c in members]
        tables = [_lookup(k.table(), i1[..., j], i2[..., j], diag) for j, k in enumerate(kernels)]
        variance = torch.exp(self.log_variance[members])
        covariance = reduce(add, (v * table for v, table in zip(variance, tables, strict=True)))
        if len(members) == 1:
            return covariance, variance.sum()
        product = torch.exp(self.log_product[group])
        return covariance + product * reduce(mul, tables), variance.sum() + product


def _once(rows: Tensor) -> Tensor:
    """The first of rows that are all the same: a local search changes one component of many."""
    return rows[:1] if rows.dim() == 2 and bool((rows == rows[:1]).all()) else rows
