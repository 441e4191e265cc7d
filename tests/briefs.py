"""Settings and briefs of proposers, and a language model that writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from lms import completion, requested_fields
from tasks import Adder

from mpromptune.engine.proposers import Brief
from mpromptune.operators.base import Setting
from mpromptune.operators.registry import made
from mpromptune.operators.texts import candidate_text
from mpromptune.storage.findings import Measured

INSTRUCTION, DEMOS = "0_predictor_instruction", "0_predictor_demos"
TEXTS = ["Add the numbers.", "Guess something quickly.", "Work through every column of digits and carry."]
LONG = " ".join(f"Rule {i}: mind the {i}th place." for i in range(40))
REWRITERS = ["reflect", "contrast", "merge", "shorten"]


class WriterLM(dspy.BaseLM):
    """Writes one text into every requested field, and records requests with their settings."""

    def __init__(self, text: str | Callable[[], str] = "Add, and carry the one.") -> None:
        super().__init__("writer", "chat", 0.0, 1000, False)
        self.text = text
        self.requests: list[tuple[str, Any, Any]] = []
        self._lock = threading.Lock()

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        messages = messages or [{"role": "user", "content": prompt}]
        settings = {**self.kwargs, **kwargs}
        with self._lock:
            self.requests.append((repr(messages), settings.get("rollout_id"), settings.get("temperature")))
        text = self.text() if callable(self.text) else self.text
        if "JSON object" in str(messages[-1]["content"]):
            return completion(json.dumps({"new_instruction": text}), self.model)
        if not (fields := requested_fields(messages)):
            return completion(f"```\n{text}\n```", self.model)
        return completion("".join(f"[[ ## {field} ## ]]\n{text}\n\n" for field in fields), self.model)

    def copy(self, **kwargs: Any) -> WriterLM:
        twin = WriterLM(self.text)
        twin.requests, twin._lock = self.requests, self._lock
        twin.kwargs = {**self.kwargs, **kwargs}
        return twin

    def __deepcopy__(self, memo: dict) -> WriterLM:
        return self


def example(i: int, answer: str | None = None) -> dspy.Example:
    """A long question that names its number."""
    question = f"Number {i} of the sums is the one where someone adds {100 + i} and {200 + i} apples."
    return dspy.Example(question=question, answer=answer or f"{300 + 2 * i} apples").with_inputs("question")


VAL, TRAIN = [example(i) for i in range(10)], [example(i) for i in range(20, 40)]


def note(i: int, answer: str, feedback: str | None = None) -> dict[str, Any]:
    inputs, outputs = {"question": VAL[i].question}, {"answer": answer}
    own = {"inputs": inputs, "outputs": outputs}
    return {**own, "expected": {"answer": VAL[i].answer}, "feedback": feedback, "predictors": {"solve": own}}


def setting(lm: Any = None, program: Any = None, **changes: Any) -> Setting:
    given: dict[str, Any] = {
        "program": program or Adder(),
        "candidates": {INSTRUCTION: [*TEXTS, LONG]},
        "trainset": TRAIN,
        "valset": VAL,
        "visible": frozenset(range(6)),
        "prompt_model": lm or WriterLM(),
    }
    return Setting(**{**given, **changes})


def brief(
    of: Setting,
    component: str = INSTRUCTION,
    parent: Mapping[str, int] | None = None,
    measured: Sequence[tuple[Mapping[str, int], float, Mapping[int, float]]] | None = None,
    notes: Mapping[tuple[int, int], Any] | None = None,
    **changes: Any,
) -> Brief:
    """Candidate 2 is the best and does examples 0 to 3; the parent 0 does 2 and 3; nobody does 4 and 5."""
    rows = measured or [
        ({INSTRUCTION: 2}, 0.7, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0}),
        ({INSTRUCTION: 0}, 0.5, {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0}),
        ({INSTRUCTION: 1}, 0.2, {0: 0.0}),
    ]
    standings = tuple(Measured(dict(p), dict(s), mean, 0.05, False) for p, mean, s in rows)
    default = {(j, i): note(i, f"answer {j}.{i}", f"feedback {j}.{i}") for j in range(2) for i in range(6)}
    said = {
        "number": 7,
        "component": component,
        "index": len(of.candidates[component]),
        "parent": parent or {INSTRUCTION: 0},
        "standings": standings,
        "notes": default if notes is None else notes,
        "candidates": {
            name: [None if one is None else candidate_text(one) for one in some]
            for name, some in of.candidates.items()
        },
        "seed": 3,
    }
    return Brief(**{**said, **changes})


def propose(name: str, of: Setting, asked: Brief) -> Any:
    (proposer,) = made([name], of)
    return proposer.propose(asked)


def parent_of(name: str) -> dict[str, int]:
    """A parent that the operator can do something with."""
    return {INSTRUCTION: 3 if name == "shorten" else 0}
