"""Embedders for tests: instant and deterministic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mpromptune.model.embedding import Geometry, point_views
from mpromptune.model.space import FloatArray


def hashed(texts: list[str]) -> FloatArray:
    """A random unit vector per text, the same for the same text."""
    seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])


def letters(texts: list[str]) -> FloatArray:
    """Letter counts: similar texts have similar vectors."""
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    return np.array([[1.0 + text.lower().count(letter) for letter in alphabet] for text in texts])


def on_a_line(values: Sequence[float], group: int = 0, has_text: bool = False) -> Geometry:
    """The geometry of candidates that are numbers."""
    return Geometry(point_views(np.asarray(values, dtype=np.float64)[:, None]), group, has_text)
