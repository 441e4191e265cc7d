"""What DSPy's adapters do otherwise in a compile: kept answers are given again, empty ones are no answers.

DSPy has no hook for this: an adapter, and the LM that it asks, are replaced by an object of a subclass.
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

# `keeping`, in the scope of the attempt, proposal or example of the name that it is called with.
Keeping = Callable[..., AbstractContextManager[None]]

# The scope as a setting of DSPy's: its own thread pools inherit these, but not context variables.
_SCOPE = "mpromptune_scope"
# Settings of a model that change its answers; the others may be secrets.
_SETTINGS = ("temperature", "max_tokens", "n", "top_p", "rollout_id")
# Reasons that providers give for the end of an answer, and that say something of its prompt.
_OF_THE_PROMPT = ("content_filter", "refusal", "length")


@dataclass(frozen=True)
class Answer:
    """What a language model returned to one request.

    Attributes:
        outputs: As DSPy's adapters take it.
        usage: What it used, where nothing else keeps that.
        total: What its whole step had used by then, where that is known.
    """

    outputs: list[Any]
    usage: Usage = field(default_factory=Usage)
    total: Usage = field(default_factory=Usage)


class Answers(Protocol):
    """Keeps answers; both methods may be called by any thread.

    A request is known by its scope, its digest and how many like it the scope has made before.
    """

    def answer(self, scope: str, digest: str, number: int, cached: bool) -> Answer | None:
        """Its answer, if known; where LMs have a cache, that to any like it before this run."""

    def keep_answer(self, scope: str, digest: str, number: int, answer: Answer) -> None:
        """Keeps it."""


def keep_nothing(*name: object) -> AbstractContextManager[None]:
    """The default `Keeping`."""
    return nullcontext()


@contextmanager
def keeping(answers: Answers | None, scope: str, step: Meter | None = None) -> Iterator[None]:
    """Requests that `watched` adapters make in here are answered from what is kept, and else kept.

    Args:
        answers: Keeps them; None keeps nothing.
        scope: Names one program call or one proposal, which makes the same requests whenever it is made.
            With "" there are only the answers of an earlier run to requests that LMs cache, and none is kept.
        step: Counts the usage of the step that it is part of, if that outlives an interrupted run.
    """
    with nullcontext() if answers is None else dspy.context(**{_SCOPE: _Scope(answers, scope, step)}):
        yield


def reusing(answers: Answers | None, score: Score) -> Score:
    """``score``, whose requests find the answers of an earlier run where the LM has a cache."""

    def scored(params: dict[str, int], example: int) -> float:
        with keeping(answers, ""):
            return score(params, example)

    return scored


def watched(adapter: Any) -> Any:
    """What stands for an adapter of DSPy's settings while requests are watched.

    An answer without text is a fault of the infrastructure: DSPy takes it for one that cannot be parsed, and
    asks again with another prompt, or for a prediction without fields. The default adapter asks again as JSON
    only after an answer that cannot be parsed: up to DSPy 3.2 it does so after any error, and in 3.3 after
    those that are not DSPy's own, so that what follows a refusal or a timeout would be scored.
    """
    own = dspy.ChatAdapter() if adapter is None else adapter
    twin = _like(own, _Watched, dict(getattr(own, "__dict__", {})))
    if twin is not own:
        twin.stands_for = given_adapter(adapter)
        if type(own) is dspy.ChatAdapter:
            twin.falls_back, twin.use_json_adapter_fallback = own.use_json_adapter_fallback, False
    return twin


def given_adapter(adapter: Any) -> Any:
    """The user's adapter, whether or not another one stands for it."""
    return getattr(adapter, "stands_for", adapter)


class _Watched:
    """Before a class of adapters: see `watched`."""

    stands_for: Any = None
    falls_back = False

    def __call__(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        lm = _kept(lm)
        try:
            return super().__call__(lm, *args, **kwargs)  # type: ignore[misc]
        except dspy_errors.AdapterParseError:
            if not self.falls_back:
                raise
            return self._as_json()(lm, *args, **kwargs)

    async def acall(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        lm = _kept(lm)
        try:
            return await super().acall(lm, *args, **kwargs)  # type: ignore[misc]
        except dspy_errors.AdapterParseError:
            if not self.falls_back:
                raise
            return await self._as_json().acall(lm, *args, **kwargs)

    def _as_json(self) -> Any:
        """As ``ChatAdapter`` makes it, which 3.2 does in the midst of things."""
        return getattr(self, "_make_json_adapter_fallback", dspy.JSONAdapter)()

    def _call_postprocess(
        self, processed: Any, original: Any, outputs: Any, lm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the adapter's class, where all outputs of a request say something."""
        if not outputs or any(map(_is_empty, outputs)):
            if (reason := _refusal(lm, outputs)) is not None:
                raise AnswerRefusedError(f"The language model answered with nothing: {reason}.")
            error = EmptyAnswerError(f"The language model answered with nothing to parse: {outputs!r}.")
            note_failed(error)
            raise error
        return super()._call_postprocess(processed, original, outputs, lm, *args, **kwargs)  # type: ignore[misc]


def _is_empty(output: Any) -> bool:
    if not isinstance(output, dict):
        output = {"text": output}
    return not output.get("tool_calls") and not str(output.get("text") or "").strip()


def _refusal(lm: Any, outputs: Any) -> str | None:
    """The reason of the prompt's for which an answer is empty, if the LM's history has one."""
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
    """One program call or proposal, as `keeping` names it."""

    answers: Answers
    name: str
    step: Meter | None
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, lm: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, str, int]:
        """What a request is known by."""
        settings = settings_of(lm, kwargs)
        decisive = {name: settings.get(name) for name in _SETTINGS}
        request = [getattr(lm, "model", None), args, kwargs.get("messages"), decisive]
        text = json.dumps(request, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        with self.lock:
            self.asked[digest] += 1
            return self.name, digest, self.asked[digest] - 1

    def keep(self, place: tuple[str, str, int], lm: Any, outputs: Any, used: Usage) -> None:
        """Keeps an answer that says something, and that is not in DSPy's cache."""
        is_answer = isinstance(outputs, list) and outputs and not any(map(_is_empty, outputs))
        if self.name and is_answer and not (isinstance(lm, dspy.LM) and used.cache_hits):
            answer = Answer(outputs, used) if self.step is None else Answer(outputs, total=self.step.total)
            self.answers.keep_answer(*place, answer)


@contextmanager
def _asking(lm: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[list[Any]]:
    """A list with the outputs that are kept; what is put into an empty one is kept afterwards."""
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
    """Before a class of LMs: answers from what the scope of this context has kept."""

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


def _kept(lm: Any) -> Any:
    keeps = dspy.settings.get(_SCOPE) is not None and isinstance(lm, dspy.BaseLM)
    return _like(lm, _KeptLM, vars(lm)) if keeps else lm


def _like(instance: Any, mixin: type, state: dict[str, Any]) -> Any:
    """An object of that state with the methods of ``mixin``; or itself where that cannot be."""
    cls: Any = type(instance)
    if issubclass(cls, mixin) or any(vars(base).get("__slots__") for base in cls.__mro__):
        return instance
    try:
        twin: Any = object.__new__(_subclass(cls, mixin))
        twin.__dict__ = state
    except (AttributeError, TypeError):  # a class that is made in some way of its own
        return instance
    return twin


@lru_cache(maxsize=64)
def _subclass(cls: type, mixin: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made = type(cls.__name__, (mixin, cls), names)
    for name in vars(made).keys() & {"format", "parse"}:
        delattr(made, name)  # DSPy wraps them for each class of adapters: callbacks would be called twice
    return made
