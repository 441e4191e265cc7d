"""What is still to be gained, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultivariateNormal

from mpromptune.model.stopping import Stopping, expected_gains, expected_positive_part, standard_error

HALF_NORMAL = 1.0 / math.sqrt(2.0 * math.pi)  # E[max(Z, 0)] of a standard normal Z


def gains(mean: list[float], covariance: list[list[float]]) -> list[float]:
    """Of the second configuration and those after it over the first, for a given joint posterior."""
    normal = MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())
    rows = torch.arange(1, len(mean)).unsqueeze(-1)
    model = SimpleNamespace(posterior=lambda points: GPyTorchPosterior(normal), train_inputs=(rows,))
    return expected_gains(model, rows, torch.tensor([0])).tolist()


def test_positive_part_by_hand() -> None:
    """0.3989 for a standard normal, twice that for twice the deviation, the mean when it is certain."""
    mean, variance = torch.tensor([0.0, 0.0, 0.3, -0.3]).double(), torch.tensor([1.0, 4.0, 0.0, 0.0]).double()
    expected = [HALF_NORMAL, 2.0 * HALF_NORMAL, 0.3, 0.0]
    assert expected_positive_part(mean, variance).tolist() == pytest.approx(expected)


def test_positive_part_agrees_with_sampling() -> None:
    """A million draws."""
    draws = np.random.default_rng(0).normal(-0.4, 0.7, 10**6)
    value = expected_positive_part(torch.tensor(-0.4).double(), torch.tensor(0.49).double())
    assert float(value) == pytest.approx(np.maximum(draws, 0.0).mean(), rel=0.01)


def test_what_two_configurations_share_cannot_be_gained() -> None:
    """Equal means: variances of 0.5 each make a difference of variance 1, or of 0 when they move as one."""
    independent, same = [[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.5], [0.5, 0.5]]
    assert gains([0.6, 0.6], independent) == pytest.approx([HALF_NORMAL])
    assert gains([0.6, 0.6], same) == pytest.approx([0.0], abs=1e-6)


def test_an_uncertain_leader_may_be_overtaken_by_a_certain_rival() -> None:
    """The rival is known exactly; the gain comes from what is unknown about the leader."""
    assert gains([0.6, 0.6, 0.6], [[1.0, 0.0, 0.0], [0.0, 1e-12, 0.0], [0.0, 0.0, 1e-12]]) == pytest.approx(
        [HALF_NORMAL] * 2
    )


def test_standard_error_by_hand() -> None:
    """Variances of 0.5 and 0 within two pairs of scores: sqrt(0.25 / 100)."""
    assert standard_error([np.array([0.0, 1.0]), np.array([1.0, 1.0])], 100) == pytest.approx(0.05)


def test_patience_counts_rounds_in_a_row() -> None:
    """A gain of 0.004 against a standard error of 0.05 is nothing (below 0.005); 0.006 starts anew."""
    rules = Stopping(patience=2)
    seen = []
    for gain in (0.004, 0.006, 0.004, 0.004, 0.006):
        rules.note(gain, 0.05)
        seen.append(rules.is_hopeless())
    assert seen == [False, False, False, True, False]


def test_the_decision_has_no_units() -> None:
    """Scores a hundred times larger have gains and errors a hundred times larger."""
    for scale in (1.0, 100.0):
        rules = Stopping(patience=1)
        rules.note(0.004 * scale, 0.05 * scale)
        assert rules.is_hopeless()


def test_without_rules_nothing_stops() -> None:
    """No patience, no target: whatever was noted."""
    rules = Stopping()
    rules.note(0.0, 1.0)
    assert not rules.is_hopeless()
    assert not rules.is_enough(1.0)
    assert Stopping(target=0.8).is_enough(0.8)


def test_without_noise_every_gain_counts() -> None:
    """A standard error of 0 calls nothing negligible."""
    rules = Stopping(patience=1)
    rules.note(1e-9, 0.0)
    assert not rules.is_hopeless()
