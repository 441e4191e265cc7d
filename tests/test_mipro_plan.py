"""schedule="mipro": DSPy's plan with any sampler, concurrently."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import optuna
import pytest
from embedders import letters
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from test_engine import SPACE, TABLE, N, Scores, trials_of

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.engine.minibatches import Minibatches, stock_calls
from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.storage.attributes import EXAMPLES, SCORES

SIZE, STEPS, TRIALS = 8, 5, 12
CALLS = stock_calls(TRIALS, N, True, SIZE, STEPS)
EVERYTHING = list(range(N))


def run(score: Any = None, space: PromptSpace = SPACE, **kwargs: Any) -> SearchResult:
    arguments = {
        "n_examples": N,
        "max_calls": CALLS,
        "sampler": qEISampler(embedder=letters, seed=0, batch_size=3, n_batches=4),
        "num_threads": 4,
        "schedule": "mipro",
        "minibatch_size": SIZE,
        "minibatch_full_eval_steps": STEPS,
        **kwargs,
    }
    return search(space, score or Scores(), **arguments)


def rows_of(result: SearchResult) -> list[tuple[tuple[int, ...], list[int]]]:
    return [(SPACE.row(t.params), t.user_attrs[EXAMPLES]) for t in result.study.trials]


@pytest.mark.parametrize("sampler", ["qei", "tpe", "gp", "random", optuna.samplers.QMCSampler(seed=0)])
def test_every_sampler_spends_what_dspy_would(sampler: Any) -> None:
    """The baseline, 12 trials of 8, and a full evaluation after 5, 10 and 12 of them."""
    scores = Scores()
    result = run(scores, sampler=sampler)
    assert result.calls == sum(scores.asked.values()) == CALLS == 40 + 12 * 8 + 3 * 40
    sizes = [len(examples) for _, examples in rows_of(result)]
    assert sizes == [40, *[8] * 5, 40, *[8] * 5, 40, 8, 8, 40]
    assert SPACE.row(result.study.trials[0].params) == SPACE.first()


def test_full_evaluations_go_to_the_best_mean_that_has_none() -> None:
    """Recomputed from the trials alone: the mean over the distinct examples seen before."""
    seen: dict[tuple[int, ...], set[int]] = defaultdict(set)
    full = set()
    for row, examples in rows_of(run()):
        if len(examples) == N and seen:
            means = {r: TABLE[r][list(e)].mean() for r, e in seen.items() if r not in full}
            assert row not in full
            assert means[row] == max(means.values())
        full |= {row} if len(examples) == N else set()
        seen[row].update(examples)
    assert len(full) == 4


def test_the_winner_is_the_best_full_evaluation() -> None:
    """Measured.fully says which have had one; the score is the exact mean of the winner."""
    result = run()
    means = {SPACE.row(m.params): m.mean for m in result.configurations if m.fully}
    assert len(means) == 4
    assert means[SPACE.row(result.best_params)] == max(means.values()) == result.best_score
    assert result.best_score == TABLE[SPACE.row(result.best_params)].mean()
    assert result.baseline_score == TABLE[0, 0].mean()


def test_minibatches_are_fresh_and_depend_on_seed_and_number_alone() -> None:
    """Twelve different ones, the same for another sampler, others for another seed."""

    def minibatches(**kwargs: Any) -> list[tuple[int, ...]]:
        return [tuple(examples) for _, examples in rows_of(run(**kwargs)) if len(examples) == SIZE]

    assert len(set(minibatches())) == TRIALS
    assert minibatches() == minibatches(sampler="random")
    assert not set(minibatches()) & set(minibatches(seed=1))


@pytest.mark.parametrize("sampler", ["tpe", qEISampler(embedder=letters, seed=0, n_batches=4)])
def test_the_same_seed_gives_the_same_trials_whatever_the_threads(sampler: Any) -> None:
    """1 thread, and 16 threads with shuffled latencies."""
    serial = run(sampler=sampler, num_threads=1, batch_size=3)
    threaded = run(Scores(delay=0.01), sampler=sampler, num_threads=16, batch_size=3)
    assert trials_of(serial) == trials_of(threaded)
    assert serial.best_params == threaded.best_params


def test_without_minibatches_every_trial_is_a_full_evaluation() -> None:
    """minibatch=False, or minibatches of everything; no configuration is paid for twice."""
    budget = stock_calls(6, N, minibatch=False)
    for given_ in ({"minibatch": False}, {"minibatch_size": N}):
        scores = Scores()
        result = run(scores, max_calls=budget, **given_)
        assert result.calls == budget == 7 * N
        assert max(scores.asked.values()) == 1
        assert all(measured.fully for measured in result.configurations)


def test_the_space_may_be_exhausted() -> None:
    """Three configurations: each gets its full evaluation, then a clean stop below the budget."""
    rows = [(0, 0), (1, 1), (2, 2)]
    space = PromptSpace(SPACE.components, combinations=rows)
    scores = Scores()
    result = run(scores, space, max_calls=10**4)
    assert {SPACE.row(m.params) for m in result.configurations if m.fully} == set(rows)
    assert result.calls == sum(scores.asked.values()) < 10**3
    one = run(lambda params, e: 1.0, PromptSpace({"a": ["only"]}), n_examples=9)
    assert (one.best_score, one.calls) == (1.0, 9)


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_minibatches_that_add_up_to_the_validation_set_are_no_full_evaluation(sampler: str) -> None:
    """What was seen in pieces stays open, and the baseline, seen as a whole, is not proposed again."""
    space = PromptSpace({"0_predictor_instruction": ["aa", "ab", "abc"]})
    chosen = qEISampler(embedder=letters, seed=0) if sampler == "qei" else sampler
    sizes = {"n_examples": 6, "minibatch_size": 4, "minibatch_full_eval_steps": 10, "max_calls": 98}
    result = run(lambda params, e: float(e % 2), space, sampler=chosen, **sizes)
    trials = [(t.params["0_predictor_instruction"], len(t.user_attrs[EXAMPLES])) for t in result.study.trials]
    assert [size for index, size in trials if index == 0] == [6]
    assert sum(size == 4 for index, size in trials) == 20


def test_another_answer_is_a_second_observation() -> None:
    """A program that changes its mind: all answers are in the trials, and their mean in the result."""
    asked: Counter[tuple[tuple[int, ...], int]] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        asked[SPACE.row(params), example] += 1
        return float(asked[SPACE.row(params), example] % 2)

    result = run(score, num_threads=1)
    answers: dict[tuple[tuple[int, ...], int], list[float]] = defaultdict(list)
    for trial in result.study.trials:
        for example, answer in zip(trial.user_attrs[EXAMPLES], trial.user_attrs[SCORES], strict=True):
            answers[SPACE.row(trial.params), example].append(answer)
    assert result.calls == sum(asked.values()) == sum(map(len, answers.values())) == CALLS
    assert max(map(len, answers.values())) > 1
    measured = {(SPACE.row(m.params), e): s for m in result.configurations for e, s in m.scores.items()}
    assert measured == {pair: pytest.approx(np.mean(values)) for pair, values in answers.items()}


def test_a_full_evaluation_that_fails_is_completed() -> None:
    """One example of the baseline times out once: only that example is asked for again."""
    scores = Scores()
    failed = []

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0) and example == 3 and not failed:
            failed.append(example)
            raise ConnectionError("reset")
        return scores(params, example)

    result = run(score, retry=RetryPolicy(attempts=1))
    assert result.baseline_score == TABLE[0, 0].mean()
    assert result.calls == sum(scores.asked.values()) == CALLS
    assert [t.state for t in result.study.trials].count(TrialState.FAIL) == 1
    assert [3] in [examples for _, examples in rows_of(result)]


def test_a_trial_on_all_examples_that_fails_is_completed() -> None:
    """Without minibatches every trial is a full evaluation; one of them lacks an example, once."""
    failed = []

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) != (0, 0) and example == 3 and not failed:
            failed.append(example)
            raise ConnectionError("reset")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, retry=RetryPolicy(attempts=1), minibatch=False, max_calls=4 * N, num_threads=1)
    assert failed
    assert all(measured.fully for measured in result.configurations)
    assert result.calls == 4 * N


def test_a_score_that_always_fails_ends_the_search() -> None:
    """After the baseline, which may be broken by itself, and a batch of others that fail as well."""
    asked = []

    def score(params: dict[str, int], example: int) -> float:
        asked.append(example)
        raise ValueError("broken")

    with pytest.raises(SearchStoppedError, match="failures of all 24 calls of a batch"):
        run(score)
    assert len(asked) < CALLS / 2


def test_full_evaluations_that_lack_examples_are_compared_on_what_both_have() -> None:
    """The other one fails on four hard examples: a mean of 19 in 36 against 20 in 40, but one less of 36."""
    space = PromptSpace({"0_predictor_instruction": ["a", "b"]})

    def score(params: dict[str, int], example: int) -> float:
        is_other = params["0_predictor_instruction"] == 1
        if is_other and example < 4:
            raise TimeoutError("slow")
        return float(4 < example < 24) or float(example == 4 and not is_other)

    result = run(score, space, max_calls=200, retry=RetryPolicy(attempts=1))
    assert [len(m.scores) for m in result.configurations if m.fully and m.params != result.best_params] == [
        36
    ]
    assert result.best_params == result.baseline_params


def test_a_configuration_that_keeps_failing_never_wins() -> None:
    """The best one cannot answer one example: it is given up, and another wins."""
    best = max(TABLE, key=lambda row: TABLE[row].mean())

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == best and example % 4 == 0:
            raise ConnectionError("filtered")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, retry=RetryPolicy(attempts=1), max_calls=3 * CALLS)
    assert SPACE.row(result.best_params) != best
    assert not any(m.fully for m in result.configurations if SPACE.row(m.params) == best)


@pytest.mark.parametrize(("lost", "times"), [(4, 2), (5, 3)])
def test_a_baseline_that_lacks_examples_ends_no_search(lost: int, times: int) -> None:
    """Up to a tenth of them it is judged by the others; with more, after three trials, so is the winner."""
    asked: Counter[int] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0) and example < lost:
            asked[example] += 1
            raise TimeoutError("slow")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, retry=RetryPolicy(attempts=1), sampler="random")
    assert asked == dict.fromkeys(range(lost), times)
    baseline = next(m for m in result.configurations if m.params == result.baseline_params)
    assert baseline.fully == (lost == 4)
    known = TABLE[0, 0][lost:]
    assert list(baseline.scores.values()) == known.tolist()
    assert result.baseline_score == pytest.approx(known.mean(), abs=0.0 if baseline.fully else 0.05)
    assert TABLE[SPACE.row(result.best_params)][lost:].mean() >= known.mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_calls": 87}, "max_calls=87 is below the 88 calls"),
        ({"minibatch_size": 41}, "minibatch_size=41 exceeds the 40"),
        ({"minibatch_size": 0}, "minibatch_size.*0"),
        ({"minibatch_full_eval_steps": 0}, "minibatch_full_eval_steps.*0"),
        ({"block_size": 5}, "block_size.*only apply to schedule='blocks'"),
        ({"patience": 1}, "patience.*only apply"),
        ({"target": 0.5}, "target.*only apply"),
        ({"confirm": False}, "confirm.*only apply"),
        ({"schedule": "stock"}, "schedule must be one of.*'stock'"),
    ],
)
def test_bad_input_is_refused_before_any_call(arguments: dict[str, Any], message: str) -> None:
    """Nothing is spent on arguments that cannot work, or that mean nothing here."""
    scores = Scores()
    with pytest.raises(InvalidArgumentError, match=message):
        run(scores, **arguments)
    assert not scores.asked


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 9), st.booleans(), st.integers(0, 30))
def test_the_plan_is_as_long_as_the_budget_allows(
    trials: int, n: int, steps: int, minibatch: bool, spare: int
) -> None:
    """What DSPy would spend on so many trials buys so many; a call short of the next buys no more."""
    batches = Minibatches(max(1, n // 3), steps, minibatch)
    budget = batches.calls(trials, n)
    short = min(budget + spare, batches.calls(trials + 1, n) - 1)
    assert batches.trials_for(budget, n) == batches.trials_for(short, n) == trials


@pytest.mark.parametrize(("max_calls", "trials"), [(47, 1), (48, 2), (51, 2), (71, 2), (72, 3)])
def test_trials_for_a_budget_by_hand(max_calls: int, trials: int) -> None:
    """Minibatches of 4 of 20 examples, in full after every second: n trials take 20 + 20 ceil(n/2) + 4 n."""
    assert Minibatches(4, 2).trials_for(max_calls, 20) == trials


def test_a_budget_below_one_trial_is_refused() -> None:
    """The baseline, a minibatch and a full evaluation of 20 examples are 44 calls."""
    with pytest.raises(InvalidArgumentError, match="below the 44 calls"):
        Minibatches(4, 2).trials_for(43, 20)


def test_stock_calls_by_hand() -> None:
    """18 minibatches of 35 and 5 full evaluations of 200: MIPROv2's medium run."""
    assert stock_calls(18, 200) == 18 * 35 + 5 * 200 == 1630
    assert stock_calls(10, 40, minibatch=False) == 40 * 11
