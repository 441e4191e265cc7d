"""The demo's recorded task: Llama-3.3-70B's right and wrong answers to GSM8K, prompt by prompt."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from types import SimpleNamespace
from typing import Any

import dspy
import numpy as np

from mpromptune.demo.run import Task
from mpromptune.model.space import FloatArray, IndexArray

ScoreArray = np.ndarray[Any, np.dtype[np.uint8]]

RIGHT, WRONG = "right", "wrong"
TABLE = "gsm8k_llama33_70b_s43.npz"

# NOTE: fixed, so that every run of every sampler has the same task.
_POOL_SEED = 43
_POOL_SIZE = 72
_N_TRAIN = 100
# NOTE: 18 trials on minibatches of 35, four full evaluations and the baseline, as in DSPy's "medium"
# zero-shot runs, take 1630 program calls on 200 validation examples.
_NUM_TRIALS = 18
# NOTE: spread of the simulated latency. At 0.5 one call in twenty takes over twice the mean: without slow
# calls, waiting for a whole minibatch would look cheaper than it is.
_LATENCY_SIGMA = 0.5

_PROMPT = re.compile(r"Recorded prompt (\d+)")
_QUESTION = re.compile(r"Recorded question (\d+)")
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]")


@dataclass(frozen=True)
class Recording:
    """A pool of recorded prompts, by their numbers in the table, and their scores.

    Attributes:
        scores: ``prompts x examples``, 1 for a right answer; for all prompts of the table.
        features: ``prompts x d`` embeddings.
        n_demos: Number of demos in each prompt.
        pool: Numbers of the prompts in the task; the first is the student's own.
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
        """Fraction of all recorded examples with a right answer for a prompt."""
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
        ValueError: The text stands for no prompt.
    """
    if found := _PROMPT.search(text):
        return int(found[1])
    raise ValueError(f"This text stands for no recorded prompt: {text!r}.")


def _draw_pool(scores: ScoreArray) -> tuple[int, ...]:
    """Random prompts; the first is the one with the median accuracy."""
    rng = np.random.default_rng(_POOL_SEED)
    pool = rng.choice(len(scores), _POOL_SIZE, replace=False)
    by_mean = pool[np.argsort(scores[pool].mean(axis=1), kind="stable")]
    student = int(by_mean[_POOL_SIZE // 2])
    return (student, *(prompt for prompt in pool.tolist() if prompt != student))


def _features(arrays: dict[str, np.ndarray[Any, Any]], n_demos: IndexArray) -> FloatArray:
    """Instruction embedding, mean demo embedding, and the number of demos, side by side."""
    instructions = arrays["instruction_emb"].astype(np.float64)[arrays["instruction_of"]]
    # The padding index -1 selects the row of zeros at the end.
    demos = np.vstack([arrays["demo_emb"].astype(np.float64), np.zeros(instructions.shape[1])])
    pooled = demos[arrays["demo_sets"][arrays["demo_set_of"]]].sum(axis=1)
    pooled /= np.maximum(n_demos, 1)[:, None]
    size = np.stack([n_demos / n_demos.max(), n_demos > 0], axis=1)
    return np.hstack([instructions, pooled, size])


def latency_of(prompt: int, example: int, mean: float) -> float:
    """Simulated seconds of one call: lognormal, and equal for equal calls."""
    rng = random.Random(f"{prompt}/{example}")
    return rng.lognormvariate(math.log(mean) - _LATENCY_SIGMA**2 / 2, _LATENCY_SIGMA)


def examples(numbers: tuple[int, ...]) -> list[dspy.Example]:
    """DSPy examples that stand for recorded GSM8K examples."""
    return [
        dspy.Example(question=f"Recorded question {n} of GSM8K.", answer=RIGHT).with_inputs("question")
        for n in numbers
    ]


def answered_right(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    """Metric: whether the recorded LM answered the example correctly."""
    return bool(prediction.answer == example.answer)


class ReplayLM(dspy.BaseLM):
    """Gives the recorded answers; as a prompt model it proposes the recorded prompts one after another.

    Args:
        recording: The answers.
        latency: Mean seconds of an answer to a validation question. All other answers take no time, because
            the demo shows the search, and DSPy's bootstrap asks one question at a time.

    Attributes:
        answered: (prompt, example) to the number of its answers.
    """

    def __init__(self, recording: Recording, latency: float = 0.0) -> None:
        super().__init__("replay/llama-3.3-70b", temperature=0.0, max_tokens=1000, cache=False)
        self.answered: Counter[tuple[int, int]] = Counter()
        self._proposals = itertools.count()
        self._lock = threading.Lock()
        self._recording = recording
        self._latency = latency
        self._slow = frozenset(recording.validation)

    def forward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """One completion, in the shape of the OpenAI API."""
        messages = messages or [{"role": "user", "content": prompt}]
        # The output fields that DSPy's ChatAdapter asks for at the end of its last message.
        tail = str(messages[-1]["content"]).rsplit("Respond with the corresponding output fields", 1)[-1]
        fields = [name for name in _FIELD.findall(tail) if name != "completed"]
        replies = [f"[[ ## {name} ## ]]\n{self._reply(name, messages)}" for name in fields]
        message = SimpleNamespace(content="\n\n".join([*replies, "[[ ## completed ## ]]"]), tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
        return SimpleNamespace(choices=[choice], usage={}, model=self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayLM:
        """Share the recording and the counts with copies, which DSPy 3.2 makes for each proposal."""
        twin = copy.copy(self)
        twin.kwargs, twin.history = dict(self.kwargs), []
        return twin

    def _reply(self, name: str, messages: list[dict[str, Any]]) -> str:
        if name == "answer":
            return self._answer(str(messages[0]["content"]), str(messages[-1]["content"]))
        if name == "proposed_instruction":
            texts = self._recording.texts
            return texts[next(self._proposals) % len(texts)]
        return f"(The recording holds no {name.replace('_', ' ')}.)"

    def _answer(self, system: str, user: str) -> str:
        prompt, example = prompt_of(system), int(_QUESTION.findall(user)[0])
        if self._latency > 0 and example in self._slow:
            time.sleep(latency_of(prompt, example, self._latency))
        with self._lock:
            self.answered[prompt, example] += 1
        return RIGHT if self._recording.scores[prompt, example] else WRONG


def replay_task(latency: float, recording: Recording | None = None) -> Task:
    """GSM8K with the recorded answers of Llama-3.3-70B; zero-shot, with a candidate per recorded prompt."""
    recording = recording or Recording.load()
    prompts, total = len(recording.pool), recording.scores.shape[1]

    def truth(best: dspy.Module) -> list[tuple[str, str]]:
        winner = prompt_of(best.predictors()[0].signature.instructions)
        return [
            (f"Baseline, all {total} recorded examples", f"{100 * recording.mean(recording.pool[0]):.2f} %"),
            (f"Winner, all {total} recorded examples", f"{100 * recording.mean(winner):.2f} %"),
            (f"Best of the {prompts} prompts, all {total} examples", f"{100 * recording.best_mean():.2f} %"),
        ]

    split = f"{len(recording.train)} for training, {len(recording.validation)} for validation"
    spread = f"lognormal, mean {latency:g} s per validation call; the rest answers at once"
    return Task(
        title="m-promptune demo: a replayed LM",
        notes=[
            ("Task", f"choose among {prompts} prompts for GSM8K; examples: {split}"),
            ("Recorded", "the answers: right or wrong as Llama-3.3-70B was on each (prompt, example) pair"),
            ("Recorded", "the prompts' embeddings by all-MiniLM-L6-v2"),
            ("Stand-in", "the texts of prompts and examples: the recording holds only numbers"),
            ("Stand-in", "the proposer: it hands out the recorded prompts one after the other"),
            ("Simulated", f"latency: {spread}"),
            ("Real", "DSPy, the program, MIPROv2's three steps, and the search"),
            ("Caution", "one run is one draw of luck: compare samplers over several seeds (--seed)"),
        ],
        program=dspy.Predict(dspy.Signature("question -> answer", recording.texts[0])),
        trainset=examples(recording.train),
        valset=examples(recording.validation),
        metric=answered_right,
        lm=ReplayLM(recording, latency),
        arguments={
            "auto": None,
            "num_candidates": prompts,
            "max_bootstrapped_demos": 0,
            "max_labeled_demos": 0,
        },
        compile_arguments={"num_trials": _NUM_TRIALS},
        proposers=(),
        embedder=recording.embed,
        truth=truth,
    )
