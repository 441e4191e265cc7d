"""Embedders for tests: instant and deterministic."""

from __future__ import annotations

import hashlib

import numpy as np

from mpromptune.model.embedding import FloatArray


def hashed(texts: list[str]) -> FloatArray:
    """A random unit vector per text, the same for the same text."""
    seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])


def letters(texts: list[str]) -> FloatArray:
    """Letter counts: similar texts have similar vectors."""
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    return np.array([[1.0 + text.lower().count(letter) for letter in alphabet] for text in texts])
