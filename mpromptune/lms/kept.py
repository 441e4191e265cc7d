"""Answers of language models that are kept as they come in, and given again to the same request."""

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

from mpromptune.execution.pool import Score
from mpromptune.execution.usage import Meter, Usage, current_meter
from mpromptune.lms.guard import METER, measured

# `keeping`, in the scope of the attempt, proposal or example of the name that it is called with.
Keeping = Callable[..., AbstractContextManager[None]]

# The scope as a setting of DSPy's: its own thread pools inherit these, but not context variables.
_SCOPE = "mpromptune_scope"
# Settings of a model that change its answers; the others may be secrets.
_SETTINGS = ("temperature", "max_tokens", "n", "top_p", "rollout_id")


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
    """Requests that DSPy's adapters make in here are answered from what is kept, and else kept.

    Args:
        answers: Keeps them; None keeps nothing.
        scope: Names one program call or one proposal, which makes the same requests whenever it is made.
            With "" there are only the answers of an earlier run to requests that LMs cache, and none is kept.
        step: Counts the usage of the step that it is part of, if that outlives an interrupted run.
    """
    if answers is None:
        yield
        return
    adapter = _like(dspy.settings.adapter or dspy.ChatAdapter(), _KeepingAdapter)
    with dspy.context(adapter=adapter, **{_SCOPE: _Scope(answers, scope, step)}):
        yield


def reusing(answers: Answers | None, score: Score) -> Score:
    """``score``, whose requests find the answers of an earlier run where the LM has a cache."""

    def scored(params: dict[str, int], example: int) -> float:
        with keeping(answers, ""):
            return score(params, example)

    return scored


@dataclass
class _Scope:
    answers: Answers
    name: str
    step: Meter | None

    def __post_init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def number(self, digest: str) -> int:
        """How many requests like this it has made before."""
        with self._lock:
            self._asked[digest] += 1
            return self._asked[digest] - 1


class _KeepingAdapter:
    """An adapter that asks no language model what is known."""

    def __call__(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(_kept(lm), *args, **kwargs)  # type: ignore[misc]

    async def acall(self, lm: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().acall(_kept(lm), *args, **kwargs)  # type: ignore[misc]


class _KeepingLM:
    """A language model that answers from what is kept."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = _Request(self, args, kwargs)
        if (found := request.answered()) is not None:
            return found
        with measured(request.meter):
            return request.keep(super().__call__(*args, **kwargs))  # type: ignore[misc]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        request = _Request(self, args, kwargs)
        if (found := request.answered()) is not None:
            return found
        with measured(request.meter):
            return request.keep(await super().acall(*args, **kwargs))  # type: ignore[misc]


class _Request:
    """A request in the scope of this context."""

    def __init__(self, lm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._scope: _Scope | None = dspy.settings.get(_SCOPE)
        self._lm = lm
        self._outer: Meter | None = dspy.settings.get(METER) or current_meter()
        self.meter = Meter(self._outer)
        if self._scope is not None:
            settings = {**getattr(lm, "kwargs", {}), **kwargs}
            self._cached = bool(settings.get("cache", getattr(lm, "cache", False)))
            decisive = {name: settings.get(name) for name in _SETTINGS}
            digest = _digest([getattr(lm, "model", None), args, kwargs.get("messages"), decisive])
            self._place = self._scope.name, digest, self._scope.number(digest)

    def answered(self) -> Any:
        if self._scope is None:
            return None
        known = self._scope.answers.answer(*self._place, self._cached)
        if known is None:
            return None
        if self._outer is not None:
            self._outer.add(known.usage)
        return known.outputs

    def keep(self, outputs: Any) -> Any:
        used = self.meter.total
        is_cached = isinstance(self._lm, dspy.LM) and bool(used.cache_hits)
        if self._scope is not None and self._scope.name and not is_cached and _says_something(outputs):
            step = self._scope.step
            answer = Answer(outputs, usage=used) if step is None else Answer(outputs, total=step.total)
            self._scope.answers.keep_answer(*self._place, answer)
        return outputs


def _kept(lm: Any) -> Any:
    return _like(lm, _KeepingLM) if isinstance(lm, dspy.BaseLM) else lm


def _like(instance: Any, mixin: type) -> Any:
    """The same object, state included, with the methods of ``mixin``; or itself where that cannot be."""
    cls: Any = type(instance)
    if issubclass(cls, mixin) or any(vars(base).get("__slots__") for base in cls.__mro__):
        return instance
    try:
        twin: Any = object.__new__(_subclass(cls, mixin))
        twin.__dict__ = instance.__dict__
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


def _says_something(outputs: Any) -> bool:
    """Whether every completion has text or a tool call; an empty one may be a fault of the provider."""
    if not isinstance(outputs, list) or not outputs:
        return False
    texts = (o if isinstance(o, str) else (o.get("text") or o.get("tool_calls")) for o in outputs if o)
    return len(outputs) == sum(bool(text) for text in texts)


def _digest(request: Any) -> str:
    text = json.dumps(request, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
