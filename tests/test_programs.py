"""Programs as configurations: candidates, builds, scores, and the text of demos."""

from __future__ import annotations

from typing import Any

import dspy
import numpy as np
import pytest
from lms import arithmetic_lm
from tasks import VAL, Adder, Planner

from mpromptune.errors import ScoreError
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace, scorer
from mpromptune.mipro.metric import metric_value
from mpromptune.operators.texts import demo_text

OWN = dspy.Predict("question -> answer").signature.instructions
DEMO = dspy.Example(question="1+1", answer="2")


def _space(demos: Any = None, student: dspy.Module | None = None) -> ProgramSpace:
    return ProgramSpace(student or Adder(), {0: [OWN, "Add.", "Sum."]}, demos)


def test_candidates_that_occur_twice_count_once() -> None:
    """Equal instructions and equal demo sets are one candidate each, in the order of first occurrence."""
    programs = ProgramSpace(Adder(), {0: [OWN, "Add.", OWN, "Add."]}, {0: [[], [DEMO], [DEMO.copy()], []]})
    assert list(programs.candidates.values()) == [[OWN, "Add."], [[], [DEMO]]]
    assert programs.prompt_space().size == 4


def test_the_students_own_prompt_is_always_a_candidate() -> None:
    """Instruction and demos of the student are added where they are missing; the baseline is the student."""
    student = Adder()
    student.solve.demos = [DEMO]
    programs = ProgramSpace(student, {0: ["Add."]}, {0: [[]]})
    assert programs.baseline == {"0_predictor_instruction": 1, "0_predictor_demos": 1}
    assert programs.build(programs.baseline).dump_state() == student.dump_state()


def test_without_demo_candidates_the_students_demos_stay() -> None:
    """A zero-shot search changes instructions only."""
    student = Adder()
    student.solve.demos = [DEMO]
    built = _space(student=student).build({"0_predictor_instruction": 1})
    assert built.solve.signature.instructions == "Add."
    assert built.solve.demos == [DEMO]


def test_demos_that_hold_arrays_are_compared_by_identity() -> None:
    """Demos whose equality has no single truth value are kept apart instead of failing."""
    demo_sets = [[dspy.Example(x=np.zeros(3))], [dspy.Example(x=np.zeros(3))], []]
    assert len(_space({0: demo_sets}).candidates["0_predictor_demos"]) == 3


def test_builds_are_independent() -> None:
    """Changing a built program changes neither the student nor another build."""
    programs = _space({0: [[], [DEMO]]})
    first = programs.build({"0_predictor_instruction": 1, "0_predictor_demos": 1})
    first.solve.demos.append(DEMO)
    second = programs.build({"0_predictor_instruction": 1, "0_predictor_demos": 1})
    assert second.solve.demos == [DEMO]
    assert programs.program.solve.demos == []


def test_every_predictor_has_components_of_its_own() -> None:
    """Components are named as MIPROv2 names its parameters, instruction before demos."""
    programs = ProgramSpace(Planner(), {0: ["a", "b"], 1: ["c"]}, {0: [[]], 1: [[], [DEMO]]})
    names = programs.prompt_space().names
    assert names == (
        "0_predictor_instruction",
        "0_predictor_demos",
        "1_predictor_instruction",
        "1_predictor_demos",
    )


def test_scoring_keeps_no_history_and_no_trace() -> None:
    """Neither the caller's trace nor the programs' histories grow with the number of calls."""
    programs = _space()
    built: list[Any] = []
    build = programs.build
    programs.build = lambda params: built.append(build(params)) or built[-1]  # type: ignore[method-assign,func-returns-value]
    score = scorer(ProgramRunner(programs, VAL, lambda example, prediction: 1.0))
    trace: list[Any] = []
    with dspy.context(lm=arithmetic_lm(), trace=trace):
        assert [score({"0_predictor_instruction": 1}, i) for i in range(5)] == [1.0] * 5
    assert trace == []
    assert len(built) == 1
    assert all(module.history == [] for _, module in built[0].named_sub_modules())


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (True, 1.0),
        (0.25, 0.25),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (dspy.Prediction(score=0.75), 0.75),
    ],
)
def test_metric_values(returned: Any, score: float) -> None:
    """Numbers, bools, numpy scalars and predictions with a score are numbers."""
    assert metric_value(returned) == score


@pytest.mark.parametrize(
    "returned", [None, "1", {"score": 1}, float("nan"), [1.0], np.ones(2), dspy.Prediction(a=1)]
)
def test_values_that_are_no_score(returned: Any) -> None:
    """Anything else is an error that names the value."""
    with pytest.raises(ScoreError, match="The metric returned"):
        metric_value(returned)


def test_demo_text_has_every_field() -> None:
    """All fields of any signature are in the text; DSPy's own mark on bootstrapped demos is not."""
    demo = dspy.Example(augmented=True, photo="p", tags=["a", "b"], caption="c")
    assert demo_text(demo) == "photo: p\ntags: ['a', 'b']\ncaption: c"
    assert demo_text({"q": 1}) == "q: 1"
    assert demo_text("free text") == "demo: free text"


def test_demo_text_digests_binary_content() -> None:
    """An image's base64 becomes a short digest: the same for the same image, another for another."""
    texts = [demo_text(dspy.Example(photo=dspy.Image("data:image/png;base64," + c * 400))) for c in "AAB"]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) < 200
