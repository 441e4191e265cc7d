"""A recorded LM: Llama-3.3-70B's right and wrong answers to GSM8K, prompt by prompt."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import dspy
import numpy as np

from mpromptune.model.embedding import FloatArray
from mpromptune.model.space import IndexArray

ScoreArray = np.ndarray[Any, np.dtype[np.uint8]]

RIGHT, WRONG = "right", "wrong"
TABLE = "gsm8k_llama33_70b_s43.npz"

# NOTE: fixed, so that every run of every sampler faces the same task.
_POOL_SEED = 43
_POOL_SIZE = 72
_N_TRAIN = 100
# NOTE: spread of the simulated latency. At 0.5 one call in twenty takes over twice the mean: without
# stragglers, waiting for a whole minibatch would look cheaper than it is.
_LATENCY_SIGMA = 0.5

_PROMPT = re.compile(r"Recorded prompt (\d+)")
_QUESTION = re.compile(r"Recorded question (\d+)")
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]")


@dataclass(frozen=True)
class Recording:
    """A pool of recorded prompts, by their numbers in the table, and what each got right.

    Attributes:
        scores: ``prompts x examples``, 1 where the LM answered right; all prompts of the table.
        features: ``prompts x d`` embeddings.
        n_demos: Demos in each prompt.
        pool: Numbers of the prompts that take part; the first is the student's own.
        train: Numbers of the training examples.
        validation: Numbers of the validation examples.
    """

    scores: ScoreArray = field(repr=False)
    features: FloatArray = field(repr=False)
    n_demos: IndexArray = field(repr=False)
    pool: tuple[int, ...]
    train: tuple[int, ...]
    validation: tuple[int, ...]

    @classmethod
    def load(cls) -> Recording:
        """The recording that comes with the package."""
        path = resources.files("mpromptune.demo") / "data" / TABLE
        with path.open("rb") as file, np.load(file) as table:
            arrays = dict(table)
        scores = np.unpackbits(arrays["scores"], axis=1)[:, : int(arrays["n_examples"])]
        order = np.random.default_rng(_POOL_SEED).permutation(scores.shape[1]).tolist()
        n_demos = (arrays["demo_sets"] >= 0).sum(axis=1)[arrays["demo_set_of"]]
        return cls(
            scores=scores,
            features=_features(arrays, n_demos),
            n_demos=n_demos,
            pool=_draw_pool(scores),
            train=tuple(order[:_N_TRAIN]),
            validation=tuple(order[_N_TRAIN:]),
        )

    def text(self, prompt: int) -> str:
        """The stand-in for a recorded prompt, as an instruction."""
        return (
            f"Recorded prompt {prompt} (with {self.n_demos[prompt]} demos of its own). "
            "Solve the word problem."
        )

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The instructions of the pool, the student's own first."""
        return tuple(self.text(prompt) for prompt in self.pool)

    def mean(self, prompt: int) -> float:
        """Share of all recorded examples that a prompt got right."""
        return float(self.scores[prompt].mean())

    def best_mean(self) -> float:
        """The highest `mean` of the pool."""
        return max(self.mean(prompt) for prompt in self.pool)

    def embed(self, texts: list[str]) -> FloatArray:
        """The recorded embeddings of stand-in texts, ``len(texts) x d``."""
        return self.features[[prompt_of(text) for text in texts]]


def prompt_of(text: str) -> int:
    """The number of the recorded prompt that a text stands for.

    Raises:
        ValueError: It stands for none.
    """
    return _number(_PROMPT, text)


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    if found is None:
        raise ValueError(f"No {pattern.pattern!r} in {text!r}.")
    return int(found.group(1))


def _draw_pool(scores: ScoreArray) -> tuple[int, ...]:
    """Prompts drawn at random, the one of median mean accuracy first."""
    rng = np.random.default_rng(_POOL_SEED)
    pool = rng.choice(len(scores), _POOL_SIZE, replace=False)
    by_mean = pool[np.argsort(scores[pool].mean(axis=1), kind="stable")]
    student = int(by_mean[_POOL_SIZE // 2])
    return (student, *(prompt for prompt in pool.tolist() if prompt != student))


def _features(arrays: dict[str, np.ndarray[Any, Any]], n_demos: IndexArray) -> FloatArray:
    """Instruction embedding, mean demo embedding, and the number of demos, side by side."""
    instructions = arrays["instruction_emb"].astype(np.float64)[arrays["instruction_of"]]
    # A row of zeros at the end is what the padding index -1 picks.
    demos = np.vstack([arrays["demo_emb"].astype(np.float64), np.zeros(instructions.shape[1])])
    pooled = demos[arrays["demo_sets"][arrays["demo_set_of"]]].sum(axis=1)
    pooled /= np.maximum(n_demos, 1)[:, None]
    size = np.stack([n_demos / n_demos.max(), n_demos > 0], axis=1)
    return np.hstack([instructions, pooled, size])


def latency_of(prompt: int, example: int, mean: float) -> float:
    """Simulated seconds of one call: lognormal, and the same whenever and wherever it is made."""
    digest = hashlib.sha256(f"{prompt}/{example}".encode()).digest()
    uniform = (int.from_bytes(digest[:6], "big") + 0.5) / 2**48
    normal = NormalDist().inv_cdf(uniform)
    return float(mean * np.exp(_LATENCY_SIGMA * normal - _LATENCY_SIGMA**2 / 2))


def examples(numbers: tuple[int, ...]) -> list[dspy.Example]:
    """DSPy examples that stand for recorded GSM8K examples."""
    return [
        dspy.Example(question=f"Recorded question {n} of GSM8K.", answer=RIGHT).with_inputs("question")
        for n in numbers
    ]


def answered_right(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    """Metric: whether the recorded LM got the example right."""
    return bool(prediction.answer == example.answer)


@dataclass
class Ledger:
    """What an LM and all its copies were asked, counted under one lock.

    Attributes:
        calls: Calls of any kind.
        answered: (prompt, example) to the number of times it was answered.
        proposed: Instructions proposed.
    """

    calls: int = 0
    answered: Counter[tuple[int, int]] = field(default_factory=Counter)
    proposed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count_call(self) -> None:
        """One more call of any kind."""
        with self.lock:
            self.calls += 1

    def count_answer(self, prompt: int, example: int) -> None:
        """One more answer to an example under a prompt."""
        with self.lock:
            self.answered[prompt, example] += 1

    def next_proposal(self) -> int:
        """How many instructions were proposed before this one."""
        with self.lock:
            self.proposed += 1
            return self.proposed - 1


class ReplayLM(dspy.BaseLM):
    """Answers as recorded, and as a prompt model proposes the recorded prompts one after another.

    Args:
        recording: The answers.
        latency: Mean seconds that a validation question takes. Everything else is answered at
            once: the demo is about the search, and DSPy's bootstrap asks one question at a time.
    """

    def __init__(self, recording: Recording, latency: float = 0.0) -> None:
        super().__init__("replay/llama-3.3-70b", temperature=0.0, max_tokens=1000, cache=False)
        self.ledger = Ledger()
        self._recording = recording
        self._latency = latency
        self._slow = frozenset(recording.validation)

    def forward(
        self,
        prompt: str | None = None,
        messages: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One completion, in the shape of the OpenAI API."""
        messages = messages or [{"role": "user", "content": prompt}]
        self.ledger.count_call()
        replies = [f"[[ ## {name} ## ]]\n{self._reply(name, messages)}" for name in _requested(messages)]
        return _completion("\n\n".join([*replies, "[[ ## completed ## ]]"]), self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayLM:
        """DSPy 3.2 copies an LM so for each proposal; copies share recording and ledger."""
        twin = copy.copy(self)
        twin.kwargs, twin.history = dict(self.kwargs), []
        return twin

    def _reply(self, name: str, messages: list[dict[str, Any]]) -> str:
        if name == "answer":
            return self._answer(str(messages[0]["content"]), str(messages[-1]["content"]))
        if name == "proposed_instruction":
            texts = self._recording.texts
            return texts[self.ledger.next_proposal() % len(texts)]
        return f"(The recording holds no {name.replace('_', ' ')}.)"

    def _answer(self, system: str, user: str) -> str:
        prompt, example = prompt_of(system), _number(_QUESTION, user)
        if self._latency > 0 and example in self._slow:
            time.sleep(latency_of(prompt, example, self._latency))
        self.ledger.count_answer(prompt, example)
        return RIGHT if self._recording.scores[prompt, example] else WRONG


def _requested(messages: list[dict[str, Any]]) -> list[str]:
    """The output fields that DSPy's ChatAdapter asks for at the end of its last message."""
    tail = str(messages[-1]["content"]).rsplit("Respond with the corresponding output fields", 1)[-1]
    return [name for name in _FIELD.findall(tail) if name != "completed"]


def _completion(text: str, model: str) -> Any:
    message = SimpleNamespace(content=text, tool_calls=None)
    choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
    return SimpleNamespace(choices=[choice], usage={}, model=model)
