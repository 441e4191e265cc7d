"""Budgets: how many calls DSPy's MIPROv2 would spend, and what a plan needs at least."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpromptune.errors import InvalidArgumentError, require_count
from mpromptune.model.space import FloatArray

# Whether winner and baseline end measured on all examples; "auto", where that costs little.
Confirm = bool | Literal["auto"]

logger = logging.getLogger(__name__)

SCHEDULE_NAMES = ("blocks", "mipro")


def check_block_size(block_size: int, n_examples: int) -> None:
    """Refuses blocks that do not fit into the validation set.

    Raises:
        InvalidArgumentError: ``block_size`` is not between 1 and ``n_examples``.
    """
    if not 1 <= block_size <= n_examples:
        raise InvalidArgumentError(
            f"block_size must be between 1 and the {n_examples} validation examples; got {block_size}."
        )


def check_budget(max_calls: int, n_examples: int, confirm: Confirm) -> None:
    """Refuses budgets in which winner and baseline cannot be measured.

    Raises:
        InvalidArgumentError: ``max_calls`` is too low.
    """
    least = 2 * n_examples if confirm is True else 1
    if max_calls < least:
        raise InvalidArgumentError(
            f"max_calls={max_calls} is below the {least} calls that measuring the winner and the "
            f"baseline on all {n_examples} validation examples takes. Raise max_calls, use fewer "
            "validation examples, or pass confirm=False."
        )


def warn_of_little(max_calls: int, n_examples: int, confirm: Confirm) -> None:
    """Warns of a budget that confirming takes most of: prompts are compared on what is left."""
    kept = 2 * n_examples if confirm is True else 0
    if 2 * kept > max_calls:
        logger.warning(
            "Measuring the winner and the baseline on all %d validation examples takes up to %d of "
            "max_calls=%d: little is left to find a winner with. Raise max_calls, use fewer validation "
            "examples, or pass confirm=False.",
            n_examples,
            kept,
            max_calls,
        )


@dataclass(frozen=True)
class Minibatches:
    """DSPy's own arguments of the plan of MIPROv2.

    Attributes:
        size: Examples of a trial.
        full_eval_steps: Trials from one full evaluation to the next.
        enabled: False when every trial is a full evaluation and there are no others.
    """

    size: int = 35
    full_eval_steps: int = 5
    enabled: bool = True

    def within(self, n_examples: int) -> Minibatches:
        """The plan for a validation set; a minibatch of all of it is a full evaluation itself.

        Raises:
            InvalidArgumentError: A number cannot work.
        """
        require_count("minibatch_full_eval_steps", self.full_eval_steps)
        if not self.enabled or require_count("minibatch_size", self.size) == n_examples:
            return Minibatches(n_examples, self.full_eval_steps, enabled=False)
        if self.size > n_examples:
            raise InvalidArgumentError(
                f"minibatch_size={self.size} exceeds the {n_examples} validation examples."
            )
        return self

    def as_arguments(self) -> dict[str, int]:
        """What of it must stay as it is in a study."""
        return {"minibatch_size": self.size, "minibatch_full_eval_steps": self.full_eval_steps}

    def calls(self, num_trials: int, n_examples: int) -> int:
        """What ``num_trials`` trials cost, with the baseline and the full evaluations."""
        return stock_calls(num_trials, n_examples, self.enabled, self.size, self.full_eval_steps)

    def trials_for(self, max_calls: int, n_examples: int) -> int:
        """The most trials that ``max_calls`` calls allow.

        Raises:
            InvalidArgumentError: Not even one.
        """
        if max_calls < (least := self.calls(1, n_examples)):
            raise InvalidArgumentError(
                f"max_calls={max_calls} is below the {least} calls of MIPROv2's shortest plan: the baseline "
                f"on all {n_examples} validation examples, one trial, and a full evaluation of it."
            )
        # Every trial costs at least one call, so there are no more of them than calls.
        return bisect_right(range(max_calls + 1), max_calls, key=lambda n: self.calls(n, n_examples)) - 1


def stock_calls(
    num_trials: int,
    n_examples: int,
    minibatch: bool = True,
    minibatch_size: int = 35,
    minibatch_full_eval_steps: int = 5,
) -> int:
    """Program calls that DSPy's MIPROv2 spends in its search step for these arguments.

    It evaluates the default program, then every trial on a minibatch, and after every
    ``minibatch_full_eval_steps`` of them (and at the end) the best one so far on all examples.
    """
    per_trial = min(minibatch_size, n_examples) if minibatch else n_examples
    full = math.ceil(num_trials / minibatch_full_eval_steps) if minibatch else 0
    return n_examples * (1 + full) + per_trial * num_trials


# NOTE: most configurations are seen to be poor on five telling examples. Where several predictors are
# combined, every score tells something of the candidates of all, and more configurations are worth more:
# regret of 2.9 with three, 3.8 with five (three programs, 12 seeds, +-0.3).
_BLOCK_SIZE, _COMBINED = 5, 3


def default_block_size(n_examples: int, is_combined: bool = False) -> int:
    """Five examples, three where several predictors are combined, or all where there are fewer."""
    return min(_COMBINED if is_combined else _BLOCK_SIZE, n_examples)


def first_keys(n_examples: int, seed: int) -> FloatArray:
    """Keys by which all configurations take the examples before anything is known, the lowest first."""
    rng = np.random.default_rng([abs(seed), n_examples])
    keys: FloatArray = -np.log(1.0 - rng.random(n_examples))
    return keys
