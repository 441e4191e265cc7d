"""Texts that cannot be encoded, huge values, numbers of every kind, one sampler for several studies."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from lms import ScriptedLM, always_right, arithmetic_lm, digest
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2, PromptSpace, qEISampler, search
from mpromptune.errors import ScoreError, SearchStoppedError
from mpromptune.model.embedding import as_embedder
from mpromptune.show.page import write_report

HALF = "\ud83d"  # of an emoji
TEXTS = ["Sum.", f"Add {HALF}", f"{HALF}{HALF} Add.", "Think\0, then add.", "Go on. " * 150_000]


def strict(texts: list[str]) -> Any:
    """An embedder that, like any tokenizer, takes what can be encoded only."""
    return letters([text.encode().decode() for text in texts])


# Texts.


class StrictLM(ScriptedLM):
    """Sends its requests as JSON in UTF-8, as HTTP clients do."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        "".join(str(message["content"]) for message in messages).encode()
        return super().forward(prompt, messages, **kwargs)


def spoiling(*fields: str) -> StrictLM:
    """Adds numbers, and spoils what it proposes, or remarks, with half an emoji and more."""
    sums = arithmetic_lm()

    def answer(field: str, messages: list[dict[str, Any]]) -> str:
        text = str(sums._answer(field, messages))
        spoilt = field in fields and (field != "proposed_instruction" or digest(messages) % 2)
        return f"{text} {HALF} \0 end" if spoilt else text

    return StrictLM(answer)


class Remarking(dspy.Module):
    """Its demos hold whatever the LM has remarked."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.Predict("question -> remark, answer")

    def forward(self, question: str) -> Any:
        return self.solve(question=question)


@pytest.mark.parametrize(
    ("fields", "program", "demos"),
    [(["proposed_instruction", "observations"], Adder(), ZERO_SHOT), (["remark"], Remarking(), FEW_SHOT)],
)
def test_half_an_emoji_in_what_the_lm_wrote(
    fields: list[str], program: Any, demos: Any, tmp_path: Path
) -> None:
    """In instructions, demos or the summary: the compile is finished, kept, resumed, reported and saved."""
    lm = spoiling(*fields)
    options = {"sampler": "qei", "embedder": strict, "verbose": False, "storage": tmp_path / "run.log"}

    def run() -> Any:
        optimizer = MIPROv2(
            Counted(), auto=None, num_candidates=4, num_threads=2, log_dir=str(tmp_path), **demos
        )
        return optimizer.compile(program, trainset=TRAIN, valset=VAL, **SMALL_RUN, **options)

    with dspy.context(lm=lm):
        best = run()
        calls = len(lm.calls)
        again = run()
    assert len(lm.calls) == calls
    assert again.search_result.best_params == best.search_result.best_params
    measured = [m.mean for m in best.search_result.configurations]
    assert min(measured) > 0.0  # every candidate could be asked with
    assert best.search_result.best_score == max(m.mean for m in best.search_result.configurations if m.fully)
    best.save(tmp_path / "best.json")
    write_report(best.search_result, tmp_path / "report.html")
    assert "?" in "".join(str(best.search_result.space.components))


def test_what_cannot_be_asked_is_a_failure_of_its_own() -> None:
    """A program that makes half an emoji of one question of 12: that example scores the failure score."""

    class Cutting(Adder):
        def forward(self, question: str) -> Any:
            return super().forward(question + HALF * (question == VAL[3].question))

    lm = StrictLM(always_right()._answer)
    optimizer_options = {"sampler": "random", "verbose": False, "failure_score": -1.0}
    with dspy.context(lm=lm):
        optimizer = MIPROv2(Counted(), auto=None, num_candidates=3, num_threads=2, **ZERO_SHOT)
        best = optimizer.compile(Cutting(), trainset=TRAIN, valset=VAL, **SMALL_RUN, **optimizer_options)
    assert best.search_result.baseline_score == pytest.approx((11 - 1) / 12)


def test_texts_of_a_search() -> None:
    """Halves, NUL and a text of a million characters are embedded, and the best of them is found."""
    space = PromptSpace({"0_predictor_instruction": TEXTS})
    result = search(
        space,
        lambda params, example: float(params["0_predictor_instruction"] == 2),
        n_examples=8,
        max_calls=40,
        block_size=4,
        sampler=qEISampler(seed=0, embedder=strict),
    )
    assert result.best_params == {"0_predictor_instruction": 2}


def test_a_model_embeds_a_few_pieces_of_a_huge_text() -> None:
    """A million characters take no longer than fifty thousand; each text has a vector of its own."""

    class Model:
        """Has the face of a SentenceTransformer, and counts."""

        pieces = 0

        def encode(self, texts: list[str], **kwargs: Any) -> Any:
            self.pieces += len(texts)
            return strict(texts)

    model = Model()
    vectors = as_embedder(model)([f"{HALF} Add.", "Think\0, then add.", "Go on. " * 150_000])
    assert len(np.unique(vectors.round(4), axis=0)) == 3
    assert model.pieces < 100


def test_texts_of_a_plain_study() -> None:
    """As choices, and in the names of parameters."""
    study = optuna.create_study(direction="maximize", sampler=qEISampler(seed=0, embedder=strict))
    study.optimize(lambda trial: trial.suggest_categorical(f"style {HALF}", TEXTS).count(HALF), n_trials=8)
    assert study.best_value == 2


# Huge values.


def failing_with(bad: float, direction: str = "minimize") -> list[dict[str, Any]]:
    """The trials of a study in which every third one returns ``bad``; the best is 0 otherwise."""

    def objective(trial: optuna.Trial) -> float:
        style = trial.suggest_categorical("style", ["aaa", "aab", "b", "cc"])
        loss = len(style) - 1 + (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2
        return bad if trial.number % 3 == 0 else loss * (1 if direction == "minimize" else -1)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        study = optuna.create_study(direction=direction, sampler=fresh())
        study.optimize(objective, n_trials=6)
    return [trial.params for trial in study.trials]


def test_a_huge_value_stands_for_a_failure() -> None:
    """From float32's maximum to float's all are alike, and the trials after them are among the good ones."""
    first, *others = [failing_with(bad) for bad in (3.4e38, 1e155, sys.float_info.max)]
    assert others == [first] * 2
    assert first == failing_with(-sys.float_info.max, "maximize")
    assert "b" in {params["style"] for params in first[3:]}


def test_an_objective_that_is_huge_throughout() -> None:
    """It is minimised by rank."""
    study = optuna.create_study(sampler=qEISampler(seed=0, embedder=letters))
    study.optimize(
        lambda trial: 1e200 * (1 + len(trial.suggest_categorical("s", ["bbb", "a", "cccccc"]))), 10
    )
    assert study.best_params == {"s": "a"}


@pytest.mark.parametrize("schedule", ["blocks", "mipro"])
@pytest.mark.parametrize("huge", [1e100, 1e155, sys.float_info.max, -1e155, -sys.float_info.max])
def test_huge_scores_of_a_search(huge: float, schedule: str) -> None:
    """A candidate that has one on every fourth example is the best of all, or the worst."""

    def score(params: dict[str, int], example: int) -> float:
        candidate = params["0_predictor_instruction"]
        return huge if candidate == 1 and example % 4 == 0 else candidate / 10

    result = search(
        PromptSpace({"0_predictor_instruction": ["a", "bb", "ccc", "dddd"]}),
        score,
        n_examples=8,
        max_calls=64,
        schedule=schedule,
        sampler=qEISampler(seed=0, embedder=letters, min_cold_start=2),
        **({"block_size": 4} if schedule == "blocks" else {"minibatch_size": 4}),
    )
    assert result.best_params["0_predictor_instruction"] == (1 if huge > 0 else 3)
    assert result.best_score == pytest.approx(huge / 4 if huge > 0 else 0.3)


# Numbers of every kind.


class Custom:
    """A number of some library, which Python knows by what it can do only."""

    def __float__(self) -> float:
        return 0.5


REAL = [
    Decimal("0.5"),
    Fraction(1, 2),
    np.float16(0.5),
    np.array(0.5),
    torch.tensor(0.5, requires_grad=True),
    torch.tensor(0.5, dtype=torch.bfloat16),
    Custom(),
    dspy.Prediction(score=Decimal("0.5")),
]
NOT_REAL = [
    None,
    "0.5",
    b"1",
    0.5j,
    np.array(0.5j),
    [0.5],
    np.array([0.5]),
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("Infinity"),
    10**400,
    Fraction(10**400),
    dspy.Prediction(answer="0.5"),
]
ONE = PromptSpace({"0_predictor_instruction": ["a", "b"]})


def _same(value: Any, example: Any, prediction: Any, trace: Any = None) -> Any:
    return value


@pytest.mark.parametrize("number", REAL, ids=lambda number: type(number).__name__)
def test_a_score_may_be_any_real_number(number: Any) -> None:
    """Of a search, and of a metric, by itself or in a prediction."""
    assert search(ONE, lambda *_: number, n_examples=2, max_calls=4, sampler="random").best_score == 0.5
    for value in (number, dspy.Prediction(score=number)):
        with dspy.context(lm=arithmetic_lm()):
            optimizer = MIPROv2(
                lambda *_, value=value: value, auto=None, num_candidates=2, num_threads=2, **ZERO_SHOT
            )
            best = optimizer.compile(
                Adder(), trainset=TRAIN, valset=VAL, sampler="random", verbose=False, **SMALL_RUN
            )
        assert best.search_result.best_score == 0.5


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: repr(value)[:20])
def test_what_is_no_real_number_is_no_score(value: Any) -> None:
    """The error names it; of a very long one, the first 200 characters."""
    with pytest.raises(SearchStoppedError) as caught:
        search(ONE, lambda *_: value, n_examples=2, max_calls=4, sampler="random")
    assert isinstance(caught.value.__cause__, ScoreError)
    assert f"returned {repr(value)[:200]}" in str(caught.value.__cause__)


def test_options_may_be_any_real_number() -> None:
    """Money is often a Decimal."""
    result = search(
        ONE,
        lambda *_: 1.0,
        n_examples=2,
        max_calls=4,
        sampler="random",
        target=Decimal("0.9"),
        failure_score=Fraction(0),
    )
    assert result.best_score == 1.0
    MIPROv2(Counted(), prompt_model=arithmetic_lm(), task_model=arithmetic_lm(), max_cost=Decimal("1.50"))


# One sampler for several studies.


def styles(trial: optuna.Trial) -> float:
    return len(trial.suggest_categorical("style", ["aaa", "aab", "b", "cc"]))


def numbers(trial: optuna.Trial) -> float:
    return abs(trial.suggest_float("x", 0.0, 1.0) - 0.3) + trial.suggest_int("n", 1, 5)


def trials_of(objectives: list[Callable[[optuna.Trial], float]], samplers: list[Any]) -> list[Any]:
    """Studies that go on in turn, a trial each."""
    studies = [optuna.create_study(sampler=sampler) for sampler in samplers]
    for _ in range(4):
        for study, objective in zip(studies, objectives, strict=True):
            study.optimize(objective, n_trials=1)
    return [[trial.params for trial in study.trials] for study in studies]


def fresh() -> qEISampler:
    return qEISampler(seed=0, embedder=letters, min_cold_start=3)


def test_one_sampler_in_several_studies() -> None:
    """At once and one after the other, each has the trials that it has with a sampler of its own."""
    objectives, one = [numbers, styles, numbers], fresh()
    expected = trials_of(objectives, [fresh() for _ in objectives])
    assert trials_of(objectives, [one] * 3) == expected
    assert [trials_of([objective], [one])[0] for objective in objectives] == expected
