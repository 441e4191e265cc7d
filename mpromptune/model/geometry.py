"""How far apart the candidates of each component are: the distances that kernels look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import CachedEmbedder, FloatArray
from mpromptune.model.space import Candidate, PromptSpace


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
    def on(self, device: torch.device) -> Geometry:
        """The same, on a device."""
        return replace(self, views=self.views.to(device))


def geometry_of(space: PromptSpace, embedder: CachedEmbedder | None) -> tuple[Geometry, ...]:
    """The geometry of every component; with ``embedder`` None, by identity alone.

    The embedder sees every distinct text once: the cost is the sum of the candidates, never
    their product.
    """
    return tuple(
        _geometry(candidates, embedder, group)
        for candidates, group in zip(space.components.values(), space.groups, strict=True)
    )


@plain_torch()
def identity_views(n: int) -> Tensor:
    """No view at all: ``0 x n x n``."""
    return torch.empty(0, n, n, dtype=torch.float64, device="cpu")


def numeric_views(values: Sequence[float]) -> Tensor:
    """One view: the values' squared differences, ``1 x n x n``."""
    return _stack([squared_distances(np.asarray(values, dtype=np.float64)[:, None])])


def text_views(texts: Sequence[str], embedder: CachedEmbedder) -> Tensor:
    """One view: the squared distances of the texts' embeddings, ``1 x n x n``."""
    return _stack([squared_distances(embedder(texts))])


@plain_torch()
def mean_distances(geometry: Geometry) -> FloatArray:
    """Squared distances, the mean over views; without any, 1 between different candidates: ``n x n``."""
    if not len(geometry.views):
        return 1.0 - np.eye(geometry.views.shape[-1])
    distances: FloatArray = geometry.views.mean(dim=0).cpu().numpy()
    return distances


def _geometry(candidates: Sequence[Candidate], embedder: CachedEmbedder | None, group: int) -> Geometry:
    if embedder is None:
        return Geometry(identity_views(len(candidates)), group)
    if all(isinstance(candidate, str) for candidate in candidates):
        views = text_views([str(candidate) for candidate in candidates], embedder)
        return Geometry(views, group, has_text=len(views) > 0)
    sets = [(c,) if isinstance(c, str) else tuple(c) for c in candidates]
    text, size = _set_views(sets, embedder)
    return Geometry(_stack([text, size]), group, has_text=bool(text.any()))


def _set_views(sets: Sequence[Sequence[str]], embedder: CachedEmbedder) -> tuple[FloatArray, FloatArray]:
    """Two views of a demo set: the mean embedding of its demos, and how many they are."""
    counts = np.array([len(demos) for demos in sets], dtype=np.float64)
    texts = [text for demos in sets for text in demos]
    if not texts:
        return np.zeros((len(sets), len(sets))), np.zeros((len(sets), len(sets)))
    vectors = embedder(texts)
    pooled = np.zeros((len(sets), vectors.shape[1]))
    np.add.at(pooled, np.repeat(np.arange(len(sets)), counts.astype(int)), vectors)
    pooled /= np.maximum(counts, 1.0)[:, None]
    # Zero-shot against few-shot is a step of its own, larger than one demo more or less.
    size = np.stack([counts / counts.max(), counts > 0], axis=1)
    return squared_distances(pooled), squared_distances(size)


def squared_distances(points: FloatArray) -> FloatArray:
    """``n x d`` points to ``n x n`` squared distances, scaled to a median of 1 where they differ."""
    squares = (points**2).sum(axis=1)
    distances: FloatArray = np.maximum(squares[:, None] + squares[None, :] - 2.0 * points @ points.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    apart = distances[distances > 1e-9]
    return distances / float(np.median(apart)) if apart.size else distances


@plain_torch()
def _stack(views: Sequence[FloatArray]) -> Tensor:
    """Stacks the views that tell at least two candidates apart."""
    useful = [view for view in views if view.any()]
    if not useful:
        return identity_views(len(views[0]))
    return torch.from_numpy(np.stack(useful))
