"""How noisy single scores are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpromptune.model.embedding import FloatArray

# NOTE: larger values stand for failures: whatever they are, they leave no digit for the others once these are
# scaled to one deviation. float32, of which some of BoTorch's constants are, ends at 3.4e38.
LARGEST = 1e30


def pooled_variance(samples: Sequence[FloatArray]) -> float:
    """Variance within samples, pooled over samples; of all scores when no sample has two."""
    df = sum(len(scores) - 1 for scores in samples)
    if not df:
        return float(np.var(np.concatenate(samples)))
    return sum(float(((scores - scores.mean()) ** 2).sum()) for scores in samples) / df
