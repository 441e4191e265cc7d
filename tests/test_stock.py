"""Without a sampler, MIPROv2 is DSPy's, call for call."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from lms import arithmetic_lm
from tasks import FEW_SHOT, TRAIN, VAL, ZERO_SHOT, Adder, Counted, Planner

from mpromptune import MIPROv2
from mpromptune.engine.minibatches import stock_calls


def _compiled(optimizer_class: Any, program: dspy.Module, shots: dict, run: dict, **extra: Any) -> Any:
    """What a compile did: the messages sent, and the program that came back."""
    lm = arithmetic_lm()
    with dspy.context(lm=lm):
        optimizer = optimizer_class(
            metric=Counted(), auto=None, num_candidates=3, num_threads=1, **shots, **extra
        )
        best = optimizer.compile(program, trainset=TRAIN, valset=VAL, num_trials=3, **run)
    return lm.calls, best


@pytest.mark.parametrize("minibatch", [True, False])
@pytest.mark.parametrize("shots", [ZERO_SHOT, FEW_SHOT])
@pytest.mark.parametrize("program_class", [Adder, Planner])
def test_same_calls_and_same_program(program_class: Any, shots: dict, minibatch: bool) -> None:
    """Every LM call, in order, and the program, its score and its logs are those of dspy.MIPROv2."""
    run = {"minibatch": minibatch, "minibatch_size": 4, "minibatch_full_eval_steps": 2}
    theirs, expected = _compiled(dspy.MIPROv2, program_class(), shots, run)
    ours, best = _compiled(MIPROv2, program_class(), shots, run)
    assert ours == theirs
    assert best.dump_state() == expected.dump_state()
    assert best.score == expected.score
    assert {k: set(v) for k, v in best.trial_logs.items()} == {
        k: set(v) for k, v in expected.trial_logs.items()
    }
    assert not hasattr(best, "search_result")


def test_n_jobs_alone_asks_for_no_sampler() -> None:
    """n_jobs without a sampler leaves DSPy's own search in place."""
    run = {"minibatch_size": 4}
    theirs, expected = _compiled(dspy.MIPROv2, Adder(), ZERO_SHOT, run)
    ours, best = _compiled(MIPROv2, Adder(), ZERO_SHOT, run, n_jobs=4)
    assert ours == theirs
    assert best.dump_state() == expected.dump_state()


def test_seed_zero_stays_as_dspy_has_it() -> None:
    """Without a sampler, seed=0 means what it means in DSPy, where it is taken for no seed."""
    theirs, _ = _compiled(dspy.MIPROv2, Adder(), FEW_SHOT, {"minibatch_size": 4, "seed": 0})
    ours, _ = _compiled(MIPROv2, Adder(), FEW_SHOT, {"minibatch_size": 4, "seed": 0})
    assert ours == theirs


@pytest.mark.parametrize(
    ("num_trials", "minibatch", "size", "steps"),
    [(1, True, 3, 5), (4, True, 3, 2), (5, True, 3, 5), (6, True, 3, 4), (3, True, 12, 2), (3, False, 3, 2)],
)
def test_stock_calls_is_what_dspy_spends(num_trials: int, minibatch: bool, size: int, steps: int) -> None:
    """The default budget equals the program calls that dspy.MIPROv2 makes, counted by the metric."""
    metric = Counted()
    with dspy.context(lm=arithmetic_lm()):
        dspy.MIPROv2(metric=metric, auto=None, num_candidates=5, num_threads=1, **FEW_SHOT).compile(
            Adder(),
            trainset=TRAIN,
            valset=VAL,
            num_trials=num_trials,
            minibatch=minibatch,
            minibatch_size=size,
            minibatch_full_eval_steps=steps,
        )
    assert metric.calls == stock_calls(num_trials, len(VAL), minibatch, size, steps)


@pytest.mark.parametrize("auto", ["light", "medium"])
def test_same_auto_settings(auto: str) -> None:
    """With ``auto``, trials, candidates and validation set are those that DSPy derives."""
    with dspy.context(lm=arithmetic_lm()):
        pair = [cls(metric=Counted(), auto=auto) for cls in (dspy.MIPROv2, MIPROv2)]
    settings = []
    for optimizer in pair:
        optimizer._set_random_seeds(9)
        settings.append(optimizer._set_hyperparams_from_run_mode(Adder(), None, True, False, VAL, None, None))
    assert settings[0] == settings[1]
