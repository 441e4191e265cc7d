r"""When further calls cannot pay: what is still to be gained, and how small a gain is nothing.

Notation
    f(x)    mean score of configuration x on an average example
    L       the leader: the configuration with the highest posterior mean
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import FloatArray
from mpromptune.model.noise import pooled_variance
from mpromptune.model.surrogate import Surrogate, joint_posterior, quiet_single_thread

# NOTE: part of a full evaluation's standard error that counts as no gain. The validation set is
# itself a sample, so the winner's score is known to one standard error (2.8 points at 80 % of 200
# examples). A gain of a tenth of it would widen that uncertainty, added in quadrature, by half a
# percent: nobody could tell it from the luck of the examples. It was reasoned, not tuned.
_NEGLIGIBLE = 0.1
# Configurations whose joint posterior with the leader is computed at once; only their covariances
# with the leader matter, so the chunks are small.
_CHUNK = 128


@dataclass
class Stopping:
    """The user's rules for ending a search before its budget.

    Attributes:
        target: A mean score that is good enough.
        patience: Rounds in a row without a gain in sight after which to stop.
        quiet: Such rounds so far.
    """

    target: float | None = None
    patience: int | None = None
    quiet: int = 0

    def is_enough(self, score: float) -> bool:
        """Whether ``score`` reaches the target."""
        return self.target is not None and score >= self.target

    def is_hopeless(self) -> bool:
        """Whether there has been no gain in sight for long enough."""
        return self.patience is not None and self.quiet >= self.patience

    def note(self, gain: float, standard_error: float) -> None:
        """Takes down one round: the largest expected gain after it, and a full evaluation's error."""
        self.quiet = self.quiet + 1 if gain < _NEGLIGIBLE * standard_error else 0


@plain_torch()
def expected_gains(model: Surrogate, rows: Tensor, leader: Tensor) -> Tensor:
    r"""What knowing two configurations exactly would gain over keeping the leader.

    .. math:: E[\max(f(x) - f(L), 0)] = s (u \Phi(u) + \phi(u)), \quad u = (\mu_x - \mu_L) / s

    with :math:`s^2 = Var[f(x) - f(L)]` from the joint posterior: unlike the expected improvement
    over a fixed value it counts what the two have in common, and what is uncertain about the leader.

    Args:
        model: A fitted surrogate.
        rows: ``n x C`` candidate indices.
        leader: Those of L, ``C``.

    Returns:
        Length n, in the units of the observations.
    """
    return torch.cat([_gains(model, chunk, leader) for chunk in torch.split(rows, _CHUNK)])


def _gains(model: Surrogate, rows: Tensor, leader: Tensor) -> Tensor:
    points = torch.cat([leader.unsqueeze(0).to(rows), rows])
    with quiet_single_thread():
        mean, covariance = joint_posterior(model, points)
    variance = covariance.diagonal() + covariance[0, 0] - 2.0 * covariance[0]
    return expected_positive_part(mean - mean[0], variance)[1:]


def expected_positive_part(mean: Tensor, variance: Tensor) -> Tensor:
    """``E[max(Z, 0)]`` of normal variables."""
    deviation = variance.clamp_min(1e-18).sqrt()
    u = mean / deviation
    density = torch.exp(-0.5 * u**2) / math.sqrt(2.0 * math.pi)
    value: Tensor = deviation * (u * torch.special.ndtr(u) + density)
    return value


def standard_error(samples: Sequence[FloatArray], n_examples: int) -> float:
    """Of a mean over ``n_examples``, from the variance within samples of single scores."""
    return math.sqrt(pooled_variance(samples) / n_examples)
