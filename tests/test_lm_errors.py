"""Whose fault a failed program call is: DSPy's errors of all versions, and SDKs' by name."""

from __future__ import annotations

import asyncio
import email.utils
import sys
from concurrent import futures
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import ScoreError, reason
from mpromptune.execution.attempts import Verdict
from mpromptune.lms.errors import classify, note_raised_by_lm, retry_after


def _sdk_error(module: str, *names: str, **attributes: Any) -> Exception:
    """An exception whose class and ancestors are called ``names`` in ``module``, outermost first."""
    base: type = Exception
    for name in reversed(names):
        base = type(name, (base,), {"__module__": module, **attributes})
    return base("boom")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("LMRateLimitError", Verdict.THROTTLE),
        ("LMTimeoutError", Verdict.RETRY),
        ("LMServerError", Verdict.RETRY),
        ("LMTransportError", Verdict.RETRY),
        ("LMAuthError", Verdict.STOP),
        ("LMBillingError", Verdict.STOP),
        ("LMNotConfiguredError", Verdict.STOP),
        ("LMUnsupportedModelError", Verdict.STOP),
        ("LMConfigurationError", Verdict.STOP),
        ("LMUnsupportedFeatureError", Verdict.STOP),
        ("LMLockTimeoutError", Verdict.RETRY),
        ("LMStreamAssemblyError", Verdict.RETRY),
        ("LMCollectionLimitError", Verdict.REFUSED),
        ("LMInvalidRequestError", Verdict.REFUSED),
        ("LMProviderError", Verdict.RETRY),
        ("LMUnexpectedError", Verdict.RETRY),
    ],
)
def test_dspy_errors(name: str, verdict: Verdict) -> None:
    """DSPy's own errors, where the installed version has them."""
    if not hasattr(dspy_errors, name):
        pytest.skip(f"this DSPy has no {name}")
    assert classify(getattr(dspy_errors, name)("boom")) is verdict


def test_errors_of_the_candidate() -> None:
    """Bugs of the program count against the candidate; unparsable answers and long prompts mostly do."""
    signature = dspy.Signature("question -> answer")
    assert classify(dspy_errors.AdapterParseError("ChatAdapter", signature, "?")) is Verdict.REFUSED
    assert classify(dspy_errors.ContextWindowExceededError(model="m")) is Verdict.REFUSED
    assert classify(KeyError("x")) is Verdict.CANDIDATE


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (_sdk_error("litellm.exceptions", "RateLimitError"), Verdict.THROTTLE),
        (_sdk_error("litellm.exceptions", "RateLimitError", code="insufficient_quota"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "Timeout"), Verdict.RETRY),
        (_sdk_error("litellm.exceptions", "ServiceUnavailableError", status_code=503), Verdict.RETRY),
        (_sdk_error("litellm.exceptions", "AuthenticationError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "NotFoundError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "UnsupportedParamsError", "BadRequestError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "PaymentRequiredError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "LiteLLMUnknownProvider", "BadRequestError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "JSONSchemaValidationError", status_code=500), Verdict.REFUSED),
        (
            _sdk_error("litellm.exceptions", "ContextWindowExceededError", "BadRequestError"),
            Verdict.REFUSED,
        ),
        (_sdk_error("openai", "APITimeoutError", "APIConnectionError"), Verdict.RETRY),
        (_sdk_error("anthropic", "OverloadedError", status_code=529), Verdict.RETRY),
        (_sdk_error("httpx", "ConnectTimeout", "TransportError"), Verdict.RETRY),
        (_sdk_error("my_program", "RateLimitError"), Verdict.CANDIDATE),
    ],
    ids=lambda value: value.name if isinstance(value, Verdict) else type(value).__name__,
)
def test_sdk_errors_by_name(error: Exception, verdict: Verdict) -> None:
    """What LiteLLM and other SDKs raise is known by name; the same name elsewhere is not."""
    assert classify(error) is verdict


def test_litellm_errors_themselves() -> None:
    """LiteLLM's real classes, as DSPy 3.2 lets them through."""
    exceptions = pytest.importorskip("litellm.exceptions")
    given = {"message": "boom", "llm_provider": "openai", "model": "m"}
    assert classify(exceptions.RateLimitError(**given)) is Verdict.THROTTLE
    assert classify(exceptions.InternalServerError(**given)) is Verdict.RETRY
    assert classify(exceptions.APIConnectionError(**given)) is Verdict.RETRY
    assert classify(exceptions.Timeout(**given)) is Verdict.RETRY
    assert classify(exceptions.AuthenticationError(**given)) is Verdict.STOP
    assert classify(exceptions.ContextWindowExceededError(**given)) is Verdict.REFUSED


def test_an_account_without_money_is_no_rate_limit() -> None:
    """It travels as one, with its code where the provider or LiteLLM happens to put it."""
    assert classify(_sdk_error("openai", "RateLimitError", code="insufficient_quota")) is Verdict.STOP
    exceptions = pytest.importorskip("litellm.exceptions")
    message = "OpenAIException - Error code: 429 - {'error': {'code': 'insufficient_quota'}}"
    error = exceptions.RateLimitError(message=message, llm_provider="openai", model="m")
    assert classify(error) is Verdict.STOP
    if hasattr(dspy_errors, "LMRateLimitError"):
        unpaid = dspy_errors.LMRateLimitError("no", provider_code="insufficient_quota")
        assert classify(unpaid) is Verdict.STOP


def _with_headers(name: str, value: object) -> Exception:
    error = _sdk_error("openai", "RateLimitError")
    error.response = SimpleNamespace(headers={name: value})  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    """The header in any case, a number of seconds; what cannot be read is no wish."""
    assert retry_after(_with_headers("Retry-After", value)) == seconds
    assert retry_after(_with_headers("retry-after", value)) == seconds


def test_retry_after_as_a_date() -> None:
    """HTTP allows a date as well; one that has passed means now."""
    later = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    assert 90 < (retry_after(_with_headers("Retry-After", later)) or 0) <= 100
    assert retry_after(_with_headers("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")) == 0


def test_retry_after_wherever_it_is_kept() -> None:
    """As an attribute (DSPy), as LiteLLM's copy of the headers, and in what an error was raised from."""
    for attributes in ({"retry_after": 4}, {"litellm_response_headers": {"retry-after": "4"}}):
        assert retry_after(_sdk_error("litellm.exceptions", "RateLimitError", **attributes)) == 4
    wrapped = RuntimeError("program failed")
    wrapped.__cause__ = _with_headers("retry-after", "4")
    assert retry_after(wrapped) == 4
    assert retry_after(RuntimeError("whatever")) is None
    assert retry_after(_sdk_error("openai", "RateLimitError", response="none", headers=["x"])) is None


def test_a_wrapper_is_judged_by_its_cause() -> None:
    """An error that says nothing by itself is judged by what it was raised from, cycles included."""
    wrapped = RuntimeError("program failed")
    wrapped.__cause__ = ValueError("call failed")
    wrapped.__cause__.__cause__ = ConnectionError("reset")
    assert classify(wrapped) is Verdict.RETRY
    loop = RuntimeError("loop")
    loop.__cause__ = loop
    assert classify(loop) is Verdict.CANDIDATE


def test_builtin_errors() -> None:
    """Network errors of the standard library are retried; a bad score stops the run."""
    for timeout in (TimeoutError, futures.TimeoutError, asyncio.TimeoutError):  # three of them in 3.10
        assert classify(timeout()) is Verdict.RETRY
    assert classify(ScoreError("None")) is Verdict.STOP


@pytest.mark.parametrize(("is_new", "verdict"), [(True, Verdict.STOP), (False, Verdict.RETRY)])
def test_no_connection_at_all(is_new: bool, verdict: Verdict) -> None:
    """At an address that never answered it is final; after an answer it is an outage."""
    error = _sdk_error("litellm.exceptions", "InternalServerError")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    note_raised_by_lm(error, is_new)
    assert classify(error) is verdict


def test_the_reason_of_an_error_is_one_paragraph() -> None:
    """With the system's reason if the text lacks it, and no full stop, since a sentence follows."""
    error = RuntimeError("No key.\n\n  To fix:\n    - Set one\n")
    assert reason(error) == "RuntimeError: No key.\nTo fix:\n- Set one"
    error = RuntimeError("Connection error.")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert reason(error) == "RuntimeError: Connection error ([Errno 111] Connection refused)"


def test_no_sdk_is_imported() -> None:
    """Classifying imports no SDK."""
    before = set(sys.modules)
    classify(_sdk_error("litellm.exceptions", "RateLimitError"))
    assert set(sys.modules) == before
