"""Instructions proposed concurrently are those that DSPy proposes one after the other."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import ContextWindowExceededError
from lms import completion, digest, requested_fields
from tasks import FEW_SHOT, LABELLED_ONLY, QEI, SMALL_RUN, VAL, ZERO_SHOT, Adder, Planner, additions, compiled

from mpromptune import MIPROv2
from mpromptune.lms.adapters import watched
from mpromptune.mipro import proposal
from mpromptune.mipro.run import Run, Threads

TRAIN = additions(24)
Call = tuple[str, Any, str]  # messages, rollout, what was asked for


class RolloutLM(dspy.BaseLM):
    """Answers depend on the messages and on the rollout, as a real LM's do; every call is recorded."""

    def __init__(self, delay: Callable[[str], float] = lambda text: 0.0, fail_on: str | None = None) -> None:
        super().__init__("rollouts", "chat", 0.0, 1000, False)
        self.calls: list[Call] = []
        self._delay = delay
        self._fail_on = fail_on
        self._lock = threading.Lock()

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        fields = requested_fields(messages or [])
        rollout = kwargs.get("rollout_id", self.kwargs.get("rollout_id"))
        with self._lock:
            self.calls.append((repr(messages), rollout, fields[-1]))
        time.sleep(self._delay(repr((messages, rollout))))
        if fields[-1] == self._fail_on:
            raise ContextWindowExceededError(model="rollouts", message=f"no {fields[-1]}")
        text = "".join(f"[[ ## {f} ## ]]\n{f} {digest(messages, rollout)}\n\n" for f in fields)
        return completion(text + "[[ ## completed ## ]]", "rollouts")

    def copy(self, **kwargs: Any) -> RolloutLM:
        twin = copy.copy(self)
        twin.history, twin.kwargs = [], {**self.kwargs, **kwargs}
        return twin

    def __deepcopy__(self, memo: dict) -> RolloutLM:
        return self


def _jitter(text: str) -> float:
    return digest(text, "jitter") % 8 / 1000


def _metric(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(digest(example.question, prediction.answer) % 100 < 60)


class _HandedError(Exception):
    """What the search step is handed, instead of a search."""


class _Before:
    """A MIPROv2 that stops before the search and says what it has got."""

    def _optimize_prompt_parameters(self, program: Any, instructions: Any, demos: Any, *args: Any) -> Any:
        raise _HandedError(instructions, demos, self.rng.getstate())  # type: ignore[attr-defined]


class Stock(_Before, dspy.MIPROv2):
    pass


class Ours(_Before, MIPROv2):
    pass


def _handed(
    cls: Any, program: dspy.Module, lm: RolloutLM, init: dict[str, Any], **options: Any
) -> tuple[Any, ...]:
    """Instructions, demo sets, generator state and LM calls of the steps before the search."""
    settings = {"auto": None, "num_candidates": 5, "seed": 3, **init}
    # The first score is a call of the search.
    alone = mock.patch.object(Run, "score_first")
    # Up to 3.3, DSPy by itself asks as JSON again after a failure; a compile of ours never does.
    with alone, dspy.context(adapter=watched(None), lm=lm), pytest.raises(_HandedError) as caught:
        cls(metric=_metric, **settings).compile(program, trainset=TRAIN, valset=VAL, **SMALL_RUN, **options)
    return *caught.value.args, Counter(lm.calls)


@pytest.mark.parametrize(
    ("program_class", "shots", "threads"),
    [(Adder, ZERO_SHOT, 1), (Adder, FEW_SHOT, 32), (Planner, ZERO_SHOT, 32), (Planner, FEW_SHOT, 8)],
)
def test_equals_the_serial_steps(program_class: Any, shots: dict[str, int], threads: int) -> None:
    """Same instructions and demos in the same order, same draws, the same LM calls, at any latency."""
    init = {**shots, "num_threads": threads}
    serial = _handed(Stock, program_class(), RolloutLM(), init)
    ours = _handed(Ours, program_class(), RolloutLM(_jitter), init, sampler="qei")
    assert ours == serial
    assert len(set(serial[0][0])) == 5


@pytest.mark.parametrize(
    "flags",
    [
        {"data_aware_proposer": False},
        {"program_aware_proposer": False, "view_data_batch_size": 3},
        {"tip_aware_proposer": False},
        {"fewshot_aware_proposer": False},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_flags_of_the_proposer(flags: dict[str, Any]) -> None:
    """What DSPy's proposer is told to look at, ours looks at."""
    serial = _handed(Stock, Planner(), RolloutLM(), FEW_SHOT, **flags)
    assert _handed(Ours, Planner(), RolloutLM(_jitter), FEW_SHOT, sampler="qei", **flags) == serial


def test_labelled_only_leaves_the_proposer_in_order() -> None:
    """Where DSPy's bootstrap crashes, instructions are still proposed, and twice the same."""
    first, second = (_handed(Ours, Adder(), RolloutLM(), LABELLED_ONLY, sampler="qei") for _ in range(2))
    assert first == second
    assert len(first[0][0]) == 5


def test_prompt_model_of_its_own() -> None:
    """Proposals and the summary go to the prompt model, wherever the bootstrap's calls go."""
    prompt_models = RolloutLM(), RolloutLM()
    init = [{**FEW_SHOT, "prompt_model": model, "task_model": RolloutLM()} for model in prompt_models]
    serial = _handed(Stock, Planner(), RolloutLM(), init[0])
    ours = _handed(Ours, Planner(), RolloutLM(), init[1], sampler="qei")
    assert ours == serial
    assert Counter(prompt_models[0].calls) == Counter(prompt_models[1].calls)
    assert not ours[3]


def test_failure_that_ends_a_compile() -> None:
    """A proposal that raises ends the compile with its error, as in DSPy."""
    errors = []
    for cls, options in ((Stock, {}), (Ours, {"sampler": "qei"})):
        with pytest.raises(Exception, match="proposed_instruction") as caught:
            _handed(cls, Adder(), RolloutLM(fail_on="proposed_instruction"), FEW_SHOT, **options)
        errors.append(caught.type)
    assert errors[0] is errors[1]


def test_summary_is_written_during_the_bootstrap() -> None:
    """The chain of calls about the data begins before the first demo set is complete."""
    lm = RolloutLM(lambda text: 0.01)
    _handed(Ours, Adder(), lm, {**FEW_SHOT, "num_threads": 8}, sampler="qei")
    asked = [field for *_, field in lm.calls]
    assert asked.index("observations") < len(asked) - 1 - asked[::-1].index("answer")


def test_programs_are_described_during_the_summary() -> None:
    """Only the last call of a proposal waits for the dataset summary."""
    lm = RolloutLM(lambda text: 0.05 if "observations" in text else 0.0)
    _handed(Ours, Adder(), lm, {**FEW_SHOT, "num_threads": 8}, view_data_batch_size=3, sampler="qei")
    asked = [field for *_, field in lm.calls]
    assert asked.count("module_description") == asked.count("proposed_instruction") == 5
    last = [len(asked) - 1 - asked[::-1].index(f) for f in ("module_description", "summary")]
    assert last[0] < last[1] < asked.index("proposed_instruction")


@pytest.mark.parametrize(
    ("field", "tips"),
    [
        ("observations", True),
        ("summary", False),
        ("program_description", True),
        ("module_description", False),
    ],
)
def test_failures_that_dspy_lives_with(field: str, tips: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a summary or a description of the program, proposals are made all the same: the last call has
    the fields that DSPy gives it, whatever failed before it and late.
    """
    flags = {"tip_aware_proposer": tips, "fewshot_aware_proposer": not tips}
    slow = RolloutLM(lambda text: 0.01 if "observations" in text else 0.0, fail_on=field)
    serial = _handed(Stock, Planner(), RolloutLM(fail_on=field), FEW_SHOT, **flags)
    assert _handed(Ours, Planner(), slow, FEW_SHOT, sampler="qei", **flags) == serial


def test_callbacks_of_the_caller_are_kept() -> None:
    """What watches DSPy's modules sees those of the proposals, as it does in DSPy."""

    class Watcher(BaseCallback):
        def __init__(self) -> None:
            self.seen: Counter[str] = Counter()

        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            self.seen[type(instance).__name__] += 1

    watchers = Watcher(), Watcher()
    for watcher, cls, options in zip(watchers, (Stock, Ours), ({}, {"sampler": "qei"}), strict=True):
        with dspy.context(callbacks=[watcher]):
            _handed(cls, Planner(), RolloutLM(), FEW_SHOT, **options)
    assert watchers[1].seen["GenerateModuleInstruction"] == 10
    assert watchers[0].seen == watchers[1].seen


def test_proposals_overlap() -> None:
    """Ten chains of three calls take about as long as one."""
    lm = RolloutLM(lambda text: 0.03)
    proposer_calls = itertools.count()
    with dspy.context(lm=lm), Threads(32) as threads:
        proposer = proposal.ConcurrentProposer(
            threads,
            prompt_model=lm,
            program=Planner(),
            trainset=TRAIN,
            view_data_batch_size=10,
            use_dataset_summary=False,
            rng=random.Random(0),
            use_instruct_history=False,
            set_history_randomly=False,
        )
        start = time.perf_counter()
        proposed = proposer.propose_instructions_for_program(
            TRAIN,
            program=Planner(),
            demo_candidates=None,
            trial_logs={},
            N=5,
            on_instruction=lambda: next(proposer_calls),
        )
    assert time.perf_counter() - start < 0.5 * 30 * 0.03
    assert next(proposer_calls) == 10 == sum(map(len, proposed.values()))


def test_summary_stops_when_the_bootstrap_fails() -> None:
    """A chain of eleven calls that nobody needs any more ends with the one under way."""
    lm = RolloutLM(lambda text: 0.05)

    class Broken(Adder):
        def forward(self, question: str) -> Any:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        _handed(Ours, Broken(), lm, {**FEW_SHOT, "max_errors": 2}, view_data_batch_size=2, sampler="qei")
    assert len(lm.calls) <= 2


def test_a_whole_compile_repeats_itself() -> None:
    """The same seed gives the same program with 2 threads and with 16."""

    def program(threads: int) -> Any:
        options = {**QEI, "trainset": TRAIN, "batch_size": 4, "init": {"num_threads": threads}}
        best = compiled(lm=RolloutLM(_jitter), metric=_metric, **options)
        return best.dump_state()["solve"], best.score

    with contextlib.redirect_stdout(None):
        assert program(2) == program(16)
