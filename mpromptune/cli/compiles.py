"""A compile in a function of the user's, named as ``run.py:compile``: what it takes, or going on with it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
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

# Not the file's own name, which another module may have.
_NAME = "mpromptune_target"


class _Reached(BaseException):
    """Leaves a function at its compile; no Exception, so that the function does not catch it."""


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
                "compile is called without storage=, so nothing was kept that could be gone on with. Give it "
                "storage='run.log', say, and the next interruption loses nothing."
            )
        if options.dry_run:
            raise InvalidArgumentError(
                "compile is called with dry_run=True, which only estimates. Remove it."
            )
        self.standing = read_standing(options.storage, options.study_name)

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        assert self.standing is not None
        self._announce(self.standing, estimate())


def estimate_of(target: str) -> Estimate:
    """What the first compile of a function would take; the function ends there, and no LM is asked by it.

    Args:
        target: As of `load_target`.

    Raises:
        TargetError: The function raised something, or never called ``compile`` of a `MIPROv2`.
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
    """Goes on with the compile of a function.

    Args:
        target: Of a function that returns what ``compile``, called with ``storage``, returns.
        announce: Told where the compile stands and what all of it takes, before any LM call.

    Returns:
        The program.

    Raises:
        InvalidArgumentError: Nothing was kept that could be gone on with.
        TargetError: The function never called ``compile``, returned something else, or raised something.
    """
    function, resuming = load_target(target), _Resuming(announce)
    with intercepting(resuming):
        program = _raising(target, function)
    if resuming.standing is None:
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
    program, lm = dspy.Module(), dspy.LM(model or "unknown")
    program.steps = [dspy.Predict("question -> answer") for _ in range(predictors)]
    shots: dict[str, Any] = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0} if zero_shot else {}
    optimizer = MIPROv2(metric=lambda *_: 0.0, auto=auto, prompt_model=lm, task_model=lm, **shots)
    example = dspy.Example(question="", answer="").with_inputs("question")
    data: dict[str, Any] = {"trainset": [example] * trainset, "valset": [example] * valset}
    # Which sampler makes no difference, and this one has nothing to load.
    found: Estimate = optimizer.compile(program, **data, sampler="random", dry_run=True)
    return found


def load_target(target: str) -> Callable[[], Any]:
    """The function that ``target`` names.

    What it imports is looked for as by ``python FILE`` or ``python -m MODULE``: next to the file, or in
    the current folder. What stands under ``if __name__ == "__main__"`` is not run.

    Args:
        target: ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``.

    Raises:
        InvalidArgumentError: There is no such file, module or function, or it needs arguments.
        TargetError: The file or the module raised something.
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
    """What ``function`` returns; what it raises becomes a TargetError, but for errors of ours."""
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
    sys.modules[_NAME] = module  # where Python looks for the sources of its classes
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
            f"There is no module {name!r}, neither installed nor in {Path.cwd()}; a file is named with "
            f"its .py."
        ) from error


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
