"""The verdict on the exceptions of DSPy and of model SDKs: whose fault a failed program call is."""

from __future__ import annotations

from collections.abc import Iterator

from dspy.utils import exceptions as dspy_errors

from mpromptune.execution import Verdict, classify_builtin


def _known(*names: str) -> tuple[type[BaseException], ...]:
    """The exception classes that this version of DSPy has (3.2 has two of them)."""
    return tuple(getattr(dspy_errors, name) for name in names if hasattr(dspy_errors, name))


_DSPY = (
    (
        _known(
            "LMRateLimitError",
            "LMTimeoutError",
            "LMServerError",
            "LMTransportError",
            "LMLockTimeoutError",
            "LMStreamAssemblyError",
        ),
        Verdict.RETRY,
    ),
    (_known("AdapterParseError", "ContextWindowExceededError"), Verdict.CANDIDATE),
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
# LiteLLM's UnsupportedParamsError is a BadRequestError.
_SDKS = frozenset({"litellm", "openai", "anthropic", "httpx", "requests"})
_SDK_VERDICTS = (
    (
        frozenset(
            {
                "AuthenticationError",
                "PermissionDeniedError",
                "NotFoundError",
                "BudgetExceededError",
                "UnsupportedParamsError",
            }
        ),
        Verdict.STOP,
    ),
    (frozenset({"BadRequestError", "UnprocessableEntityError"}), Verdict.CANDIDATE),
    (
        frozenset({"RateLimitError", "Timeout", "APIConnectionError", "TransportError", "ConnectionError"}),
        Verdict.RETRY,
    ),
)


def classify(error: BaseException) -> Verdict:
    """Infrastructure is retried, a misconfigured LM stops the run, the rest is the candidate's.

    An error that says nothing by itself is judged by what it was raised from.
    """
    verdicts = (_verdict(link) for link in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), Verdict.CANDIDATE)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__


def _verdict(error: BaseException) -> Verdict | None:
    for classes, verdict in _DSPY:
        if isinstance(error, classes):
            return verdict
    builtin = classify_builtin(error)
    return _sdk_verdict(error) if builtin is Verdict.CANDIDATE else builtin


def _sdk_verdict(error: BaseException) -> Verdict | None:
    ancestors = type(error).__mro__
    names = {cls.__name__ for cls in ancestors if cls.__module__.partition(".")[0] in _SDKS}
    if names and getattr(error, "code", None) == "insufficient_quota":
        return Verdict.STOP  # travels as a rate limit, but waiting does not help
    for known, verdict in _SDK_VERDICTS:
        if names & known:
            return verdict
    status = getattr(error, "status_code", None)
    return Verdict.RETRY if names and isinstance(status, int) and status >= 500 else None
