"""Metrics for `dspy.GEPA`, and what a program call shows beside its score."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
import tasks
from dspy.teleprompt.gepa.gepa_utils import ScoreWithFeedback
from dspy.utils.callback import BaseCallback
from lms import ScriptedLM, arithmetic_lm, completion
from remote_lms import WrittenLM
from tasks import QEI, VAL, ZERO_SHOT, Planner

from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.mipro.run import Run
from mpromptune.storage.attributes import NOTE

RUN = {"sampler": "random", "max_calls": 60}


@pytest.fixture
def _notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Program calls have notes."""
    monkeypatch.setattr(Run, "takes_notes", True)


def compiled(metric: Any, program: Any = None, **options: Any) -> Any:
    return tasks.compiled(program, metric=metric, **{**RUN, **options})


def right(example: Any, prediction: Any) -> bool:
    return bool(example.answer == prediction.answer)


def plain(example: Any, prediction: Any, trace: Any = None) -> bool:
    return right(example, prediction)


def feedback_on(example: Any, prediction: Any) -> str:
    return f"expected {example.answer}, got {prediction.answer}"


def gepas(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    assert pred_name is None
    assert pred_trace is None
    return ScoreWithFeedback(score=float(right(gold, pred)), feedback=feedback_on(gold, pred))


def without_defaults(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    return gepas(gold, pred, trace, pred_name, pred_trace)


class Judge(dspy.Module):
    """A metric of five parameters that is a program."""

    def forward(self, gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
        return dspy.Prediction(score=right(gold, pred), feedback=feedback_on(gold, pred))


TWINS = {
    "GEPA's signature": gepas,
    "without defaults": without_defaults,
    "module": Judge(),
    "prediction": lambda e, p, trace=None: dspy.Prediction(score=right(e, p), feedback="good"),
    "no feedback": lambda e, p, trace=None: dspy.Prediction(score=right(e, p)),
    "object": lambda e, p, trace=None: SimpleNamespace(score=right(e, p), feedback="good"),
}


def outcome_of(best: Any) -> Any:
    """Everything that the scores of a compile decide, its candidates from the bootstrap among it."""
    result = best.search_result
    trials = [(t.number, t.params, t.value, t.intermediate_values) for t in result.study.trials]
    return trials, result.space.components, result.best_params, best.score


@pytest.fixture(scope="module")
def expected() -> Any:
    """The outcome with the plain metric, also with a threshold."""
    return [outcome_of(compiled(plain, init=init)) for init in ({}, {"metric_threshold": 0.5})]


@pytest.mark.parametrize("metric", TWINS.values(), ids=TWINS)
def test_a_metric_with_feedback_is_its_plain_twin(metric: Any, expected: Any) -> None:
    """The same demos from the bootstrap, with and without a threshold, and the same scores."""
    for init, outcome in zip(({}, {"metric_threshold": 0.5}), expected, strict=True):
        assert outcome_of(compiled(metric, init=init)) == outcome


@pytest.mark.parametrize("metric", [gepas, without_defaults])
def test_a_dry_run_takes_such_metrics(metric: Any) -> None:
    """Nothing is paid for."""
    lm = arithmetic_lm()
    estimate = tasks.compiled(metric=metric, lm=lm, dry_run=True, **RUN)
    assert estimate.usage["search"].program_calls == RUN["max_calls"]
    assert lm.calls == []


def test_the_metric_of_four_parameters_is_refused() -> None:
    """It is neither DSPy's nor GEPA's."""
    with pytest.raises(InvalidArgumentError, match=r"five arguments of dspy.GEPA .*'trace'"):
        compiled(lambda gold, pred, trace, pred_name: True)


def test_dspys_own_search_takes_gepas_signature() -> None:
    """Without a sampler nothing is in its way."""
    assert tasks.compiled(metric=gepas).score >= 0


def test_callbacks_see_numbers() -> None:
    """What DSPy's callbacks are told of an evaluation is what a plain metric gives."""
    seen: list[Any] = []

    class Watching(BaseCallback):
        def on_evaluate_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            seen.append((outputs.score, [score for *_, score in outputs.results]))

    found = []
    for metric in (plain, gepas):
        with dspy.context(callbacks=[Watching()]):
            compiled(metric)
        found.append(seen.copy())
        seen.clear()
    assert found[0]
    assert found[0] == found[1]
    assert {type(score) for _, scores in found[1] for score in scores} == {float}


@pytest.mark.parametrize("score", [None, "1", float("nan")])
def test_a_broken_score_with_feedback_stops(score: Any) -> None:
    """As a metric that returns it without feedback."""
    with pytest.raises(SearchStoppedError, match=f"The metric returned {score!r}"):
        compiled(lambda e, p, trace=None: dspy.Prediction(score=score, feedback="good"), init=ZERO_SHOT)


# Notes.


def notes_of(best: Any) -> dict[tuple[int, int], Any]:
    """(trial, example) to the note."""
    return {
        (trial.number, int(name.removeprefix(f"{NOTE}:"))): note
        for trial in best.search_result.study.trials
        for name, note in trial.user_attrs.items()
        if name.startswith(f"{NOTE}:")
    }


def scores_of(best: Any) -> dict[tuple[int, int], float]:
    """(trial, example) to the score."""
    return {
        (trial.number, example): score
        for trial in best.search_result.study.trials
        for example, score in trial.intermediate_values.items()
    }


def test_fixed_proposals_take_no_notes() -> None:
    """Nobody reads them."""
    assert notes_of(compiled(gepas)) == {}


@pytest.mark.usefixtures("_notes")
@pytest.mark.parametrize("metric", [gepas, without_defaults])
def test_a_note_has_what_a_call_shows(metric: Any) -> None:
    """Inputs, outputs and labels of the program, feedback, and inputs and outputs of every predictor."""
    best = compiled(metric, Planner())
    notes, scores = notes_of(best), scores_of(best)
    assert notes.keys() == scores.keys()
    for (number, example), note in notes.items():
        question, answer = VAL[example].question, note["outputs"]["answer"]
        assert scores[number, example] == (answer == VAL[example].answer)
        assert note == {
            "inputs": {"question": question},
            "outputs": {"answer": answer},
            "expected": {"answer": VAL[example].answer},
            "feedback": f"expected {VAL[example].answer}, got {answer}",
            "predictors": {
                "plan": {"inputs": {"question": question}, "outputs": {"plan": "some plan"}},
                "solve": {
                    "inputs": {"question": question, "plan": "some plan"},
                    "outputs": {"answer": answer},
                },
            },
        }


@pytest.mark.usefixtures("_notes")
def test_notes_change_nothing_else(expected: Any) -> None:
    """The same trials and the same winner."""
    assert outcome_of(compiled(gepas)) == expected[0]


@pytest.mark.usefixtures("_notes")
def test_a_plain_metric_has_no_feedback() -> None:
    """But there is something to see."""
    notes = notes_of(compiled(plain)).values()
    assert {note["feedback"] for note in notes} == {None}
    assert all(note["outputs"] for note in notes)


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.usefixtures("_notes")
@pytest.mark.parametrize(
    ("feedback", "said"),
    [
        (3, "3"),
        ({"missing": ["unit"]}, '{"missing": ["unit"]}'),
        (Mute(), "<Mute>"),
        ("\ud83d", "?"),
        ("a b " * 2000, "a b " * 1000 + "..."),
        (None, None),
        (b"\xff", None),
    ],
)
def test_feedback_of_any_kind_is_text(feedback: Any, said: str | None) -> None:
    """It is never an error."""
    best = compiled(lambda e, p, trace=None: dspy.Prediction(score=right(e, p), feedback=feedback))
    found = {note["feedback"] for note in notes_of(best).values()}
    assert len(found) == 1
    if said is not None:
        assert found == {said}


class MumblingLM(ScriptedLM):
    """Solves no sum of the first validation example in a form that can be parsed."""

    def __init__(self) -> None:
        super().__init__(arithmetic_lm()._answer)

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        last = str((messages or [{}])[-1].get("content"))
        if f"\n{VAL[0].question}\n" in last and "## plan ##" in last.partition("Respond")[0]:
            return completion("gibberish", self.model)
        return super().forward(prompt, messages, **kwargs)


@pytest.mark.usefixtures("_notes")
def test_a_failed_call_has_its_error_for_feedback() -> None:
    """With an answer that cannot be parsed, and what is known of the call until then."""
    best = compiled(gepas, Planner(), lm=MumblingLM())
    notes = [note for (_, example), note in notes_of(best).items() if example == 0]
    assert notes
    question = {"question": VAL[0].question}
    for note in notes:
        assert note.pop("feedback").startswith("AdapterParseError: ")
        assert note == {
            "inputs": question,
            "outputs": {},
            "expected": {"answer": VAL[0].answer},
            "predictors": {"plan": {"inputs": question, "outputs": {"plan": "some plan"}}},
        }


@pytest.mark.usefixtures("_notes")
def test_an_error_of_the_infrastructure_leaves_no_note() -> None:
    """It says nothing about the candidate."""
    answer, failed = arithmetic_lm()._answer, []

    def failing(field: str, messages: list[dict[str, Any]]) -> str:
        if field == "answer" and f"\n{VAL[3].question}\n" in str(messages[-1]["content"]):
            failed.append(messages)
            raise ConnectionError("gone")
        return answer(field, messages)

    notes = notes_of(compiled(gepas, lm=ScriptedLM(failing), max_retries=0))
    assert failed
    assert 3 not in {example for _, example in notes}
    assert {note["feedback"][:8] for note in notes.values()} == {"expected"}


class Picture(dspy.Module):
    """A predictor whose fields are no texts, and which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.look = dspy.Predict("photo: dspy.Image, tags: list[str] -> answer")

    def forward(self, photo: Any, tags: list[str]) -> Any:
        self.look(photo=photo, tags=["first"])
        return self.look(photo=photo, tags=tags)


@pytest.mark.usefixtures("_notes")
def test_values_are_as_in_prompts(tmp_path: Path) -> None:
    """JSON of what is no text, digests of what is binary; of two calls the last."""
    photo = dspy.Image("data:image/png;base64," + "A" * 20_000)
    examples = [
        dspy.Example(photo=photo, tags=["é", str(i)], answer=f"{i}").with_inputs("photo", "tags")
        for i in range(8)
    ]
    lm = ScriptedLM(lambda field, messages: "1")
    options = {"trainset": examples[:4], "valset": examples[4:], "storage": tmp_path / "run.journal"}
    best = compiled(plain, Picture(), lm=lm, init=ZERO_SHOT, **options)
    notes = notes_of(best)
    assert notes
    for (_, example), note in notes.items():
        assert note["inputs"]["tags"] == f'["é", "{example + 4}"]'
        assert note["predictors"]["look"]["inputs"]["tags"] == note["inputs"]["tags"]
        assert "data:image/png;base64," in note["inputs"]["photo"]
        assert len(note["inputs"]["photo"]) < 300
        assert "A" * 20 not in note["inputs"]["photo"]


@pytest.mark.usefixtures("_notes")
def test_notes_come_back_from_other_processes(tmp_path: Path, forks: Any) -> None:
    """They are those of threads."""
    found = []
    for executor in (None, lambda: ProcessPoolExecutor(2, mp_context=forks)):
        lm = WrittenLM(tmp_path / "log")
        found.append(notes_of(compiled(without_defaults, Planner(), lm=lm, executor=executor)))
    assert found[0]
    assert found[0] == found[1]


@pytest.mark.usefixtures("_notes")
def test_a_continued_compile_has_the_notes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """From any line of its journal, with no score paid for twice."""
    path = tmp_path / "whole"
    whole = compiled(gepas, storage=path, **QEI)
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if NOTE.encode() in line)
    for cut in (first, first + 1, first + 2, (first + len(lines)) // 2, len(lines)):
        path = tmp_path / f"{cut}"
        path.write_bytes(b"".join(lines[:cut]))
        again = compiled(gepas, storage=path, **QEI)
        assert notes_of(again) == notes_of(whole)
        assert scores_of(again) == scores_of(whole)
