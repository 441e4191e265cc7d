"""How noisy single scores are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpromptune.model.embedding import FloatArray


def pooled_variance(samples: Sequence[FloatArray]) -> float:
    """Variance within samples, pooled over samples; of all scores when no sample has two."""
    df = sum(len(scores) - 1 for scores in samples)
    if not df:
        return float(np.var(np.concatenate(samples)))
    return sum(float(((scores - scores.mean()) ** 2).sum()) for scores in samples) / df
