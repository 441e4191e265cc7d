"""Faults of a provider, sent by a real server to a real LM: none of them is scored as a wrong answer."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from gateway import Answer, Messages, asks_for_sum, body, ended, gateway, refusal, said
from lms import ScriptedLM, arithmetic_lm, digest
from remote_scores import Distant
from tasks import TRAIN, VAL, Adder

from mpromptune import MIPROv2
from mpromptune.engine import options
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.storage.attributes import SCORES

THREADS = 4


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of a hundredth of a second."""

    def hasty(attempts: int, **given: Any) -> RetryPolicy:
        return RetryPolicy(attempts, **{"max_wait": 0.01, **given})

    monkeypatch.setattr(options, "RetryPolicy", hasty)


def _is_right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def _compile(lm: Any, program: Any = None, prompt_model: Any = None, **given: Any) -> Any:
    """A small compile, of which all steps ask the LM."""
    shots = {"max_bootstrapped_demos": 1, "max_labeled_demos": 1, "num_candidates": 3}
    search = {"num_trials": 4, "minibatch_size": 4, "minibatch_full_eval_steps": 2, "max_calls": 30}
    # Python 3.11 may fail to read a program's source while another thread parses anything.
    steady = {"program_aware_proposer": False, "sampler": "random", "block_size": 4, "confirm": True}
    run = {**search, **steady, "verbose": False, **given}
    with dspy.context(lm=lm):
        optimizer = MIPROv2(
            metric=_is_right, prompt_model=prompt_model, auto=None, num_threads=THREADS, **shots
        )
        return optimizer.compile(program or Adder(), trainset=TRAIN, valset=VAL, **run)


def _found(best: Any) -> Any:
    """Baseline, winner, and every score of every trial."""
    result = best.search_result
    trials = [(t.params, t.value, t.user_attrs.get(SCORES)) for t in result.study.trials]
    return result.baseline_score, result.best_score, result.best_params, trials


@pytest.fixture(scope="module")
def sound() -> Any:
    """What a compile finds that nothing goes wrong with."""
    with gateway() as server:
        return _found(_compile(server.lm()))


def one_in_ten(answer: Answer) -> Callable[[Messages, int], Answer | None]:
    """Spoils the first answer to one prompt in ten, in every step, whatever the threads do."""
    return lambda messages, times: answer if times == 1 and digest(messages, "ten") % 10 == 0 else None


BODIES = {
    "page": b"<html><body>One moment, please...</body></html>",
    "nothing": b"",
    "blank lines": b"\n   \n   \n",
    "cut": said("[[ ## answer ## ]]")[:80],
    "a list": b"[]",
    "other JSON": b'{"detail": "starting"}',
    "choices null": body(None),
    "no choices": body([]),
    "content null": said(None),
    "content empty": said(""),
    "content blank": said(" \n "),
}
# What HTTP and common gateways have, but for what is said of the prompt, the account or the pace.
REDIRECTS = (300, 301, 302, 307, 308)
REFUSALS = (404, 405, 406, 408, 409, 410, 411, 415, 418, 421, 423, 424, 425, 426, 428, 431, 451)
GATEWAYS = (460, 499, 500, 502, 503, 504, 529, 599)
STATUSES = {str(status): status for status in (*REDIRECTS, *REFUSALS, *GATEWAYS)}
FAULTS: dict[str, Answer] = {name: (200, data) for name, data in BODIES.items()}
FAULTS |= {name: (status, refusal("no")) for name, status in STATUSES.items()}
FAULTS |= {"404 page": (404, b"no healthy upstream"), "closed": (0, b"")}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_answer_in_ten_is_spoilt(fault: str, sound: Any) -> None:
    """Baseline, winner and all trials are those of a run without faults, whatever the fault."""
    with gateway(one_in_ten(FAULTS[fault])) as server:
        found = _found(_compile(server.lm()))
    assert server.spoilt > 3
    assert found == sound


@pytest.mark.parametrize("fault", ["425", "content null"])
def test_every_first_answer_is_spoilt(fault: str, sound: Any) -> None:
    """So that every request of every step has to be made again; nothing of it is seen in the end."""
    with gateway(lambda messages, times: FAULTS[fault] if times == 1 else None) as server:
        found = _found(_compile(server.lm()))
    assert server.spoilt >= server.requests / 2 - THREADS
    assert found == sound


@pytest.mark.parametrize("fault", ["425", "content null", "404 page"])
def test_workers_of_an_executor(fault: str, sound: Any) -> None:
    """What was raised below the LM is known as that where the search is, too."""
    with gateway(one_in_ten(FAULTS[fault])) as server:
        found = _found(_compile(server.lm(), executor=Distant()))
    assert server.spoilt > 3
    assert found == sound


def test_an_example_that_is_never_answered_is_no_score() -> None:
    """Its trials lack it; none of them has the score of a candidate that failed."""

    def spoil(messages: Messages, times: int) -> Answer | None:
        lost = f"{VAL[3].question}\n" in str(messages[-1]["content"])
        return FAULTS["content empty"] if lost else None

    with gateway(spoil) as server:
        result = _compile(server.lm(), max_retries=1, failure_score=-1.0).search_result
    assert server.spoilt > 3
    scores = [score for trial in result.study.trials for score in trial.user_attrs.get(SCORES, [])]
    assert scores
    assert -1.0 not in scores


def _is_candidates(messages: Messages) -> bool:
    return asks_for_sum(messages) and "manner" in str(messages[0]["content"])


OF_THE_PROMPT = {
    "too large": (413, b"<html>413 Request Entity Too Large</html>"),
    "too long": (400, refusal("maximum context length is 9 tokens", code="context_length_exceeded")),
    "filtered": (400, refusal("triggering content management policy", code="content_filter")),
    "unprocessable": (422, refusal("no")),
    "unparsable": (200, said("four, I think")),
    "empty, filtered": (200, ended("content_filter")),
    "empty, refused": (200, ended("stop", refusal="I cannot help with that.")),
    "empty, no token left": (200, ended("length")),
}


@pytest.mark.parametrize("fault", OF_THE_PROMPT)
def test_what_is_said_of_a_prompt_is_its_candidates(fault: str, sound: Any) -> None:
    """Candidates whose prompts are refused, or not understood, have failure_score, and lose."""
    with gateway(
        lambda messages, times: OF_THE_PROMPT[fault] if _is_candidates(messages) else None
    ) as server:
        result = _compile(server.lm(), failure_score=-1.0).search_result
    others = [m for m in result.configurations if m.params["0_predictor_instruction"] != 0]
    assert others
    assert {score for m in others for score in m.scores.values()} == {-1.0}
    assert result.best_params["0_predictor_instruction"] == 0
    assert result.baseline_score == sound[0]


@pytest.mark.parametrize("fault", OF_THE_PROMPT)
def test_an_example_that_is_refused_whatever_the_prompt_counts_for_nobody(fault: str, sound: Any) -> None:
    """It is left out once several are refused on it: an LM that is right elsewhere is right everywhere."""

    def spoil(messages: Messages, times: int) -> Answer | None:
        refused = asks_for_sum(messages) and f"{VAL[3].question}\n" in str(messages[-1]["content"])
        return OF_THE_PROMPT[fault] if refused else None

    with gateway(spoil) as server:
        result = _compile(server.lm(), failure_score=-1.0, max_calls=60).search_result
    assert server.spoilt >= 3
    assert all(3 not in measured.scores for measured in result.configurations if measured.fully)
    assert {score for measured in result.configurations for score in measured.scores.values()} <= {0.0, 1.0}


def test_a_model_that_does_not_exist_stops_at_once() -> None:
    """With no more than three requests and those that were under way."""
    missing = 404, refusal("The model `adder` does not exist", code="model_not_found")
    raised = pytest.raises(SearchStoppedError, match="does not exist")
    with gateway(lambda messages, times: missing) as server, raised:
        _compile(server.lm())
    assert server.requests <= 3 + THREADS


def test_an_lm_at_which_nothing_listens_stops_at_once() -> None:
    """Whichever step asks; the message has the system's reason, the number of requests, and what to do."""
    lm = dspy.LM("openai/adder", api_base="http://127.0.0.1:9/v1", api_key="k", cache=False, num_retries=0)
    with pytest.raises(SearchStoppedError, match="refused") as caught:
        _compile(lm)
    assert re.search(r"None of the \d requests to openai/adder so far was answered", str(caught.value))
    assert "storage" not in str(caught.value)
    assert caught.value.usage.total.lm_calls <= 3 + THREADS


def test_one_model_at_two_addresses_is_two_lms() -> None:
    """That the task model answers does not make the proposer's address, at which nothing listens, right."""
    raised = pytest.raises(SearchStoppedError, match=r"None of the \d requests to openai/adder so far")
    with gateway() as server, raised:
        nowhere = server.lm()
        nowhere.kwargs["api_base"] = "http://127.0.0.1:9/v1"
        _compile(server.lm(), prompt_model=nowhere)


class VendorError(Exception):
    """As an SDK has it that nobody has thought of."""


class Erratic(ScriptedLM):
    """`arithmetic_lm` that raises an error of its own.

    Args:
        error: What to raise.
        lasting: Whether always, and not for the first request of one prompt in ten.
    """

    def __init__(self, error: Callable[[], BaseException] | None = None, lasting: bool = False) -> None:
        super().__init__(arithmetic_lm()._answer)
        self._error = error
        self._lasting = lasting
        self._asked: Counter[int] = Counter()
        self.failed = 0

    def forward(self, prompt: str | None = None, messages: Any = None, **kwargs: Any) -> Any:
        with self._lock:
            self._asked[digest(messages)] += 1
            unlucky = self._asked[digest(messages)] == 1 and digest(messages, "ten") % 10 == 0
            fails = self._error is not None and (self._lasting or unlucky)
            self.failed += fails
        if fails:
            assert self._error is not None
            raise self._error()
        return super().forward(prompt, messages, **kwargs)


@pytest.fixture(scope="module")
def untroubled() -> Any:
    """What a compile with `Erratic` finds that does not fail."""
    return _found(_compile(Erratic()))


RAISED = [VendorError, ValueError, KeyError, AttributeError, OSError, TypeError, asyncio.CancelledError]


@pytest.mark.parametrize("error", RAISED)
def test_an_lm_of_the_users_own_raises_anything(error: Any, untroubled: Any) -> None:
    """It is the infrastructure's: the request is made again, and nothing of it is seen in the end."""
    lm = Erratic(error)
    assert _found(_compile(lm)) == untroubled
    assert lm.failed > 3


class Wrapping(Adder):
    """Raises an error of its own where the LM has failed."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.chained = chained

    def forward(self, question: str) -> Any:
        try:
            return super().forward(question)
        except VendorError as error:
            if self.chained:
                raise KeyError(question) from error
            raise KeyError(question)  # noqa: B904 - as programs do


@pytest.mark.parametrize("chained", [True, False])
def test_a_program_may_wrap_what_its_lm_raised(chained: bool, untroubled: Any) -> None:
    """With `from` or without, an error of the program that was raised for an LM's is the LM's."""
    lm = Erratic(VendorError)
    assert _found(_compile(lm, Wrapping(chained))) == untroubled
    assert lm.failed > 3


class BestOfOne(Adder):
    """`dspy.BestOfN` prints what a call raises, and returns None where none is left."""

    def forward(self, question: str) -> Any:
        best = dspy.BestOfN(self.solve, N=1, reward_fn=lambda asked, prediction: 1.0, threshold=1.0)
        return best(question=question)


class Hiding(Adder):
    """Raises an error of its own that says nothing of the LM's."""

    def forward(self, question: str) -> Any:
        try:
            return super().forward(question)
        except VendorError:
            raise KeyError(question) from None


class GivingUp(Adder):
    """Raises an error of its own once the LM's is forgotten."""

    def forward(self, question: str) -> Any:
        try:
            return super().forward(question)
        except VendorError:
            pass
        raise KeyError(question)


@pytest.mark.parametrize("program", [BestOfOne, Hiding, GivingUp])
def test_a_program_fails_without_the_answer_that_it_went_on_without(program: Any) -> None:
    """The LM's failure is the cause of what the program, or the metric, raises after it in the same call."""
    untroubled = _found(_compile(Erratic(), program()))
    assert _found(_compile(lm := Erratic(VendorError), program())) == untroubled
    assert lm.failed > 3


class TwoLMs(Adder):
    """Asks another LM where the first is down, and cannot read one answer in three by itself."""

    def forward(self, question: str) -> Any:
        try:
            with dspy.context(lm=Erratic(VendorError, lasting=True)):
                prediction = super().forward(question)
        except VendorError:
            prediction = super().forward(question)
        if digest(question, "unread") % 3 == 0:
            raise KeyError(question)
        return prediction


def test_an_answer_that_was_asked_for_again_is_no_excuse() -> None:
    """What the program raises once another LM has answered is its own, and scored."""
    result = _compile(Erratic(), TwoLMs(), failure_score=-1.0).search_result
    unread = {i for i, x in enumerate(VAL) if digest(x.question, "unread") % 3 == 0}
    scored = {(i, score == -1.0) for m in result.configurations for i, score in m.scores.items()}
    assert unread
    assert scored == {(i, i in unread) for i in range(len(VAL))}


class Careless(Adder):
    """Answers by itself where the LM has failed."""

    def forward(self, question: str) -> Any:
        try:
            return super().forward(question)
        except VendorError:
            return dspy.Prediction(answer="unknown")


def test_a_program_that_goes_on_by_itself_is_scored(untroubled: Any) -> None:
    """What it answers without the LM is its answer; no request is made again for it."""
    found = _found(_compile(lm := Erratic(VendorError), Careless()))
    assert lm.failed > 3
    assert found[0] <= untroubled[0]
    assert found[3] != untroubled[3]


@pytest.mark.parametrize("error", [VendorError, ValueError])
def test_an_lm_that_always_raises_ends_the_compile(error: Any) -> None:
    """From the first request on: no score, and an error that says what it raised."""
    lm = Erratic(lambda: error("the tunnel is closed"), lasting=True)
    with pytest.raises(SearchStoppedError, match="the tunnel is closed"):
        _compile(lm, max_retries=1)
