"""A simulated LM whose answers and latencies follow from the request alone."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from dataclasses import dataclass
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import dspy
import numpy as np

# Spread of the latency: at 0.5 one call in twenty takes over twice the mean.
SIGMA = 0.5


def uniform(*parts: object) -> float:
    """A number between 0 and 1 that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return (int(digest, 16) + 0.5) / 16**12


def latency(mean: float, *parts: object) -> float:
    """A lognormal number of the given mean, the same for the same parts."""
    z = NormalDist().inv_cdf(uniform(*parts))
    return float(mean * np.exp(SIGMA * z - SIGMA**2 / 2))


@dataclass(frozen=True)
class Used:
    """What an LM was used for up to now."""

    calls: int
    seconds: float


class SimulatedLM(dspy.BaseLM):  # type: ignore[misc]
    """Answers every field that is asked for, after a lognormal time.

    An ``answer`` is the sum asked for or not, by the skill of the prompt (instruction and demos) and
    the difficulty of the question; anything else is a short text.

    Args:
        mean: Mean latency in seconds.
    """

    def __init__(self, mean: float) -> None:
        super().__init__("simulated", "chat", 0.0, 1000, False)
        self.mean = mean
        self._meter = [0, 0.0]
        self._lock = threading.Lock()

    def used(self) -> Used:
        """Calls and their summed latency up to now."""
        with self._lock:
            return Used(int(self._meter[0]), self._meter[1])

    def forward(self, prompt: str | None = None, messages: list[Any] | None = None, **kwargs: Any) -> Any:
        """One completion, as DSPy asks for it."""
        contents = [str(m["content"]) for m in messages or []]
        rollout = kwargs.get("rollout_id", self.kwargs.get("rollout_id"))
        seconds = latency(self.mean, contents, rollout)
        time.sleep(seconds)
        with self._lock:  # shared by all copies
            self._meter[0] += 1
            self._meter[1] += seconds
        tail = contents[-1].rsplit("Respond with the corresponding output fields", 1)[-1]
        fields = [f for f in re.findall(r"\[\[ ## (\w+) ## \]\]", tail) if f != "completed"]
        answers = (f"[[ ## {f} ## ]]\n{_answer(f, contents, rollout)}" for f in fields)
        return completion("\n\n".join((*answers, "[[ ## completed ## ]]")), seconds)

    def copy(self, **kwargs: Any) -> SimulatedLM:
        """Another rollout or temperature; the same meter."""
        twin = SimulatedLM(self.mean)
        twin.__dict__.update(self.__dict__)
        twin.history, twin.kwargs = [], {**self.kwargs, **kwargs}
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedLM:
        return self

    def __reduce__(self) -> Any:  # in another process it counts by itself
        return SimulatedLM, (self.mean,)


def _answer(field: str, contents: list[str], rollout: Any) -> str:
    if field != "answer":
        return f"A {field} of style {round(100 * uniform(contents, rollout))}."
    a, b = map(int, re.findall(r"(\d+)\+(\d+)", contents[-1])[-1])
    prompt = contents[:-1]
    chance = 0.4 + 0.3 * uniform(prompt) + 0.6 * (uniform(a, b) - 0.5)
    return str(a + b + (uniform(prompt, a, b) > chance))


def completion(text: str, seconds: float) -> Any:
    """A response in the shape of the OpenAI API; its tokens are the microseconds that it took."""
    message = SimpleNamespace(content=text, tool_calls=None)
    choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
    tokens = round(1e6 * seconds)
    usage = {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}
    return SimpleNamespace(choices=[choice], usage=usage, model="simulated")
