"""When further calls cannot pay, by hand."""

from __future__ import annotations

from mpromptune.model.stopping import Stopping


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
