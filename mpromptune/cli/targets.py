"""A function of the user's, named on a command line: ``run.py:compile`` or ``package.module:compile``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mpromptune.errors import InvalidArgumentError, MPromptuneError, TargetError

# Not the file's own name, which another module may have.
_NAME = "mpromptune_target"


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
    module = raising(place, lambda: _file(Path(place)) if place.endswith(".py") else _module(place))
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        found = [
            n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        raise InvalidArgumentError(f"{place} has no function {name!r}; its functions are {found}.")
    needed = [p.name for p in inspect.signature(function).parameters.values() if _is_needed(p)]
    if needed:
        raise InvalidArgumentError(f"{target} is called without arguments, but needs {needed}.")
    return function


def raising(what: str, function: Callable[[], Any]) -> Any:
    """What ``function`` returns.

    Raises:
        TargetError: It raised something, which is the cause; errors of ours are raised as they are.
    """
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


def _is_needed(parameter: inspect.Parameter) -> bool:
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return parameter.default is inspect.Parameter.empty and parameter.kind not in optional
