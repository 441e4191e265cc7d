"""Whose fault a failed program call is: DSPy's errors of all versions, and SDKs' by name."""

from __future__ import annotations

import sys
from typing import Any

import dspy
import pytest
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import ScoreError
from mpromptune.execution import Verdict
from mpromptune.lm_errors import classify


def _sdk_error(module: str, *names: str, **attributes: Any) -> Exception:
    """An exception whose class and ancestors are called ``names`` in ``module``, outermost first."""
    base: type = Exception
    for name in reversed(names):
        base = type(name, (base,), {"__module__": module, **attributes})
    return base("boom")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("LMRateLimitError", Verdict.RETRY),
        ("LMTimeoutError", Verdict.RETRY),
        ("LMServerError", Verdict.RETRY),
        ("LMTransportError", Verdict.RETRY),
        ("LMAuthError", Verdict.STOP),
        ("LMBillingError", Verdict.STOP),
        ("LMNotConfiguredError", Verdict.STOP),
        ("LMUnsupportedModelError", Verdict.STOP),
        ("LMInvalidRequestError", Verdict.CANDIDATE),
        ("LMUnexpectedError", Verdict.CANDIDATE),
    ],
)
def test_dspy_errors(name: str, verdict: Verdict) -> None:
    """DSPy's own errors, where the installed version has them."""
    if not hasattr(dspy_errors, name):
        pytest.skip(f"this DSPy has no {name}")
    assert classify(getattr(dspy_errors, name)("boom")) is verdict


def test_errors_of_the_candidate() -> None:
    """Unparsable answers, prompts too long and bugs of the program count against the candidate."""
    signature = dspy.Signature("question -> answer")
    assert classify(dspy_errors.AdapterParseError("ChatAdapter", signature, "?")) is Verdict.CANDIDATE
    assert classify(dspy_errors.ContextWindowExceededError(model="m")) is Verdict.CANDIDATE
    assert classify(KeyError("x")) is Verdict.CANDIDATE


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (_sdk_error("litellm.exceptions", "RateLimitError"), Verdict.RETRY),
        (_sdk_error("litellm.exceptions", "RateLimitError", code="insufficient_quota"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "Timeout"), Verdict.RETRY),
        (_sdk_error("litellm.exceptions", "ServiceUnavailableError", status_code=503), Verdict.RETRY),
        (_sdk_error("litellm.exceptions", "AuthenticationError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "NotFoundError"), Verdict.STOP),
        (_sdk_error("litellm.exceptions", "UnsupportedParamsError", "BadRequestError"), Verdict.STOP),
        (
            _sdk_error("litellm.exceptions", "ContextWindowExceededError", "BadRequestError"),
            Verdict.CANDIDATE,
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
    assert classify(exceptions.RateLimitError(**given)) is Verdict.RETRY
    assert classify(exceptions.InternalServerError(**given)) is Verdict.RETRY
    assert classify(exceptions.APIConnectionError(**given)) is Verdict.RETRY
    assert classify(exceptions.Timeout(**given)) is Verdict.RETRY
    assert classify(exceptions.AuthenticationError(**given)) is Verdict.STOP
    assert classify(exceptions.ContextWindowExceededError(**given)) is Verdict.CANDIDATE


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
    assert classify(TimeoutError()) is Verdict.RETRY
    assert classify(ScoreError("None")) is Verdict.STOP


def test_no_sdk_is_imported() -> None:
    """Classifying imports no SDK."""
    before = set(sys.modules)
    classify(_sdk_error("litellm.exceptions", "RateLimitError"))
    assert set(sys.modules) == before
