"""Whose fault a failed program call is, and how long to wait.

What was raised below a language model is the infrastructure's, whatever its class, unless it is known to be
said of the prompt. `lms/guard.py` sees every request, and marks what was raised there.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import AnswerRefusedError, EmptyAnswerError, causes
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.pool import classify_builtin


def _known(*names: str) -> tuple[type[BaseException], ...]:
    """The exception classes that this version of DSPy has (3.2 has two of them)."""
    return tuple(getattr(dspy_errors, name) for name in names if hasattr(dspy_errors, name))


_DSPY = (
    (_known("LMRateLimitError"), Verdict.THROTTLE),
    (
        _known(
            "LMTimeoutError",
            "LMServerError",
            "LMTransportError",
            "LMLockTimeoutError",
            "LMStreamAssemblyError",
        ),
        Verdict.RETRY,
    ),
    ((EmptyAnswerError,), Verdict.RETRY),
    ((AnswerRefusedError,), Verdict.REFUSED),
    (
        _known("AdapterParseError", "ContextWindowExceededError", "LMCollectionLimitError"),
        Verdict.REFUSED,
    ),
    (
        _known(
            "LMAuthError",
            "LMBillingError",
            "LMConfigurationError",
            "LMUnsupportedModelError",
            "LMUnsupportedFeatureError",
        ),
        Verdict.STOP,
    ),
)

_LM_ERRORS = _known("LMError")
_NO_MODEL = _known("LMUnsupportedModelError")
# The prompt's fault, unless a status says otherwise: of any request that was refused, in some versions.
_REFUSED = _known("LMInvalidRequestError")

# Before DSPy had errors of its own (3.3), those of LiteLLM reached the caller; a custom LM may still
# raise its SDK's. They are known by name, so that no SDK is imported for this. The order matters:
# LiteLLM's UnsupportedParamsError and LiteLLMUnknownProvider are BadRequestErrors, and its
# JSONSchemaValidationError, an answer that does not fit, has the status of a server error.
_SDKS = frozenset({"litellm", "openai", "anthropic", "httpx", "requests"})
_SDK_VERDICTS = (
    (
        frozenset(
            {
                "AuthenticationError",
                "PermissionDeniedError",
                "NotFoundError",
                "BudgetExceededError",
                "PaymentRequiredError",
                "UnsupportedParamsError",
                "LiteLLMUnknownProvider",
            }
        ),
        Verdict.STOP,
    ),
    (
        frozenset({"BadRequestError", "UnprocessableEntityError", "JSONSchemaValidationError"}),
        Verdict.REFUSED,
    ),
    (frozenset({"RateLimitError"}), Verdict.THROTTLE),
    (
        frozenset({"Timeout", "APIConnectionError", "TransportError", "ConnectionError"}),
        Verdict.RETRY,
    ),
)
# What comes from these is raised below a language model; httpx and requests serve tools as well.
_PROVIDERS = _SDKS - {"httpx", "requests"}
# What the status of an answer says where the class of the error does not. Others are a gateway's, or pass.
_STATUSES = {
    400: Verdict.REFUSED,
    401: Verdict.STOP,
    402: Verdict.STOP,
    403: Verdict.STOP,
    404: Verdict.STOP,
    413: Verdict.REFUSED,
    422: Verdict.REFUSED,
    429: Verdict.THROTTLE,
}
# What OpenAI and its imitators call an account without money; it travels as a rate limit.
_UNPAID = "insufficient_quota"
# How all versions of DSPy begin what they say of an answer without text, for which they have no class.
_EMPTY = "The LM returned an empty or null response."
# What Python's codecs, and DSPy from 3.4 on, say of a request with half a character: it is never sent.
_UNSENDABLE = ("surrogates not allowed", "lone surrogate")
# The mark of an error that a request to an LM has ended with, and whether a model that is not found is so for
# good. An attribute, so that it goes to other processes with the error.
_RAISED_BY_LM = "mpromptune_raised_by_lm"

# What requests of one attempt have failed with, as a setting of DSPy's, whose own threads inherit these.
_FAILURES = "mpromptune_failures"


@contextmanager
def blaming() -> Iterator[None]:
    """One attempt of a program call and its metric, in which `blame` knows of requests that failed."""
    with dspy.context(**{_FAILURES: []}):
        try:
            yield
        except BaseException as error:
            blame(error)
            raise


def blame(error: BaseException) -> None:
    """Makes a failed request of this attempt the cause of an error, where the infrastructure failed it.

    Programs, and modules of DSPy such as ``Parallel`` and ``BestOfN``, go on without its answer, and fail on
    that later.
    """
    failures = [failure for _, failure in dspy.settings.get(_FAILURES) or ()]
    links = list(causes(error))
    failed = next((failure for failure in failures if classify(failure) in INFRASTRUCTURE), None)
    if failed is not None and not any(link is failure for link in links for failure in failures):
        links[-1].__cause__ = failed


def note_failed(error: Exception, asked: Any = None) -> None:
    """Has `blame` know of a request that failed, and of what was ``asked``."""
    failures = dspy.settings.get(_FAILURES)
    if failures is not None:
        failures.append((asked, error))


def note_answered(asked: Any) -> None:
    """Has `blame` forget requests that failed and were made again, be it of another LM."""
    failures = dspy.settings.get(_FAILURES)
    if failures:
        failures[:] = [(other, error) for other, error in failures if other is None or other != asked]


def note_raised_by_lm(error: Exception, is_new: bool, asked: Any = None) -> None:
    """Marks what a request to an LM has ended with.

    Args:
        error: As it leaves the LM.
        is_new: Whether the LM has not answered anything yet, so that its name or address may be wrong.
        asked: The messages.
    """
    vars(error)[_RAISED_BY_LM] = is_new
    note_failed(error, asked)


def classify(error: BaseException) -> Verdict:
    """Infrastructure is retried, rate limits slow down as well, a misconfigured LM stops the run.

    An error that says nothing by itself is judged by what it was raised from. Where nothing is known of that
    either, it is the infrastructure's if it was raised below a language model, and else the candidate's.
    """
    if any(phrase in str(error) for phrase in _UNSENDABLE):
        return Verdict.CANDIDATE
    mark, below = None, False
    for link in causes(error):
        mark = vars(link).get(_RAISED_BY_LM, mark)
        below = below or mark is not None or _is_providers(link)
        verdict = _verdict(link, below)
        if verdict is Verdict.STOP and mark is False and _is_not_found(link):
            return Verdict.RETRY  # of a gateway: the model was there before
        if verdict is not None:
            return verdict
    return Verdict.RETRY if below else Verdict.CANDIDATE


def _verdict(error: BaseException, below: bool) -> Verdict | None:
    """What is known of an error by itself; of any class, if it was raised ``below`` a language model."""
    if _is_empty(error):
        return Verdict.RETRY
    for classes, verdict in _DSPY:
        if isinstance(error, classes):
            return Verdict.STOP if verdict is Verdict.THROTTLE and _is_unpaid(error) else verdict
    builtin = classify_builtin(error)
    if builtin is not Verdict.CANDIDATE:
        return builtin
    status = _status(error) if below else None
    known = _sdk_verdict(error) or _STATUSES.get(status or 0)
    is_refused = status is None and isinstance(error, _REFUSED)
    return known or (Verdict.REFUSED if is_refused else None)


def _is_empty(error: BaseException) -> bool:
    """Whether an adapter was given nothing to parse."""
    if not isinstance(error, dspy_errors.AdapterParseError):
        return False
    return str(error).startswith(_EMPTY) or not str(_attribute(error, "lm_response")).strip()


def _is_providers(error: BaseException) -> bool:
    """Whether its class alone says that it was raised below a language model."""
    return isinstance(error, _LM_ERRORS) or bool(_modules(error) & _PROVIDERS)


def _is_not_found(error: BaseException) -> bool:
    return isinstance(error, _NO_MODEL) or _status(error) == 404 or "NotFoundError" in _names(error)


def _status(error: BaseException) -> int | None:
    """The status of the HTTP answer behind an error, wherever its class keeps that."""
    places = (error, "status"), (error, "status_code"), (_attribute(error, "response"), "status_code")
    found = (_attribute(place, name) for place, name in places)
    return next((status for status in found if isinstance(status, int)), None)


def _attribute(place: Any, name: str) -> Any:
    try:
        return getattr(place, name, None)
    except Exception:  # noqa: BLE001 - a property of an SDK's may raise anything
        return None


def _is_unpaid(error: BaseException) -> bool:
    """Whether waiting does not help; LiteLLM has the code only in the text."""
    codes = (getattr(error, "code", None), getattr(error, "provider_code", None))
    return _UNPAID in codes or _UNPAID in str(error)


def _modules(error: BaseException) -> set[str]:
    return {cls.__module__.partition(".")[0] for cls in type(error).__mro__}


def _names(error: BaseException) -> set[str]:
    """What an SDK calls it, and the kinds of error that this is one of."""
    return {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _SDKS}


def _sdk_verdict(error: BaseException) -> Verdict | None:
    names = _names(error)
    if names and _is_unpaid(error):
        return Verdict.STOP
    return next((verdict for known, verdict in _SDK_VERDICTS if names & known), None)


def retry_after(error: BaseException) -> float | None:
    """Seconds that a provider asks to wait: DSPy's ``retry_after``, or the header of that name."""
    return next((seconds for link in causes(error) if (seconds := _asked(link)) is not None), None)


def _asked(error: BaseException) -> float | None:
    headers = [
        getattr(getattr(error, "response", None), "headers", None),
        getattr(error, "litellm_response_headers", None),
        getattr(error, "headers", None),
    ]
    asked = (_seconds(value) for value in (getattr(error, "retry_after", None), *map(_header, headers)))
    return next((seconds for seconds in asked if seconds is not None), None)


def _header(headers: Any) -> Any:
    try:
        return next((value for name, value in headers.items() if str(name).lower() == "retry-after"), None)
    except (AttributeError, TypeError, ValueError):  # whatever an SDK keeps under that name
        return None


def _seconds(value: Any) -> float | None:
    """A number of seconds, or a date of HTTP."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = _until(value)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(date: Any) -> float:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except (AttributeError, TypeError, ValueError):
        return math.nan
