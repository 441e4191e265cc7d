"""The exceptions of DSPy and of model SDKs: whose fault a failed program call is, and how long to wait."""

from __future__ import annotations

import email.utils
import math
import time
from typing import Any

from dspy.utils import exceptions as dspy_errors

from mpromptune.calls.attempts import Verdict
from mpromptune.calls.execution import classify_builtin
from mpromptune.errors import causes


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
    (
        _known("AdapterParseError", "ContextWindowExceededError", "LMCollectionLimitError"),
        Verdict.CANDIDATE,
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
        Verdict.CANDIDATE,
    ),
    (frozenset({"RateLimitError"}), Verdict.THROTTLE),
    (
        frozenset({"Timeout", "APIConnectionError", "TransportError", "ConnectionError"}),
        Verdict.RETRY,
    ),
)
# What OpenAI and its imitators call an account without money; it travels as a rate limit.
_UNPAID = "insufficient_quota"
# What Python's codecs, and DSPy from 3.4 on, say of a request with half a character: it never leaves us.
_UNSENDABLE = ("surrogates not allowed", "lone surrogate")


def classify(error: BaseException) -> Verdict:
    """Infrastructure is retried, rate limits slow down as well, a misconfigured LM stops the run.

    The rest is the candidate's.
    An error that says nothing by itself is judged by what it was raised from.
    """
    if any(phrase in str(error) for phrase in _UNSENDABLE):
        return Verdict.CANDIDATE
    verdicts = (_verdict(link) for link in causes(error))
    return next((verdict for verdict in verdicts if verdict is not None), Verdict.CANDIDATE)


def _verdict(error: BaseException) -> Verdict | None:
    for classes, verdict in _DSPY:
        if isinstance(error, classes):
            return Verdict.STOP if verdict is Verdict.THROTTLE and _is_unpaid(error) else verdict
    builtin = classify_builtin(error)
    return _sdk_verdict(error) if builtin is Verdict.CANDIDATE else builtin


def _is_unpaid(error: BaseException) -> bool:
    """Whether waiting does not help; LiteLLM has the code only in the text."""
    codes = (getattr(error, "code", None), getattr(error, "provider_code", None))
    return _UNPAID in codes or _UNPAID in str(error)


def _sdk_verdict(error: BaseException) -> Verdict | None:
    ancestors = type(error).__mro__
    names = {cls.__name__ for cls in ancestors if cls.__module__.partition(".")[0] in _SDKS}
    if names and _is_unpaid(error):
        return Verdict.STOP
    for known, verdict in _SDK_VERDICTS:
        if names & known:
            return verdict
    status = getattr(error, "status_code", None)
    return Verdict.RETRY if names and isinstance(status, int) and status >= 500 else None


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
