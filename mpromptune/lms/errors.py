"""Verdicts on failed program calls, and how long to wait: rules by the name and the origin of an error.

An error raised below a language model is one of the infrastructure, unless its class or status says that the
prompt caused it. `lms/guard.py` sees every request, and marks the errors raised there.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dspy
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import causes
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.pool import classify_builtin

# Verdicts by the names of classes, so that no SDK must be imported: errors of DSPy, of LiteLLM (older DSPy
# has fewer own errors and passes these on), and of SDKs that a custom LM may use. The first name in the
# method resolution order of a class counts.
_NAMES = {
    Verdict.THROTTLE: ("LMRateLimitError", "RateLimitError"),
    Verdict.RETRY: (
        *("LMTimeoutError", "LMServerError", "LMTransportError", "LMLockTimeoutError"),
        *("LMStreamAssemblyError", "EmptyAnswerError"),
        *("Timeout", "APIConnectionError", "TransportError", "ConnectionError"),
    ),
    Verdict.REFUSED: (
        *("AdapterParseError", "ContextWindowExceededError", "LMCollectionLimitError", "AnswerRefusedError"),
        *("BadRequestError", "UnprocessableEntityError"),
        "JSONSchemaValidationError",  # an answer that violates a schema, with the status of a server error
    ),
    Verdict.STOP: (
        *("LMAuthError", "LMBillingError", "LMConfigurationError"),
        *("LMUnsupportedModelError", "LMUnsupportedFeatureError"),
        *("AuthenticationError", "PermissionDeniedError", "NotFoundError", "PaymentRequiredError"),
        *("BudgetExceededError", "UnsupportedParamsError", "LiteLLMUnknownProvider"),
    ),
}
_VERDICTS = {name: verdict for verdict, names in _NAMES.items() for name in names}
# The packages that define these classes.
_PACKAGES = {"mpromptune", "dspy", "litellm", "openai", "anthropic", "httpx", "requests"}
# Packages whose errors are always raised below a language model; tools use httpx and requests as well.
_PROVIDERS = {"litellm", "openai", "anthropic"}
# Verdicts by HTTP status if the class gives none. Other statuses come from gateways, or are temporary.
_STATUSES = {
    **dict.fromkeys((400, 413, 422), Verdict.REFUSED),
    **dict.fromkeys((401, 402, 403, 404), Verdict.STOP),
    429: Verdict.THROTTLE,
}
# DSPy's error for any refused request: the prompt caused it, unless a status says otherwise.
_ANY_REFUSAL = "LMInvalidRequestError"
_NOT_FOUND = {"LMUnsupportedModelError", "NotFoundError"}
# Names of errors of connections that were never made, by sockets and by HTTP clients.
_UNREACHABLE = {"ConnectionRefusedError", "gaierror", "ConnectError", "ConnectTimeout"}
# The code of OpenAI, and of compatible providers, for an account without credit; its error is a rate limit.
_UNPAID = "insufficient_quota"
# The beginning of the message of all DSPy versions for an answer without text, which has no class of its own.
_EMPTY = "The LM returned an empty or null response."
# Messages of Python's codecs, and of DSPy since 3.4, for a request with a lone surrogate: it is never sent.
_UNSENDABLE = ("surrogates not allowed", "lone surrogate")
# Attribute that marks an error raised by a request to an LM; true if the model may not exist at all. It is an
# attribute so that it is sent to other processes with the error.
_RAISED_BY_LM = "mpromptune_raised_by_lm"
# Name of the DSPy setting with the failed requests of one attempt: DSPy's threads inherit settings.
_FAILURES = "mpromptune_failures"


def classify(error: BaseException) -> Verdict:
    """The verdict on an error: infrastructure errors and rate limits are retried, a wrong LM setup stops.

    An address to which no connection was ever made is a wrong setup. An unknown error is judged by its
    causes. If these are unknown too, it is one of the infrastructure if it was raised below a language model,
    and one of the candidate otherwise.
    """
    if any(phrase in str(error) for phrase in _UNSENDABLE):
        return Verdict.CANDIDATE
    mark, below = None, False
    for link in causes(error):
        names = _names(link)
        mark = vars(link).get(_RAISED_BY_LM, mark)
        below = below or mark is not None or _is_providers(link)
        verdict = _verdict(link, names, below)
        if verdict is Verdict.STOP and mark is False and (_status(link) == 404 or _NOT_FOUND & {*names}):
            return Verdict.RETRY  # from a gateway, because the model was found before
        if verdict is Verdict.RETRY and mark and _is_unreachable(link):
            return Verdict.STOP  # nothing has ever been at this address
        if verdict is not None:
            return verdict
    return Verdict.RETRY if below else Verdict.CANDIDATE


def _verdict(error: BaseException, names: list[str], below: bool) -> Verdict | None:
    """The verdict on one error without its causes, if known; statuses count only ``below`` an LM."""
    if _is_empty(error):
        return Verdict.RETRY
    known = next((_VERDICTS[name] for name in names if name in _VERDICTS), None)
    builtin = classify_builtin(error)
    if known is None and builtin is not Verdict.CANDIDATE:
        known = builtin
    status = _status(error) if below else None
    if known is None and status is None and _ANY_REFUSAL in names:
        return Verdict.REFUSED
    known = known or _STATUSES.get(status or 0)
    return Verdict.STOP if known is Verdict.THROTTLE and _is_unpaid(error) else known


def _names(error: BaseException) -> list[str]:
    """Names of the error's class and base classes, as far as they are of known packages."""
    return [cls.__name__ for cls in type(error).__mro__ if _package(cls) in _PACKAGES]


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_providers(error: BaseException) -> bool:
    """Whether the class of an error shows that it was raised below a language model."""
    return "LMError" in _names(error) or any(_package(cls) in _PROVIDERS for cls in type(error).__mro__)


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made."""
    return any(cls.__name__ in _UNREACHABLE for link in causes(error) for cls in type(link).__mro__)


def _is_empty(error: BaseException) -> bool:
    """Whether an adapter failed because the answer was empty."""
    if not isinstance(error, dspy_errors.AdapterParseError):
        return False
    return str(error).startswith(_EMPTY) or not str(_attribute(error, "lm_response")).strip()


def _is_unpaid(error: BaseException) -> bool:
    """Whether the account has no credit, so that waiting is useless; LiteLLM has the code only as text."""
    return _UNPAID in (_attribute(error, "code"), _attribute(error, "provider_code")) or _UNPAID in str(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, from one of the attributes in which SDKs store it."""
    places = (error, "status"), (error, "status_code"), (_attribute(error, "response"), "status_code")
    found = (_attribute(place, name) for place, name in places)
    return next((status for status in found if isinstance(status, int)), None)


def _attribute(place: Any, name: str) -> Any:
    try:
        return getattr(place, name, None)
    except Exception:  # noqa: BLE001 - a property of an SDK may raise any error
        return None


@contextmanager
def blaming() -> Iterator[None]:
    """A context for one attempt of a program call and its metric: `blame` is called on its error."""
    with dspy.context(**{_FAILURES: []}):
        try:
            yield
        except BaseException as error:
            blame(error)
            raise


def blame(error: BaseException) -> None:
    """Make a request that failed because of the infrastructure the cause of the error of this attempt.

    Programs, and modules of DSPy such as ``Parallel`` and ``BestOfN``, continue without the answer of a
    failed request, and fail later because it is missing.
    """
    failures = [failure for _, failure in dspy.settings.get(_FAILURES) or ()]
    links = list(causes(error))
    failed = next((failure for failure in failures if classify(failure) in INFRASTRUCTURE), None)
    if failed is not None and not any(link is failure for link in links for failure in failures):
        links[-1].__cause__ = failed


def note_failed(error: Exception, asked: Any = None) -> None:
    """Remember a failed request, and the messages ``asked``, for `blame`."""
    failures = dspy.settings.get(_FAILURES)
    if failures is not None:
        failures.append((asked, error))


def note_raised_by_lm(error: Exception, is_new: bool, asked: Any = None, advice: str = "") -> None:
    """Mark the error of a request to an LM.

    Args:
        error: The error that the LM raised.
        is_new: Whether the LM has not answered any request yet, so that its name or address may be wrong.
        asked: The messages.
        advice: What to do about it, for messages and tracebacks.
    """
    vars(error)[_RAISED_BY_LM] = is_new
    if advice:
        vars(error)["__notes__"] = [advice]  # `add_note` of Python 3.11
    note_failed(error, asked)


def note_answered(asked: Any) -> None:
    """Forget failed requests with the messages ``asked``, which were now answered, perhaps by another LM."""
    failures = dspy.settings.get(_FAILURES)
    if failures:
        failures[:] = [(other, error) for other, error in failures if other is None or other != asked]


def retry_after(error: BaseException) -> float | None:
    """Seconds that a provider asks to wait: DSPy's ``retry_after``, or the header of that name."""
    wishes = (_seconds(wish) for link in causes(error) for wish in _wishes(link))
    return next((max(0.0, seconds) for seconds in wishes if math.isfinite(seconds)), None)


def _wishes(error: BaseException) -> Iterator[Any]:
    yield _attribute(error, "retry_after")
    response = _attribute(error, "response")
    for place, name in (response, "headers"), (error, "litellm_response_headers"), (error, "headers"):
        with suppress(AttributeError, TypeError, ValueError):  # an SDK may store anything under that name
            yield from (value for key, value in _attribute(place, name).items() if _is_retry_after(key))


def _is_retry_after(header: Any) -> bool:
    return str(header).lower() == "retry-after"


def _seconds(wish: Any) -> float:
    """Seconds from a number or an HTTP date; NaN for anything else."""
    with suppress(TypeError, ValueError):
        return float(wish)
    with suppress(AttributeError, TypeError, ValueError):
        return email.utils.parsedate_to_datetime(wish).timestamp() - time.time()
    return math.nan
