"""The verdict on DSPy's exceptions: whose fault a failed program call is."""

from __future__ import annotations

from dspy.utils import exceptions as dspy_errors

from mpromptune.execution import Verdict, classify_builtin


def _known(*names: str) -> tuple[type[BaseException], ...]:
    """The exception classes that this version of DSPy has."""
    return tuple(getattr(dspy_errors, name) for name in names if hasattr(dspy_errors, name))


_RETRY = _known(
    "LMRateLimitError", "LMTimeoutError", "LMServerError", "LMTransportError", "LMLockTimeoutError"
)
_CANDIDATE = _known("AdapterParseError", "ContextWindowExceededError")
_STOP = _known(
    "LMAuthError",
    "LMBillingError",
    "LMConfigurationError",
    "LMUnsupportedModelError",
    "LMUnsupportedFeatureError",
)


def classify(error: BaseException) -> Verdict:
    """Infrastructure is retried, a misconfigured LM stops the run, the rest is the candidate's."""
    for classes, verdict in ((_RETRY, Verdict.RETRY), (_CANDIDATE, Verdict.CANDIDATE), (_STOP, Verdict.STOP)):
        if isinstance(error, classes):
            return verdict
    return classify_builtin(error)
