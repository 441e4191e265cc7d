r"""Prior covariances of the skills of configurations, by the text of their candidates.

Notation
    G       number of groups; the skill of a configuration is the sum of one latent per group
    n       number of selected latents of a group, given by ``n x c`` rows of candidate indices
    d_cv^2  squared distance between two candidates of component c in view v (see `embedding`)
    w       fraction of the variance explained by similarity; 1 - w is specific to each latent
    l       length-scale of texts, in units of the median distance; 0 compares by identity
    a       standard deviation of a latent, in logits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add, mul
from typing import NamedTuple

import numpy as np

from mpromptune.model.embedding import Geometry
from mpromptune.model.lineage import BESIDE, Lineage, covariance_of, means_of
from mpromptune.model.space import Birth, FloatArray, IndexArray

# NOTE: (w, l). A grid instead of a gradient, because the evidence of some hundred right-or-wrong answers
# distinguishes such values but no finer ones. Without texts, only the shapes with l = 0 are used; these are
# always part of the grid, so that uninformative embeddings cost little.
_SHAPES = ((0.0, 0.0), (0.5, 0.0), (0.5, 0.8), (0.85, 0.6), (0.85, 1.2))
# NOTE: in logits. Prompts of the recorded tables differ by 0.3 to 1.5; the prior is log-normal around 0.7.
_DEVIATIONS = (0.35, 0.7, 1.4)
_TYPICAL_DEVIATION, _SPREAD = 0.7, 0.7
# NOTE: variance, in logits, that all skills share: the difficulty of the task.
_COMMON = 1.0


class Option(NamedTuple):
    """One setting of the hyper-parameters of a group: w, l and a."""

    share: float
    lengthscale: float
    deviation: float

    @property
    def log_prior(self) -> float:
        """Logarithm of the prior: log-normal in the deviation, constant over shapes."""
        return -0.5 * (math.log(self.deviation / _TYPICAL_DEVIATION) / _SPREAD) ** 2


@dataclass(frozen=True)
class Group:
    """Components with joint latents: those of one predictor, or a single component.

    Attributes:
        components: Their columns in a row of candidate indices.
        views: For each component, ``v x m x m`` squared distances between its ``m`` candidates.
        has_text: For each component, whether its first view contains distances of embeddings.
        lineages: For each component, the origins of its candidates.
        common: Variance that all latents of the group share.
    """

    components: tuple[int, ...]
    views: tuple[FloatArray, ...]
    has_text: tuple[bool, ...]
    lineages: tuple[Lineage, ...]
    common: float

    def options(self) -> list[Option]:
        """The settings that the evidence chooses from."""
        shapes = [shape for shape in _SHAPES if shape[1] == 0.0 or any(self.has_text)]
        return [Option(*shape, deviation) for shape, deviation in product(shapes, _DEVIATIONS)]

    def covariance(self, rows: IndexArray, option: Option) -> FloatArray:
        r"""Prior covariance of latents, ``n x n``.

        .. math:: a^2 (w \bar k + (1 - w) 1[i = j]) + \text{common}

        where :math:`\bar k` is the mean of the components' kernels and, if there are several, of their
        product. Proposed candidates are compared by the ones that they descend from; the covariance of what
        they gained since is added (see `lineage`).

        Args:
            rows: ``n x C`` candidate indices.
            option: The hyper-parameters.
        """
        chosen = rows[:, list(self.components)].T
        if any(lineage.births for lineage in self.lineages):
            chosen = np.stack([lin.roots(own) for lin, own in zip(self.lineages, chosen, strict=True)])
        kernels = [
            _similarity(views, has_text, own, option.lengthscale)
            for own, views, has_text in zip(chosen, self.views, self.has_text, strict=True)
        ]
        parts = kernels if len(kernels) == 1 else [*kernels, reduce(mul, kernels)]
        same = (chosen[:, :, None] == chosen[:, None, :]).all(axis=0)
        alike = reduce(add, parts) / len(parts)
        w, variance = option.share, option.deviation**2
        covariance: FloatArray = variance * (w * alike + (1.0 - w) * same) + self.common
        paths, births = self.paths(rows), self.births
        if not births:
            return covariance
        gained = paths @ covariance_of(births) @ paths.T
        if len(self.components) > 1:  # without it, what a child gains beside every demo set would be the same
            gained += np.diag(BESIDE**2 * paths.any(axis=1))
        return covariance + gained

    def centre(self, rows: IndexArray) -> FloatArray:
        """Prior means of latents, for ``n x C`` rows; 0 for those of initial candidates."""
        return self.paths(rows) @ means_of(self.births)

    @property
    def births(self) -> list[Birth]:
        """The candidates added to its components."""
        return [birth for lineage in self.lineages for birth in lineage.births]

    def paths(self, rows: IndexArray) -> FloatArray:
        """Latents x births of the group: 1 where a candidate of the latent has the birth in its ancestry."""
        own = rows[:, list(self.components)].T
        parts = [lineage.paths()[some] for lineage, some in zip(self.lineages, own, strict=True)]
        paths: FloatArray = np.concatenate(parts, axis=1)
        return paths


def _similarity(views: FloatArray, has_text: bool, chosen: IndexArray, lengthscale: float) -> FloatArray:
    r"""``exp(-\sum_v d_v^2 / 2 l_v^2)`` with l for texts and 1 for other views; identity for l = 0."""
    if lengthscale == 0.0 or not len(views):
        same: FloatArray = (chosen[:, None] == chosen[None, :]).astype(np.float64)
        return same
    scales = np.ones(len(views))
    scales[0] = lengthscale if has_text else 1.0
    # A candidate that was added without a parent is unlike all others: its text was not embedded.
    is_new = chosen >= views.shape[-1]
    known = np.where(is_new, 0, chosen) if is_new.any() else chosen
    distances = np.einsum("v,vij->ij", 1.0 / scales**2, views[:, known[:, None], known[None, :]])
    likeness: FloatArray = np.exp(-0.5 * distances)
    if is_new.any():
        likeness[is_new[:, None] | is_new[None, :]] = 0.0
        likeness[chosen[:, None] == chosen[None, :]] = 1.0
    return likeness


def groups_of(
    geometries: Sequence[Geometry], births: Sequence[Sequence[Birth]], max_latents: int, is_product: bool
) -> tuple[Group, ...]:
    """The groups of a space.

    Args:
        geometries: The geometry of each component.
        births: The candidates added to each component.
        max_latents: A predictor with more pairs of candidates than this has a group for each component.
        is_product: Whether every combination of candidates exists; otherwise all components form one group,
            whose latents are the configurations.
    """
    members: dict[int, list[int]] = {}
    for c, geometry in enumerate(geometries):
        members.setdefault(geometry.group if is_product else 0, []).append(c)
    parts: list[list[int]] = []
    for group in members.values():
        size = math.prod(geometries[c].views.shape[-1] for c in group)
        parts += [group] if size <= max_latents or not is_product else [[c] for c in group]
    views = [geometry.views.cpu().numpy() for geometry in geometries]
    return tuple(
        Group(
            components=tuple(part),
            views=tuple(views[c] for c in part),
            has_text=tuple(geometries[c].has_text for c in part),
            lineages=tuple(Lineage(geometries[c].views.shape[-1], births[c]) for c in part),
            common=_COMMON / len(parts),
        )
        for part in parts
    )
