"""How noisy scores are, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mpromptune.model.noise import pooled_variance


def test_pooled_variance_by_hand() -> None:
    """(0.5 + 2.0) / (1 + 1)."""
    assert pooled_variance([np.array([0.0, 1.0]), np.array([1.0, 3.0])]) == pytest.approx(1.25)


def test_variance_of_samples_of_one_is_that_of_all() -> None:
    """Nothing varies within a single score: 0 and 1 have a variance of a quarter."""
    assert pooled_variance([np.array([0.0]), np.array([1.0])]) == pytest.approx(0.25)
