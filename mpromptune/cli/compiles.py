"""Estimates or resumes a compile in a user's function, which is named as in ``run.py:compile``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy

from mpromptune.engine.options import SearchOptions
from mpromptune.errors import InvalidArgumentError, MPromptuneError, TargetError
from mpromptune.mipro.estimate import Estimate, Interceptor, intercepting
from mpromptune.mipro.optimizer import MIPROv2
from mpromptune.mipro.reading import Standing, read_standing

# The module name of the user's file; its own name may belong to another module.
_NAME = "mpromptune_target"


class _Reached(BaseException):
    """Leaves a function at its compile; not an ``Exception``, so that the function does not catch it."""


class _Estimating(Interceptor):
    options = {"dry_run": True}  # noqa: RUF012 - the type is that of the class above

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        raise _Reached(estimate())


class _Resuming(Interceptor):
    def __init__(self, announce: Callable[[Standing, Estimate], None]) -> None:
        self._announce = announce
        self.standing: Standing | None = None

    def on_options(self, options: SearchOptions | None) -> None:
        if options is None or options.storage is None:
            raise InvalidArgumentError(
                "compile is called without storage=, so nothing was saved that could be resumed. Pass, for "
                "example, storage='run.log', so that the next interruption loses nothing."
            )
        if options.dry_run:
            raise InvalidArgumentError(
                "compile is called with dry_run=True, which only estimates. Remove it."
            )
        self.standing = read_standing(options.storage, options.study_name)
        if isinstance(options.storage, str | os.PathLike):
            self.next_step = f"mpromptune report {shlex.quote(str(options.storage))}"

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        assert self.standing is not None
        self._announce(self.standing, estimate())


def estimate_of(target: str) -> Estimate:
    """Estimate the first compile of a function; the function ends there, and the compile calls no LM.

    Args:
        target: The function, as in `load_target`.

    Raises:
        TargetError: The function raised an error, or never called ``compile`` of a `MIPROv2`.
    """
    function = load_target(target)
    try:
        with intercepting(_Estimating()):
            _raising(target, function)
    except _Reached as reached:
        found: Estimate = reached.args[0]
        return found
    raise TargetError(f"{target} returned without calling compile of mpromptune.MIPROv2.")


def resume(target: str, announce: Callable[[Standing, Estimate], None]) -> dspy.Module:
    """Resume the compile of a function.

    Args:
        target: A function that calls ``compile`` with ``storage``, and returns its result.
        announce: Called with the state and the estimate of the compile before any LM call.

    Returns:
        The program.

    Raises:
        InvalidArgumentError: Nothing was saved that could be resumed.
        TargetError: The function never called ``compile``, returned something else, or raised an error.
    """
    function, resuming = load_target(target), _Resuming(announce)
    with intercepting(resuming):
        program = _raising(target, function)
    if resuming.standing is None:
        raise TargetError(f"{target} returned without calling compile of mpromptune.MIPROv2.")
    if not hasattr(program, "search_result"):
        raise TargetError(
            f"{target} returned {type(program).__name__}, not the program that compile returned, so it "
            "cannot be saved. All that was paid for is kept: return the program, and the same command "
            "ends without an LM call."
        )
    return program


def estimate_by_numbers(
    auto: str, trainset: int, valset: int, predictors: int, zero_shot: bool, model: str | None
) -> Estimate:
    """Estimate a compile of this size.

    Args:
        auto: As in ``dspy.MIPROv2``.
        trainset: Number of training examples.
        valset: Number of validation examples; ``auto`` may use fewer.
        predictors: Number of predictors in the program.
        zero_shot: Whether there are no demos.
        model: LiteLLM's name of the model, to look up its price.
    """
    program, lm = dspy.Module(), dspy.LM(model or "unknown")
    program.steps = [dspy.Predict("question -> answer") for _ in range(predictors)]
    shots: dict[str, Any] = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0} if zero_shot else {}
    optimizer = MIPROv2(metric=lambda *_: 0.0, auto=auto, prompt_model=lm, task_model=lm, **shots)
    example = dspy.Example(question="", answer="").with_inputs("question")
    data: dict[str, Any] = {"trainset": [example] * trainset, "valset": [example] * valset}
    # The sampler does not change the estimate, and this one loads nothing.
    found: Estimate = optimizer.compile(program, **data, sampler="random", dry_run=True)
    return found


def load_target(target: str) -> Callable[[], Any]:
    """The function that ``target`` names.

    Its imports are searched as by ``python FILE`` or ``python -m MODULE``: next to the file, or in the
    current folder. Code under ``if __name__ == "__main__"`` is not run.

    Args:
        target: ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``.

    Raises:
        InvalidArgumentError: The file, module or function does not exist, or needs arguments.
        TargetError: The file or the module raised an error.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise InvalidArgumentError(
            f"TARGET must be FILE.py:FUNCTION or MODULE:FUNCTION, e.g. run.py:compile; got {target!r}."
        )
    module = _raising(place, lambda: _file(Path(place)) if place.endswith(".py") else _module(place))
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = ((n, f) for n, f in vars(module).items() if inspect.isfunction(f))
        own = [n for n, f in functions if f.__module__ == module.__name__]
        raise InvalidArgumentError(f"{place} has no function {name!r}; its functions are {own}.")
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if needed:
        raise InvalidArgumentError(f"{target} is called without arguments, but needs {needed}.")
    return function


def _raising(what: str, function: Callable[[], Any]) -> Any:
    """The result of ``function``; its errors, except those of this package, become a TargetError."""
    try:
        return function()
    except MPromptuneError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise TargetError(f"{what} raised {type(error).__name__}{': ' if said else ''}{said}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidArgumentError(f"There is no file {str(path)!r}.")
    _look_in(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # Python finds the sources of its classes there
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module imports
        raise InvalidArgumentError(
            f"There is no module {name!r}, neither installed nor in {Path.cwd()}; the name of a file must "
            "end in .py."
        ) from error


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
