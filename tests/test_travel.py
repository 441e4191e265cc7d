"""Errors and objects on their way between processes."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import dspy
import httpx
import litellm
import openai
import pytest
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import ScoreError, TravelError, causes
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.worker import RemoteError, pack, pack_error, unpack_error
from mpromptune.lms.errors import classify, note_raised_by_lm, retry_after

RESPONSE = httpx.Response(429, headers={"retry-after": "7"}, request=httpx.Request("POST", "http://lm"))


class ParticularError(Exception):
    """Takes arguments that pickle does not give it, and holds what cannot be pickled."""

    def __init__(self, *, code: int, lock: Any) -> None:
        super().__init__(f"code {code}")
        self.code, self.lock = code, lock


class PickyError(Exception):
    """Cannot be made without what its arguments do not hold."""

    def __new__(cls, *, code: int) -> PickyError:
        return super().__new__(cls)

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


def local_error() -> Exception:
    class LocalError(ConnectionError):
        pass

    return LocalError("gone")


def dspy_error(name: str, **given: Any) -> Exception:
    """DSPy's error of that name, or, where this version has none, one that says as little."""
    cls = getattr(dspy_errors, name, None)
    return cls("refused", **given) if cls is not None else ValueError(name)


def parse_error() -> Exception:
    return dspy_errors.AdapterParseError("ChatAdapter", dspy.Signature("question -> answer"), "gibberish")


ERRORS = [
    ValueError("x", 3),
    OSError(2, "No such file", "name"),
    UnicodeDecodeError("utf-8", b"abc", 1, 2, "bad"),
    KeyError("missing"),
    ScoreError("not a number"),
    ParticularError(code=3, lock=threading.Lock()),
    local_error(),
    parse_error(),
    dspy_error("LMRateLimitError", retry_after=3.0, provider_code="slow"),
    dspy_error("LMRateLimitError", code="insufficient_quota"),
    dspy_error("LMAuthError"),
    dspy_error("LMServerError", status=503),
    litellm.exceptions.RateLimitError("slow down", "openai", "gpt", response=RESPONSE),
    litellm.exceptions.AuthenticationError("no", "openai", "gpt"),
    litellm.exceptions.ContextWindowExceededError("long", "gpt", "openai"),
    openai.RateLimitError("slow down", response=RESPONSE, body={"code": "insufficient_quota"}),
    openai.APIConnectionError(request=RESPONSE.request),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_as_what_it_was(error: Exception) -> None:
    """Type, text, verdict and the wait that it asks for are the same, whatever its constructor takes."""
    back = unpack_error(pack_error(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert classify(back) is classify(error)
    assert retry_after(back) == retry_after(error)


@pytest.mark.parametrize(
    "error",
    [
        lambda: ValueError("x"),
        lambda: PickyError(code=3),
        lambda: UnicodeDecodeError("utf-8", b"a", 0, 1, "x"),
    ],
)
def test_what_a_language_model_raised_is_known_for_that_elsewhere(error: Any) -> None:
    """Whatever else of the error cannot travel."""
    assert classify(unpack_error(pack_error(error()))) is Verdict.CANDIDATE
    note_raised_by_lm(raised := error(), is_new=False)
    assert classify(unpack_error(pack_error(raised))) is Verdict.RETRY


def test_what_an_error_was_raised_from_comes_along() -> None:
    """The chain of causes is kept, and ends with where in the worker all of it happened."""
    try:
        try:
            raise TimeoutError("slow")
        except TimeoutError as cause:
            raise RuntimeError("wrapped") from cause
    except RuntimeError as raised:
        back = list(causes(unpack_error(pack_error(raised))))
    assert [type(link) for link in back] == [RuntimeError, TimeoutError, RemoteError]
    assert 'raise TimeoutError("slow")' in str(back[-1])
    assert classify(back[0]) is classify(TimeoutError())


def test_an_error_whose_class_cannot_travel_keeps_its_name() -> None:
    """What is known of it, for whoever judges errors by name, is its module, its name and its text."""

    class Stuck(type):
        def __reduce_ex__(cls, protocol: Any) -> Any:
            raise TypeError("stays here")

    cls = Stuck(
        "RateLimitError", (Exception,), {"__module__": "litellm.exceptions", "lock": threading.Lock()}
    )
    back = unpack_error(pack_error(cls("slow down")))
    assert (type(back).__name__, str(back)) == ("RateLimitError", "slow down")
    picky = unpack_error(pack_error(PickyError(code=3)))  # nothing that an error does then loses a call
    assert (type(picky).__name__, str(picky)) == ("PickyError", "code 3")
    assert classify(back) is classify(litellm.exceptions.RateLimitError("slow down", "openai", "gpt"))


def test_the_part_that_cannot_travel_is_named() -> None:
    """Of several parts the error says which, and why."""
    parts = {"the program": 3, "the metric": threading.Lock(), "the validation set": [1]}
    with pytest.raises(TravelError, match=r"^The metric cannot be sent.*lock"):
        pack(list(parts.values()), parts)
    assert pickle.loads(pack([lambda: 5], {}))[0]() == 5
