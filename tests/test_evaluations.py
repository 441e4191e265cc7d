"""What DSPy's callbacks see of a search: one evaluation for each trial, in order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from lms import arithmetic_lm
from tasks import QEI, VAL, Adder, Counted, compiled

from mpromptune import MIPROv2
from mpromptune.errors import TrialFailedError
from mpromptune.storage.attributes import EXAMPLES, SCORES


class Listener(BaseCallback):
    """Takes down compiles and evaluations as DSPy's callbacks see them."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, Any, dict[str, Any]]] = []
        self.ends: list[tuple[str, Any, Any]] = []
        self.compiles: list[Any] = []
        self.threads: set[int] = set()

    def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.compiles.append(instance)
        self.threads.add(threading.get_ident())

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        assert len(self.starts) == len(self.ends), "the evaluation before has not ended"
        self.starts.append((call_id, instance, inputs))
        self.threads.add(threading.get_ident())

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
        self.ends.append((call_id, outputs, exception))
        self.threads.add(threading.get_ident())

    @property
    def kinds(self) -> list[str]:
        return [inputs["callback_metadata"]["metric_key"] for _, _, inputs in self.starts]


def _compile(listener: BaseCallback | None, **options: Any) -> Any:
    with dspy.context(callbacks=[] if listener is None else [listener]):
        return compiled(**{**QEI, **options})


@pytest.fixture(scope="module")
def listened() -> tuple[Listener, Any]:
    listener = Listener()
    return listener, _compile(listener, confirm=True)


def test_each_trial_is_one_evaluation_in_order(listened: tuple[Listener, Any]) -> None:
    """Starts and ends come in pairs, one for each trial, with its program, from the caller's thread."""
    listener, best = listened
    trials = best.search_result.study.trials
    assert [call_id for call_id, _, _ in listener.starts] == [call_id for call_id, _, _ in listener.ends]
    assert len({call_id for call_id, _, _ in listener.starts}) == len(listener.starts) == len(trials)
    programs = [list(log.values())[len(trials[0].params) + 1] for log in best.trial_logs.values()]
    seen = [inputs["program"] for _, _, inputs in listener.starts]
    assert [p.dump_state() for p in seen] == [p.dump_state() for p in programs]
    assert listener.threads == {threading.get_ident()}


def test_evaluations_are_as_dspys(listened: tuple[Listener, Any]) -> None:
    """Instance, inputs and outputs are what a call of dspy.Evaluate with these scores would show."""
    listener, _ = listened
    for (_, instance, inputs), (_, outputs, exception) in zip(listener.starts, listener.ends, strict=True):
        assert isinstance(instance, dspy.Evaluate)
        assert instance.devset == VAL
        assert exception is None
        assert isinstance(outputs, dspy.evaluate.EvaluationResult)
        assert [example for example, _, _ in outputs.results] == inputs["devset"]
        scores = [score for _, _, score in outputs.results]
        assert outputs.score == round(100 * sum(scores) / len(scores), 2)
        assert instance.metric(*outputs.results[0][:1], dspy.Prediction(answer="?")) is False
        assert inputs.keys() == _inputs_of_dspy().keys()


def _inputs_of_dspy() -> Mapping[str, Any]:
    listener = Listener()
    with dspy.context(lm=arithmetic_lm(), callbacks=[listener]):
        dspy.Evaluate(devset=VAL[:1], metric=Counted(), num_threads=1)(Adder())
    return listener.starts[0][2]


def test_the_trial_that_completes_a_configuration_is_a_full_evaluation(
    listened: tuple[Listener, Any],
) -> None:
    """Blocks are minibatches; what is complete on all 12 examples is shown as trial_logs has it."""
    listener, best = listened
    for kind, log, (_, outputs, _) in zip(
        listener.kinds, best.trial_logs.values(), listener.ends, strict=True
    ):
        if kind == "eval_full":
            assert outputs.score == log["full_eval_score"]
            assert len(outputs.results) == len(VAL)
        else:
            assert outputs.score == log["mb_score"]
            assert len(outputs.results) < len(VAL)
    assert listener.kinds.count("eval_full") == len(best.candidate_programs) >= 2
    assert best.score in [
        o.score for k, (_, o, _) in zip(listener.kinds, listener.ends, strict=True) if "full" in k
    ]


def test_predictions_are_those_that_were_scored(listened: tuple[Listener, Any]) -> None:
    """A trial's own predictions come with its scores."""
    listener, best = listened
    for trial, (_, outputs, _) in zip(best.search_result.study.trials, listener.ends, strict=True):
        own = [VAL[i] for i in trial.user_attrs[EXAMPLES]]
        for example, prediction, score in outputs.results:
            if example in own:
                assert (prediction.answer == example.answer) == bool(score)


def test_dspys_own_plan_is_shown_as_dspy_shows_it() -> None:
    """schedule='mipro': a full evaluation first and after every two minibatches, as stock MIPROv2."""
    listener = Listener()
    _compile(listener, schedule="mipro", sampler="random", embedder=None)
    full, mb = "eval_full", "eval_minibatch"
    assert listener.kinds == [full, mb, mb, full, mb, mb, full]
    assert [len(inputs["devset"]) for _, _, inputs in listener.starts] == [12, 4, 4, 12, 4, 4, 12]


def test_listening_changes_nothing(listened: tuple[Listener, Any]) -> None:
    """Trials and calls are the same with and without callbacks."""
    _, heard = listened
    quiet = _compile(None, confirm=True)
    trials = [
        [(t.params, t.user_attrs[SCORES]) for t in best.search_result.study.trials] for best in (heard, quiet)
    ]
    assert trials[0] == trials[1]
    assert heard.search_result.calls == quiet.search_result.calls


def test_going_on_shows_the_new_trials_only(tmp_path: Any) -> None:
    """Trials that an earlier run has told are not evaluated again; a larger budget adds evaluations."""
    first, again, longer = Listener(), Listener(), Listener()
    run = {"storage": str(tmp_path / "run.log"), "max_calls": 40}
    before = _compile(first, **run)
    _compile(again, **run)
    after = _compile(longer, **{**run, "max_calls": 52})
    assert not again.starts
    assert len(first.starts) + len(longer.starts) == len(after.search_result.study.trials)
    assert longer.kinds.count("eval_full") == len(after.candidate_programs) - len(before.candidate_programs)
    ends = zip(longer.kinds, longer.ends, strict=True)
    assert all(len(outputs.results) == 12 for kind, (_, outputs, _) in ends if kind == "eval_full")


def test_a_trial_without_all_scores_ends_with_an_error() -> None:
    """Errors of the infrastructure are no scores: the evaluation fails, and the search goes on."""
    listener, times = Listener(), Counter[bool]()

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if trace is None:
            times[example is VAL[3]] += 1
            if example is VAL[3] and times[True] == 2:
                raise ConnectionError("reset by peer")
        return bool(example.answer == prediction.answer)

    best = _compile(listener, metric=metric, max_retries=0)
    states = [t.state.name for t in best.search_result.study.trials]
    errors = [exception for _, _, exception in listener.ends]
    assert [type(e) is TrialFailedError for e in errors] == [state == "FAIL" for state in states]
    assert states.count("FAIL") == 1
    assert "lacks the scores of 1 of" in str(next(e for e in errors if e is not None))


@pytest.mark.skipif(not hasattr(BaseCallback, "on_compile_start"), reason="DSPy 3.2 has no such callback")
def test_nested_compiles_stay_in_the_callers_thread(listened: tuple[Listener, Any]) -> None:
    """The optimizer comes first, once; what it compiles inside does so where the caller is."""
    listener, _ = listened
    assert isinstance(listener.compiles[0], MIPROv2)
    assert sum(isinstance(one, MIPROv2) for one in listener.compiles) == 1


def test_without_a_sampler_dspy_evaluates_itself() -> None:
    """The stock search is left alone: its evaluations are DSPy's own."""
    listener = Listener()
    _compile(listener, sampler=None, embedder=None)
    assert {type(instance) for _, instance, _ in listener.starts} == {dspy.Evaluate}
