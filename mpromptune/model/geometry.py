"""How far apart the candidates of each component are: the distances that kernels look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import Embedder
from mpromptune.model.space import Candidate, FloatArray, PromptSpace


@dataclass(frozen=True)
class Geometry:
    """Squared distances between the ``n`` candidates of one component.

    Attributes:
        views: ``v x n x n``; one slice per view of a candidate (its text, the number of its demos),
            each divided by its median. With ``v = 0`` candidates are only the same or different.
        group: The predictor that the component belongs to.
        has_text: Whether the first view is that of texts' embeddings.
    """

    views: Tensor
    group: int
    has_text: bool = False

    @plain_torch()
    def mean_distances(self) -> FloatArray:
        """Squared distances, the mean over views; without any, 1 between different candidates: ``n x n``."""
        if not len(self.views):
            return 1.0 - np.eye(self.views.shape[-1])
        distances: FloatArray = self.views.mean(dim=0).cpu().numpy()
        return distances


def geometry_of(space: PromptSpace, embedder: Embedder | None) -> tuple[Geometry, ...]:
    """The geometry of every component; with ``embedder`` None, by identity alone.

    The embedder sees every distinct text once: the cost is the sum of the candidates, never
    their product.
    """
    components = zip(space.components.values(), space.groups, strict=True)
    return tuple(_geometry(candidates, embedder, group) for candidates, group in components)


def _geometry(candidates: Sequence[Candidate], embedder: Embedder | None, group: int) -> Geometry:
    if embedder is None:
        return Geometry(identity_views(len(candidates)), group)
    if all(isinstance(candidate, str) for candidate in candidates):
        views = point_views(embedder([str(candidate) for candidate in candidates]))
        return Geometry(views, group, has_text=len(views) > 0)
    sets = [(c,) if isinstance(c, str) else tuple(c) for c in candidates]
    text, size = _set_points(sets, embedder)
    return Geometry(point_views(text, size), group, has_text=bool(squared_distances(text).any()))


def _set_points(sets: Sequence[Sequence[str]], embedder: Embedder) -> tuple[FloatArray, FloatArray]:
    """Two views of a demo set: the mean embedding of its demos, and how many they are."""
    counts = np.array([len(demos) for demos in sets])
    texts = [text for demos in sets for text in demos]
    if not texts:
        return np.zeros((len(sets), 1)), np.zeros((len(sets), 1))
    vectors = embedder(texts)
    pooled = np.zeros((len(sets), vectors.shape[1]))
    np.add.at(pooled, np.repeat(np.arange(len(sets)), counts), vectors)
    pooled /= np.maximum(counts, 1.0)[:, None]
    # Zero-shot against few-shot is a step of its own, larger than one demo more or less.
    return pooled, np.stack([counts / counts.max(), counts > 0], axis=1)


@plain_torch()
def identity_views(n: int) -> Tensor:
    """No view at all: ``0 x n x n``."""
    return torch.empty(0, n, n, dtype=torch.float64, device="cpu")


@plain_torch()
def point_views(*points: FloatArray) -> Tensor:
    """A view for each array of points, ``n x d``, that tells at least two of them apart."""
    useful = [view for view in map(squared_distances, points) if view.any()]
    return torch.from_numpy(np.stack(useful)) if useful else identity_views(len(points[0]))


def squared_distances(points: FloatArray) -> FloatArray:
    """``n x d`` points to ``n x n`` squared distances, scaled to a median of 1 where they differ."""
    squares = (points**2).sum(axis=1)
    distances: FloatArray = np.maximum(squares[:, None] + squares[None, :] - 2.0 * points @ points.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    apart = distances[distances > 1e-9]
    return distances / float(np.median(apart)) if apart.size else distances
