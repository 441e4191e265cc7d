"""Whose fault a failed program call is, and how long to wait: rules by the name and place of an error.

What was raised below a language model is the infrastructure's, whatever its class, unless it is known to be
said of the prompt. `lms/guard.py` sees every request, and marks what was raised there.
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

# Verdicts on classes by name, so that no SDK is imported for this: DSPy's own errors, of which older versions
# have fewer, LiteLLM's, which reached the caller there, and those of SDKs that a custom LM may use. Of a
# class and those that it inherits from, the first one counts.
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
        "JSONSchemaValidationError",  # an answer that does not fit, with the status of a server error
    ),
    Verdict.STOP: (
        *("LMAuthError", "LMBillingError", "LMConfigurationError"),
        *("LMUnsupportedModelError", "LMUnsupportedFeatureError"),
        *("AuthenticationError", "PermissionDeniedError", "NotFoundError", "PaymentRequiredError"),
        *("BudgetExceededError", "UnsupportedParamsError", "LiteLLMUnknownProvider"),
    ),
}
_VERDICTS = {name: verdict for verdict, names in _NAMES.items() for name in names}
# Packages whose classes these names are of.
_PACKAGES = {"mpromptune", "dspy", "litellm", "openai", "anthropic", "httpx", "requests"}
# What comes from these is raised below a language model; httpx and requests serve tools as well.
_PROVIDERS = {"litellm", "openai", "anthropic"}
# What the status of an answer says where the class of the error does not. Others are a gateway's, or pass.
_STATUSES = {
    **dict.fromkeys((400, 413, 422), Verdict.REFUSED),
    **dict.fromkeys((401, 402, 403, 404), Verdict.STOP),
    429: Verdict.THROTTLE,
}
# DSPy's for any request that was refused: the prompt's fault, unless a status says otherwise.
_ANY_REFUSAL = "LMInvalidRequestError"
_NOT_FOUND = {"LMUnsupportedModelError", "NotFoundError"}
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


def classify(error: BaseException) -> Verdict:
    """Infrastructure is retried, rate limits slow down as well, a misconfigured LM stops the run.

    An error that says nothing by itself is judged by what it was raised from. Where nothing is known of that
    either, it is the infrastructure's if it was raised below a language model, and else the candidate's.
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
            return Verdict.RETRY  # of a gateway: the model was there before
        if verdict is not None:
            return verdict
    return Verdict.RETRY if below else Verdict.CANDIDATE


def _verdict(error: BaseException, names: list[str], below: bool) -> Verdict | None:
    """What is known of an error by itself; of any class, if it was raised ``below`` a language model."""
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
    """What its package calls it, and the kinds of error that this is one of."""
    return [cls.__name__ for cls in type(error).__mro__ if _package(cls) in _PACKAGES]


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_providers(error: BaseException) -> bool:
    """Whether its class alone says that it was raised below a language model."""
    return "LMError" in _names(error) or any(_package(cls) in _PROVIDERS for cls in type(error).__mro__)


def _is_empty(error: BaseException) -> bool:
    """Whether an adapter was given nothing to parse."""
    if not isinstance(error, dspy_errors.AdapterParseError):
        return False
    return str(error).startswith(_EMPTY) or not str(_attribute(error, "lm_response")).strip()


def _is_unpaid(error: BaseException) -> bool:
    """Whether waiting does not help; LiteLLM has the code only in the text."""
    return _UNPAID in (_attribute(error, "code"), _attribute(error, "provider_code")) or _UNPAID in str(error)


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


def note_raised_by_lm(error: Exception, is_new: bool, asked: Any = None) -> None:
    """Marks what a request to an LM has ended with.

    Args:
        error: As it leaves the LM.
        is_new: Whether the LM has not answered anything yet, so that its name or address may be wrong.
        asked: The messages.
    """
    vars(error)[_RAISED_BY_LM] = is_new
    note_failed(error, asked)


def note_answered(asked: Any) -> None:
    """Has `blame` forget requests that failed and were made again, be it of another LM."""
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
        with suppress(AttributeError, TypeError, ValueError):  # whatever an SDK keeps under that name
            yield from (value for key, value in _attribute(place, name).items() if _is_retry_after(key))


def _is_retry_after(header: Any) -> bool:
    return str(header).lower() == "retry-after"


def _seconds(wish: Any) -> float:
    """A number of seconds, or a date of HTTP; not a number for anything else."""
    with suppress(TypeError, ValueError):
        return float(wish)
    with suppress(AttributeError, TypeError, ValueError):
        return email.utils.parsedate_to_datetime(wish).timestamp() - time.time()
    return math.nan
