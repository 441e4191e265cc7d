"""Changes DSPy's adapters during a compile: saved answers are used again, and empty answers are errors.

DSPy has no hook for this, so an adapter, and the LM that it calls, are replaced by objects of subclasses.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import dspy
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import AnswerRefusedError, EmptyAnswerError
from mpromptune.execution.pool import Score
from mpromptune.execution.usage import Meter, Usage
from mpromptune.lms.errors import note_failed
from mpromptune.lms.metering import measured, meter_of_requests, settings_of

# `keeping` with the scope of an attempt, proposal or example; the arguments make up its name.
Keeping = Callable[..., AbstractContextManager[None]]

# Name of the DSPy setting with the scope: DSPy's thread pools inherit settings, but no context variables.
_SCOPE = "mpromptune_scope"
# Settings of a model that change its answers; others may be secrets.
_SETTINGS = ("temperature", "max_tokens", "n", "top_p", "rollout_id")
# Finish reasons of providers that are caused by the prompt.
_OF_THE_PROMPT = ("content_filter", "refusal", "length")


@dataclass(frozen=True)
class Answer:
    """The answer of a language model to one request.

    Attributes:
        outputs: The outputs for DSPy's adapters.
        usage: The usage of the request, if it is not saved elsewhere.
        total: The usage of its whole step until then, if known.
    """

    outputs: list[Any]
    usage: Usage = field(default_factory=Usage)
    total: Usage = field(default_factory=Usage)


class Answers(Protocol):
    """Saves answers; its methods are called from any thread.

    A request is identified by its scope, its digest, and the number of earlier equal requests in the scope.
    """

    def answer(self, scope: str, digest: str, number: int, cached: bool) -> Answer | None:
        """The answer, if known; if its LM is ``cached``, any answer of an earlier run to an equal request."""

    def keep_answer(self, scope: str, digest: str, number: int, answer: Answer) -> None:
        """Save an answer."""


def keep_nothing(*name: object) -> AbstractContextManager[None]:
    """The default `Keeping`, which saves no answers."""
    return nullcontext()


@contextmanager
def keeping(answers: Answers | None, scope: str, step: Meter | None = None) -> Iterator[None]:
    """A context in which requests of `watched` adapters use saved answers, and save new ones.

    Args:
        answers: The saved answers; None saves nothing.
        scope: Name of a program call or proposal, which makes the same requests in every run. With "", only
            answers of an earlier run to cached requests are used, and no answers are saved.
        step: Meter of the step, if its usage is saved for interrupted runs.
    """
    with nullcontext() if answers is None else dspy.context(**{_SCOPE: _Scope(answers, scope, step)}):
        yield


def reusing(answers: Answers | None, score: Score) -> Score:
    """``score``, whose requests use answers of an earlier run if the LM has a cache."""

    def scored(params: dict[str, int], example: int) -> float:
        with keeping(answers, ""):
            return score(params, example)

    return scored


def watched(adapter: Any) -> Any:
    """A substitute for an adapter of DSPy's settings while requests are watched.

    It treats an answer without text as an infrastructure error: DSPy treats it as an answer that cannot be
    parsed, and either asks again with another prompt or returns a prediction without fields. It also lets the
    default adapter fall back to JSON only after an answer that cannot be parsed: DSPy 3.2 does so after any
    error and DSPy 3.3 after errors that are not its own, so the answer after a refusal or a timeout would be
    scored.
    """
    own = dspy.ChatAdapter() if adapter is None else adapter
    twin = _like(own, _Watched, dict(getattr(own, "__dict__", {})))
    if twin is not own:
        twin.stands_for = given_adapter(adapter)
        if type(own) is dspy.ChatAdapter:
            twin.falls_back, twin.use_json_adapter_fallback = own.use_json_adapter_fallback, False
    return twin


def given_adapter(adapter: Any) -> Any:
    """The user's adapter, even if ``adapter`` is a substitute for it."""
    return getattr(adapter, "stands_for", adapter)


class _Watched:
    """Mixin before a class of adapters: see `watched`."""

    stands_for: Any = None
    falls_back = False

    def __call__(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        lm = kept(lm)
        try:
            return super().__call__(lm, *args, **kwargs)  # type: ignore[misc]
        except dspy_errors.AdapterParseError:
            if not self.falls_back:
                raise
            return self._as_json()(lm, *args, **kwargs)

    async def acall(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        lm = kept(lm)
        try:
            return await super().acall(lm, *args, **kwargs)  # type: ignore[misc]
        except dspy_errors.AdapterParseError:
            if not self.falls_back:
                raise
            return await self._as_json().acall(lm, *args, **kwargs)

    def _as_json(self) -> Any:
        """The JSON adapter that ``ChatAdapter`` falls back to; DSPy 3.2 has no method that makes it."""
        return getattr(self, "_make_json_adapter_fallback", dspy.JSONAdapter)()

    def _call_postprocess(
        self, processed: Any, original: Any, outputs: Any, lm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Postprocess as the adapter's class does, but raise an error if an output is empty."""
        if not outputs or any(map(_is_empty, outputs)):
            if (reason := _refusal(lm, outputs)) is not None:
                raise AnswerRefusedError(f"The language model returned an empty answer: {reason}.")
            error = EmptyAnswerError(f"The language model returned an empty answer: {outputs!r}.")
            note_failed(error)
            raise error
        return super()._call_postprocess(processed, original, outputs, lm, *args, **kwargs)  # type: ignore[misc]


def _is_empty(output: Any) -> bool:
    if not isinstance(output, dict):
        output = {"text": output}
    return not output.get("tool_calls") and not str(output.get("text") or "").strip()


def _refusal(lm: Any, outputs: Any) -> str | None:
    """The reason for an empty answer, if the LM's history has one that the prompt caused."""
    entries = reversed(list(getattr(lm, "history", ())))
    response = next((entry.get("response") for entry in entries if entry.get("outputs") is outputs), None)
    for choice in getattr(response, "choices", None) or [response]:
        message, reason = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
        parts = getattr(message, "parts", ())  # from DSPy 3.4 on
        if getattr(message, "refusal", None) or any(getattr(part, "type", "") == "refusal" for part in parts):
            reason = "refusal"
        if reason in _OF_THE_PROMPT:
            return str(reason)
    return None


@dataclass
class _Scope:
    """A program call or proposal, named by `keeping`."""

    answers: Answers
    name: str
    step: Meter | None
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, lm: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, str, int]:
        """The scope, digest and number that identify a request."""
        settings = settings_of(lm, kwargs)
        decisive = {name: settings.get(name) for name in _SETTINGS}
        request = [getattr(lm, "model", None), args, kwargs.get("messages"), decisive]
        text = json.dumps(request, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        with self.lock:
            self.asked[digest] += 1
            return self.name, digest, self.asked[digest] - 1

    def keep(self, place: tuple[str, str, int], lm: Any, outputs: Any, used: Usage) -> None:
        """Save an answer that is not empty and not in DSPy's cache."""
        is_answer = isinstance(outputs, list) and outputs and not any(map(_is_empty, outputs))
        if self.name and is_answer and not (isinstance(lm, dspy.LM) and used.cache_hits):
            answer = Answer(outputs, used) if self.step is None else Answer(outputs, total=self.step.total)
            self.answers.keep_answer(*place, answer)


@contextmanager
def _asking(lm: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[list[Any]]:
    """A list with the saved outputs; if it is empty, the outputs appended to it are saved at the end."""
    scope, meter = dspy.settings.get(_SCOPE), meter_of_requests()
    if scope is None:
        yield []
        return
    place = scope.place(lm, args, kwargs)
    known = scope.answers.answer(*place, bool(settings_of(lm, kwargs)["cache"]))
    if known is not None:
        if meter is not None:
            meter.add(known.usage)
        yield [known.outputs]
        return
    found: list[Any] = []
    with measured(Meter(meter)) as own:
        yield found
    scope.keep(place, lm, found[0], own.total)


class _KeptLM:
    """Mixin before a class of LMs: uses the saved answers of the scope of this context."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _asking(self, args, kwargs) as found:
            if not found:
                found.append(super().__call__(*args, **kwargs))  # type: ignore[misc]
        return found[0]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        with _asking(self, args, kwargs) as found:
            if not found:
                found.append(await super().acall(*args, **kwargs))  # type: ignore[misc]
        return found[0]


def kept(lm: Any) -> Any:
    """An LM that shares the state of this one, and uses the saved answers of the scope of this context."""
    keeps = dspy.settings.get(_SCOPE) is not None and isinstance(lm, dspy.BaseLM)
    return _like(lm, _KeptLM, vars(lm)) if keeps else lm


def _like(instance: Any, mixin: type, state: dict[str, Any]) -> Any:
    """A copy of ``instance`` with this state and the methods of ``mixin``; ``instance`` if that fails."""
    cls: Any = type(instance)
    if issubclass(cls, mixin) or any(vars(base).get("__slots__") for base in cls.__mro__):
        return instance
    try:
        twin: Any = object.__new__(_subclass(cls, mixin))
        twin.__dict__ = state
    except (AttributeError, TypeError):  # a class that cannot be created in this way
        return instance
    return twin


@lru_cache(maxsize=64)
def _subclass(cls: type, mixin: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made = type(cls.__name__, (mixin, cls), names)
    for name in vars(made).keys() & {"format", "parse"}:
        delattr(made, name)  # DSPy wraps them for each class of adapters: callbacks would be called twice
    return made
