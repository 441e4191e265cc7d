"""Tiny DSPy programs, data and metrics for tests of the optimizer."""

from __future__ import annotations

import threading
from typing import Any

import dspy
from embedders import hashed
from lms import arithmetic_lm

from mpromptune import MIPROv2


class Adder(dspy.Module):
    """One predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.solve(question=question)


class Planner(dspy.Module):
    """Two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = dspy.Predict("question -> plan")
        self.solve = dspy.Predict("question, plan -> answer")

    def forward(self, question: str) -> Any:
        return self.solve(question=question, plan=self.plan(question=question).plan)


def additions(n: int, offset: int = 0) -> list[dspy.Example]:
    """``n`` distinct sums."""
    pairs = [(i, 2 * i + 1) for i in range(offset, offset + n)]
    return [dspy.Example(question=f"{a}+{b}", answer=str(a + b)).with_inputs("question") for a, b in pairs]


def is_right(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Exact match."""
    return bool(example.answer == prediction.answer)


class Counted:
    """Exact match that counts the program calls of evaluations (the bootstrap passes a trace)."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        if trace is None:
            with self._lock:
                self.calls += 1
        return bool(example.answer == prediction.answer)


ZERO_SHOT = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0}
LABELLED_ONLY = {"max_bootstrapped_demos": 0, "max_labeled_demos": 2}
FEW_SHOT = {"max_bootstrapped_demos": 1, "max_labeled_demos": 2}
TRAIN = additions(6)
VAL = additions(12, offset=6)
# 4 trials on minibatches of 4, a full evaluation after every 2 of them and of the default program.
SMALL_RUN = {"num_trials": 4, "minibatch_size": 4, "minibatch_full_eval_steps": 2}
SMALL_RUN_CALLS = 4 * 4 + 12 * (1 + 2)


QEI = {"sampler": "qei", "embedder": hashed}


def compiled(
    program: dspy.Module | None = None,
    *,
    lm: Any = None,
    metric: Any = None,
    init: Any = None,
    optimizer: Any = MIPROv2,
    **options: Any,
) -> Any:
    """The best program of a small compile.

    Args:
        program: The student; by default, one predictor.
        lm: Asked for everything.
        metric: Exact match, if not given.
        init: Arguments of the optimizer, over the few shots and 4 threads that it has by default.
        optimizer: Its class.
        **options: Of ``compile``, over a small run.
    """
    settings = {
        "metric": metric or Counted(),
        "auto": None,
        "num_candidates": 3,
        "num_threads": 4,
        **FEW_SHOT,
    }
    settings.update(init or {})
    with dspy.context(lm=lm or arithmetic_lm()):
        run = {"trainset": TRAIN, "valset": VAL, **SMALL_RUN, **options}
        return optimizer(**settings).compile(Adder() if program is None else program, **run)


def is_spent(result: Any, budget: int, apart_from: dict[str, int] | None = None) -> bool:
    """Whether the calls left over are too few to finish measuring any other configuration."""
    others = [m for m in result.configurations if not m.fully and m.params != apart_from]
    lacking = [result.n_examples - len(m.scores) for m in others]
    return 0 <= budget - result.calls < min([*lacking, result.n_examples])
