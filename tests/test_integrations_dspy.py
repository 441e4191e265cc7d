"""What DSPy does with a compiled program, and with the optimizer inside others of its own."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFewShotWithRandomSearch, Teleprompter
from lms import ScriptedLM, arithmetic_lm
from tasks import FEW_SHOT, QEI, SMALL_RUN, TRAIN, VAL, Adder, Counted

from mpromptune import MIPROv2


def _optimizer(**options: Any) -> MIPROv2:
    settings = {"auto": None, "num_candidates": 4, "num_threads": 4, **FEW_SHOT}
    return MIPROv2(metric=Counted(), **{**settings, **QEI, "confirm": True, **options})


def _score(program: dspy.Module) -> float:
    """DSPy's own opinion."""
    with dspy.context(lm=arithmetic_lm()):
        return float(dspy.Evaluate(devset=VAL, metric=Counted(), num_threads=4)(program).score)


@pytest.fixture(scope="module")
def best() -> Any:
    with dspy.context(lm=arithmetic_lm()):
        return _optimizer().compile(Adder(), trainset=TRAIN, valset=VAL, **SMALL_RUN)


def test_scores_are_those_of_dspys_evaluation(best: Any) -> None:
    """dspy.Evaluate comes to the same score for the result, and for every program that was fully measured."""
    assert _score(best) == best.score
    assert [_score(one["program"]) for one in best.candidate_programs] == [
        one["score"] for one in best.candidate_programs
    ]


def test_an_ensemble_of_candidate_programs(best: Any) -> None:
    """dspy.Ensemble over the candidates answers with the majority of their answers."""
    programs = [one["program"] for one in best.candidate_programs]
    ensemble = dspy.Ensemble(reduce_fn=dspy.majority).compile(programs)
    with dspy.context(lm=arithmetic_lm()):
        for example in VAL:
            answers = [program(**example.inputs()).answer for program in programs]
            assert answers.count(ensemble(**example.inputs()).answer) == max(map(answers.count, answers))


class Finetuned(Teleprompter):
    """Stands for an optimizer of weights: its program asks another LM."""

    def __init__(self, lm: ScriptedLM) -> None:
        super().__init__()
        self._lm = lm

    def compile(self, student: Any, *, trainset: Any, **kwargs: Any) -> Any:
        tuned = student.deepcopy()
        tuned.set_lm(self._lm)
        return tuned


def _launchable(lm: ScriptedLM) -> ScriptedLM:
    lm.launch = lm.kill = lambda: None
    return lm


def test_better_together_alternates_prompts_and_weights() -> None:
    """'p -> w -> p': the second search measures prompts with the LM that the weights' step has left."""
    lm, tuned = _launchable(arithmetic_lm()), _launchable(arithmetic_lm(model="tuned"))
    program = Adder()
    program.set_lm(lm)
    with dspy.context(lm=lm):
        together = dspy.BetterTogether(metric=Counted(), p=_optimizer(), w=Finetuned(tuned))
        best = together.compile(
            program,
            trainset=TRAIN,
            valset=VAL,
            strategy="p -> w -> p",
            optimizer_compile_args={"p": SMALL_RUN},
        )
    assert not best.flag_compilation_error_occurred
    scores = {one["strategy"]: one["score"] for one in best.candidate_programs}
    assert scores.keys() == {"", "p", "p -> w", "p -> w -> p"}
    assert scores["p"] >= scores[""]
    assert scores["p -> w -> p"] >= scores["p -> w"]
    last = next(one["program"] for one in best.candidate_programs if one["strategy"] == "p -> w -> p")
    assert {predictor.lm.model for predictor in last.predictors()} == {"tuned"}
    assert len(tuned.calls) > len(VAL)


def test_better_together_with_another_prompt_optimizer() -> None:
    """In turn with DSPy's random search, each goes on with what the other has found."""
    lm = _launchable(arithmetic_lm())
    program = Adder()
    program.set_lm(lm)
    shots = {"max_bootstrapped_demos": 1, "max_labeled_demos": 2}
    with dspy.context(lm=lm):
        random_search = BootstrapFewShotWithRandomSearch(
            metric=Counted(), num_candidate_programs=1, num_threads=2, **shots
        )
        best = dspy.BetterTogether(metric=Counted(), ours=_optimizer(), theirs=random_search).compile(
            program,
            trainset=TRAIN,
            valset=VAL,
            strategy="theirs -> ours",
            optimizer_compile_args={"ours": SMALL_RUN},
        )
    assert not best.flag_compilation_error_occurred
    scores = {one["strategy"]: one["score"] for one in best.candidate_programs}
    assert scores["theirs -> ours"] >= scores["theirs"]
