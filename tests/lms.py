"""Language models for tests: deterministic, countable, and free."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dspy

warnings.filterwarnings("ignore", message=".*BaseLM.forward.*")

Answer = Callable[[str, list[dict[str, Any]]], str]


def requested_fields(messages: list[dict[str, Any]]) -> list[str]:
    """The output fields that DSPy's ChatAdapter asks for in its last message."""
    tail = str(messages[-1]["content"]).rsplit("Respond with the corresponding output fields", 1)[-1]
    return [name for name in re.findall(r"\[\[ ## (\w+) ## \]\]", tail) if name != "completed"]


def digest(*parts: object) -> int:
    """A number that depends on nothing but its arguments."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:12], 16)


class ScriptedLM(dspy.BaseLM):
    """Answers every requested field with ``answer(field, messages)`` and records each call.

    Args:
        answer: The value of one output field.
        latency: Seconds that a call takes, or a function of the messages.
    """

    def __init__(
        self, answer: Answer, latency: float | Callable[[list], float] = 0.0, model: str = "scripted"
    ) -> None:
        super().__init__(model, "chat", 0.0, 1000, False)
        self._answer = answer
        self._latency = latency
        self._lock = threading.Lock()
        self.calls: list[list[dict[str, Any]]] = []

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        messages = messages or [{"role": "user", "content": prompt}]
        with self._lock:
            self.calls.append(messages)
        delay = self._latency(messages) if callable(self._latency) else self._latency
        if delay:
            time.sleep(delay)
        fields = requested_fields(messages)
        text = "\n\n".join(f"[[ ## {f} ## ]]\n{self._answer(f, messages)}" for f in fields)
        return completion(text + "\n\n[[ ## completed ## ]]", self.model)

    def copy(self, **kwargs: Any) -> ScriptedLM:
        return self  # one list of calls, whatever the rollout

    def __deepcopy__(self, memo: dict) -> ScriptedLM:
        return self


def completion(text: str, model: str) -> Any:
    """A response in the shape of the OpenAI API."""
    message = SimpleNamespace(content=text, tool_calls=None)
    choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return SimpleNamespace(choices=[choice], usage=usage, model=model)


def arithmetic_lm(**kwargs: Any) -> ScriptedLM:
    """Adds two numbers, right with a probability that depends on the instruction.

    Proposes instructions of the form ``Add carefully, style 7.``; the style decides the skill.
    """

    def answer(field: str, messages: list[dict[str, Any]]) -> str:
        text = "".join(str(m["content"]) for m in messages)
        if field in ("proposed_instruction", "new_instruction"):
            return f"Add carefully, style {digest(text) % 50}."
        if field != "answer":
            return f"some {field}"
        question = re.findall(r"(\d+)\+(\d+)", str(messages[-1]["content"]))[-1]
        style = re.search(r"style (\d+)", str(messages[0]["content"]))
        skill = 0.3 if style is None else 0.4 + 0.012 * int(style.group(1))
        luck = random.Random(digest(question, style and style.group(1))).random()
        return str(int(question[0]) + int(question[1]) + (luck > skill))

    return ScriptedLM(answer, **kwargs)


def always_right() -> ScriptedLM:
    """Adds two numbers, whatever the instruction."""

    def answer(field: str, messages: list[dict[str, Any]]) -> str:
        if field != "answer":
            return f"some {field}"
        a, b = re.findall(r"(\d+)\+(\d+)", str(messages[-1]["content"]))[-1]
        return str(int(a) + int(b))

    return ScriptedLM(answer)
