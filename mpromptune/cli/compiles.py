"""What the command line does with a compile of the user's: says what it takes, or goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dspy

from mpromptune.cli.targets import raising
from mpromptune.engine.options import SearchOptions
from mpromptune.errors import InvalidArgumentError, TargetError
from mpromptune.mipro.estimate import Estimate
from mpromptune.mipro.interception import Interceptor, intercepting
from mpromptune.mipro.optimizer import MIPROv2
from mpromptune.mipro.standing import Standing, read_standing


class _Reached(BaseException):
    """Leaves a function at its compile; no Exception, so that the function does not catch it."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(str(estimate))
        self.estimate = estimate


class _Estimating(Interceptor):
    options = {"dry_run": True}  # noqa: RUF012 - the type is that of the class above

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        raise _Reached(estimate())


class _Resuming(Interceptor):
    def __init__(self, announce: Callable[[Standing, Estimate], None]) -> None:
        self._announce = announce
        self._standing: Standing | None = None

    @property
    def reached(self) -> bool:
        return self._standing is not None

    def on_options(self, options: SearchOptions | None) -> None:
        if options is None or options.storage is None:
            raise InvalidArgumentError(
                "compile is called without storage=, so nothing was kept that could be gone on with. Give it "
                "storage='run.log', say, and the next interruption loses nothing."
            )
        if options.dry_run:
            raise InvalidArgumentError(
                "compile is called with dry_run=True, which only estimates. Remove it."
            )
        self._standing = read_standing(options.storage, options.study_name)

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        assert self._standing is not None
        self._announce(self._standing, estimate())


def estimate_of(target: str, function: Callable[[], Any]) -> Estimate:
    """What the first compile of a function would take; the function ends there, and no LM is asked by it.

    Args:
        target: Its name, for errors.
        function: Calls ``compile`` of a `MIPROv2`.

    Raises:
        TargetError: It does not, or it raised something before.
    """
    try:
        with intercepting(_Estimating()):
            raising(target, function)
    except _Reached as reached:
        return reached.estimate
    raise TargetError(f"{target} returned without calling compile of mpromptune.MIPROv2.")


def resume(
    target: str, function: Callable[[], Any], announce: Callable[[Standing, Estimate], None]
) -> dspy.Module:
    """Goes on with the compile of a function.

    Args:
        target: Its name, for errors.
        function: Returns what ``compile`` of a `MIPROv2`, called with ``storage``, returns.
        announce: Told where the compile stands and what all of it takes, before any LM call.

    Returns:
        The program.

    Raises:
        InvalidArgumentError: Nothing was kept that could be gone on with.
        TargetError: The function never called ``compile``, returned something else, or raised something.
    """
    resuming = _Resuming(announce)
    with intercepting(resuming):
        program = raising(target, function)
    if not resuming.reached:
        raise TargetError(f"{target} returned without calling compile of mpromptune.MIPROv2.")
    if not hasattr(program, "search_result"):
        raise TargetError(
            f"{target} returned {type(program).__name__}, not the program that compile returned, which "
            "cannot be saved so. All that was paid for is kept: return the program, and the same command "
            "ends without an LM call."
        )
    return program


def estimate_by_numbers(
    auto: str, trainset: int, valset: int, predictors: int, zero_shot: bool, model: str | None
) -> Estimate:
    """What a compile of this size would take.

    Args:
        auto: As of ``dspy.MIPROv2``.
        trainset: Training examples.
        valset: Validation examples, of which ``auto`` uses so many and no more.
        predictors: Predictors of the program.
        zero_shot: Without demos.
        model: LiteLLM's name, by which its price is looked up.
    """
    lm = dspy.LM(model or "unknown")
    shots: dict[str, Any] = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0} if zero_shot else {}
    optimizer = MIPROv2(metric=_no_metric, auto=auto, prompt_model=lm, task_model=lm, **shots)
    example = dspy.Example(question="", answer="").with_inputs("question")
    data: dict[str, Any] = {"trainset": [example] * trainset, "valset": [example] * valset}
    # Which sampler makes no difference, and this one has nothing to load.
    found: Estimate = optimizer.compile(_Program(predictors), **data, sampler="random", dry_run=True)
    return found


class _Program(dspy.Module):
    def __init__(self, predictors: int) -> None:
        super().__init__()
        self.steps = [dspy.Predict("question -> answer") for _ in range(predictors)]


def _no_metric(*_: Any, **__: Any) -> float:
    raise NotImplementedError("an estimate scores nothing")
