"""Every error of the package, under one root, and the checks of numbers that all layers share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Number
from typing import Any


class MPromptuneError(Exception):
    """Root of all errors raised by m-promptune."""


class InvalidArgumentError(MPromptuneError, ValueError):
    """An argument has a value that cannot work; raised before any LM call is paid for."""


class UnknownOptionError(MPromptuneError, TypeError):
    """An option name is not known; the message lists the valid ones."""


class EmbedderUnavailableError(MPromptuneError, RuntimeError):
    """The embedding model can be had neither locally nor from the hub."""


class MissingExtraError(MPromptuneError, ImportError):
    """A package that only some functions need is not installed; the message says how to install it."""


class IncompatibleDSPyError(MPromptuneError, RuntimeError):
    """This version of DSPy lacks what the search is built on; raised before any LM call."""


class TargetError(MPromptuneError, RuntimeError):
    """The function that a command was given did not do what it was called for."""


class EmbeddingError(MPromptuneError, ValueError):
    """An embedder returned something that is not one finite vector per text."""


class ScoreError(MPromptuneError, TypeError):
    """A metric cannot score: it returned no finite number, or raised before it had returned anything."""


class EmptyInstructionError(MPromptuneError, ValueError):
    """The prompt model gave no instruction; raised when it gave none in all requests."""


class StorageError(MPromptuneError, OSError):
    """A storage cannot be opened, read or written; what was recorded before is kept."""


class StudyMismatchError(MPromptuneError, ValueError):
    """A study belongs to another run; the message says what differs."""


class StudyInUseError(MPromptuneError, RuntimeError):
    """Another run is at work on the study; the message says which, and what to do."""


class CallCancelledError(MPromptuneError, RuntimeError):
    """A program call let out ``asyncio.CancelledError``, or another error that is no ``Exception``."""


class CallTimeoutError(MPromptuneError, TimeoutError):
    """A program call took longer than the ``timeout``."""


class EmptyAnswerError(MPromptuneError, RuntimeError):
    """A language model answered a program without a word; another attempt may succeed."""


class AnswerRefusedError(MPromptuneError, RuntimeError):
    """A language model gave no word, for a reason that is the prompt's: a filter, or ``max_tokens``."""


class TrialFailedError(MPromptuneError, RuntimeError):
    """A trial lacks scores, for errors of the infrastructure; nobody but DSPy's callbacks sees it."""


class TravelError(MPromptuneError, TypeError):
    """An object cannot be sent to the workers of an executor; the message names it."""


class WorkerLostError(MPromptuneError, ConnectionError):
    """A worker died, or its executor gave up a call; another attempt may succeed."""


class ExecutorBrokenError(MPromptuneError, RuntimeError):
    """An executor makes no more calls."""


class SearchStoppedError(MPromptuneError, RuntimeError):
    """The search had to stop before its budget was spent.

    Attributes:
        study: The Optuna study with everything that was measured until then.
        result: The SearchResult of that, its winner by posterior mean; None where nothing was.
        program: The best program so far, when a program was compiled.
        usage: What each step of a compile has used.
    """

    def __init__(self, message: str, study: object = None) -> None:
        super().__init__(message)
        self.study = study
        self.result: Any = None
        self.program: Any = None
        self.usage: Any = None


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a search or a compile; nothing is spent any more.

    No MPromptuneError, which ``except Exception`` would take for a failure: it ends a script that
    does not ask for it.

    Attributes:
        study: The Optuna study with everything that was measured; None before the search.
        result: The SearchResult of that, its winner by posterior mean; None where nothing was.
        program: The best program so far, when a program was compiled: the student as it came where
            nothing was measured.
        usage: What each step of a compile has used.
    """

    def __init__(self, message: str, study: object = None, result: Any = None) -> None:
        super().__init__(message)
        self.study = study
        self.result = result
        self.program: Any = None
        self.usage: Any = None


class SearchTerminated(SearchInterrupted, SystemExit):
    """SIGTERM stopped it; if nobody catches this, the process ends with status 143, as by default."""

    code = 143  # 128 + SIGTERM, as a shell reports it


def require_count(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        InvalidArgumentError: It is not an integer of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidArgumentError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return int(value)


def require_finite(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        InvalidArgumentError: It is not a finite number.
    """
    number = as_real(value)
    if not math.isfinite(number):
        raise InvalidArgumentError(f"{name} must be a finite number; got {value!r}.")
    return number


def require_positive(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        InvalidArgumentError: It is not a finite number above zero.
    """
    number = as_real(value)
    if isinstance(value, bool) or not 0.0 < number < math.inf:
        raise InvalidArgumentError(f"{name} must be a positive number; got {value!r}.")
    return number


def as_real(value: Any) -> float:
    """Any real number as a float: of Python (``Decimal``, ``Fraction``, bool), NumPy, torch and so on.

    Not a number where it is none, or too large for a float.
    """
    if getattr(value, "ndim", None) == 0:  # scalars of arrays and tensors
        value = value.item()
    elif hasattr(value, "ndim") or not (isinstance(value, Number) or hasattr(value, "__float__")):
        return math.nan
    try:
        return float(value)
    except (ArithmeticError, TypeError, ValueError):  # too large; complex; a signalling NaN
        return math.nan


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
