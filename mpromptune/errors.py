"""All errors of the package, and the checks of numbers that all layers share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from numbers import Integral, Number
from typing import Any

# NOTE: smallest ratio of difflib for a name to be suggested: below it, a part of a name such as "model" no
# longer finds "prompt_model".
_SIMILAR = 0.5
# NOTE: most names that a message lists, about two lines of text.
_LISTED = 10


class MPromptuneError(Exception):
    """Base class of all errors raised by m-promptune."""


class InvalidArgumentError(MPromptuneError, ValueError):
    """An argument has a value that is not valid; raised before any LM call is paid for."""


class UnknownOptionError(MPromptuneError, TypeError):
    """An option name is unknown; the message names the most similar valid one."""


class EmbedderUnavailableError(MPromptuneError, RuntimeError):
    """The embedding model is neither stored locally nor available from the hub."""


class MissingExtraError(MPromptuneError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class LocalModelError(MPromptuneError, RuntimeError):
    """A language model cannot be loaded into this process; the message says why."""


class IncompatibleDSPyError(MPromptuneError, RuntimeError):
    """This version of DSPy lacks something that the search needs; raised before any LM call."""


class TargetError(MPromptuneError, RuntimeError):
    """The function given to a command did not do what the command needs."""


class EmbeddingError(MPromptuneError, ValueError):
    """An embedder returned something that is not one finite vector per text."""


class ScoreError(MPromptuneError, TypeError):
    """A metric is broken: it returned no finite number, or raised an error on its first calls."""


class EmptyInstructionError(MPromptuneError, ValueError):
    """The prompt model returned no instruction in any of its requests."""


class ProposalRefusedError(MPromptuneError, ValueError):
    """A proposer wrote something that is not fit to be a candidate."""


class ProposalDeclinedError(ProposalRefusedError):
    """A proposer has nothing to write for this parent, and has made no request."""


class StorageError(MPromptuneError, OSError):
    """A storage cannot be opened, read or written; earlier records are kept."""


class StudyMismatchError(MPromptuneError, ValueError):
    """A study belongs to another run; the message says what differs."""


class StudyInUseError(MPromptuneError, RuntimeError):
    """Another run uses the study; the message says which run, and what to do."""


class CallCancelledError(MPromptuneError, RuntimeError):
    """A program call raised ``asyncio.CancelledError``, or another error that is not an ``Exception``."""


class CallTimeoutError(MPromptuneError, TimeoutError):
    """A program call took longer than the ``timeout``."""


class EmptyAnswerError(MPromptuneError, RuntimeError):
    """A language model returned an empty answer; another attempt may succeed."""


class AnswerRefusedError(MPromptuneError, RuntimeError):
    """A language model returned no text because of the prompt: a content filter, or ``max_tokens``."""


class TrialFailedError(MPromptuneError, RuntimeError):
    """A trial lacks scores because of infrastructure errors; only DSPy's callbacks receive it."""


class TravelError(MPromptuneError, TypeError):
    """An object cannot be sent to the workers of an executor; the message names it."""


class WorkerLostError(MPromptuneError, ConnectionError):
    """A worker died, or its executor cancelled a call; another attempt may succeed."""


class ExecutorBrokenError(MPromptuneError, RuntimeError):
    """An executor accepts no more calls."""


class SearchStoppedError(MPromptuneError, RuntimeError):
    """The search had to stop before its budget was spent.

    Attributes:
        study: The Optuna study with all scores so far.
        result: The SearchResult so far, with the winner by posterior mean; None without scores.
        program: The best program so far, if a program was compiled.
        usage: The usage of each step of a compile.
    """

    def __init__(self, message: str, study: object = None) -> None:
        super().__init__(message)
        self.study = study
        self.result: Any = None
        self.program: Any = None
        self.usage: Any = None


class BrokenMetricError(SearchStoppedError, ScoreError):
    """A search stopped because of a broken metric: both errors in one; its cause says what is broken."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a search or a compile; nothing more is spent.

    It is no MPromptuneError, so that ``except Exception`` does not catch it and a script ends as usual.

    Attributes:
        study: The Optuna study with all scores so far; None before the search.
        result: The SearchResult so far, with the winner by posterior mean; None without scores.
        program: The best program so far, if a program was compiled; the student itself without scores.
        usage: The usage of each step of a compile.
    """

    def __init__(self, message: str, study: object = None, result: Any = None) -> None:
        super().__init__(message)
        self.study = study
        self.result = result
        self.program: Any = None
        self.usage: Any = None


class SearchTerminated(SearchInterrupted, SystemExit):
    """SIGTERM stopped a search or a compile; uncaught, it ends the process with status 143, as by default."""

    code = 143  # 128 + SIGTERM, as a shell reports it


class _AtCallersLine:
    """See `at_callers_line`; a generator's context would put the lines back."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (MPromptuneError, SearchInterrupted)):
            raise error.with_traceback(None)


# A context for checks of arguments and for compiles, whose lines tracebacks of our errors leave out.
at_callers_line = _AtCallersLine()


def nearest(name: Any, valid: Iterable[str]) -> str | None:
    """The valid name that is most similar to ``name``; None if none is similar."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=_SIMILAR)
    return near[0] if near else None


def unknown(kind: str, name: Any, valid: Iterable[str], see: str | None = None) -> str:
    """The message for an unknown name: what may have been meant, and the valid names if they are few.

    Args:
        kind: What it is the name of, such as ``"option"``.
        name: The unknown name.
        valid: The valid names.
        see: Where to read about all of them, if they are many and none is similar.
    """
    names = sorted(valid)
    near = nearest(name, names)
    parts = [f"Unknown {kind} {name!r}.", f"Did you mean {near!r}?" if near else ""]
    if len(names) <= _LISTED:
        parts.append(f"Valid names are {names}.")
    elif not near and see:
        parts.append(f"All names: {see}.")
    return " ".join(filter(None, parts))


def require_count(name: str, value: Any, least: int | None = 1) -> int:
    """``value`` as an int.

    Raises:
        InvalidArgumentError: It is not an integer of at least ``least``, if that is given.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise InvalidArgumentError(f"{name} must be an integer{bound}; got {value!r}.")
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
    """A real number of Python (``Decimal``, ``Fraction``, bool), NumPy, torch and so on as a float.

    Other values, and numbers too large for a float, become NaN.
    """
    if getattr(value, "ndim", None) == 0:  # scalars of arrays and tensors
        value = value.item()
    elif hasattr(value, "ndim") or not (isinstance(value, Number) or hasattr(value, "__float__")):
        return math.nan
    try:
        return float(value)
    except (ArithmeticError, TypeError, ValueError):  # too large; complex; a signalling NaN
        return math.nan


def stopped(message: str, cause: BaseException | None, study: object = None) -> SearchStoppedError:
    """The error for a search that stops because of ``cause``."""
    if isinstance(cause, ScoreError):  # it names the line of the metric; other lines are of no use
        cause = cause.with_traceback(None)
        error: SearchStoppedError = BrokenMetricError(message, study)
    else:
        error = SearchStoppedError(message, study)
    error.__cause__ = cause
    return error


def beginning(value: Any, most: int) -> str:
    """The ``repr`` of a value for a message, cut after ``most`` characters."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def reason(error: BaseException) -> str:
    """What an error says, for the message of another one: class, text, the system's error below it, notes.

    The text has no blank lines, and no full stop at its end.
    """
    said = f"{type(error).__name__}: {error}"
    below = [str(link) for link in causes(error) if isinstance(link, OSError)]
    if below and below[-1] not in said:  # some clients say only "Connection error."
        said = f"{said.rstrip(':. ')} ({below[-1]})"
    text = "\n".join(filter(None, map(str.strip, said.splitlines())))
    return ". ".join(part.rstrip(":. ") for part in (text, *getattr(error, "__notes__", ())))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, then its cause or context, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
