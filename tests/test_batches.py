"""The plan of batches: what is asked, of whom, and who wins, whatever the metric gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
from embedders import letters
from test_engine import SPACE, TABLE, N, Scores, run, trials_of

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.engine.batches import BatchPlan, Confirm
from mpromptune.engine.plan import Task
from mpromptune.engine.scores import ScoreTable
from mpromptune.model.space import Row
from mpromptune.storage.attributes import EXAMPLES

BASELINE, BEST = (0, 0), (4, 1)
CONFIRM = [True, "auto", False]


def is_right(row: Row, example: int) -> bool:
    """The best one is right on 35 of 40 examples, the others on one to three of every five."""
    if row == BEST:
        return example % 8 != 3
    return (example * 3 + row[0]) % 5 < 1 + (row[0] + row[1]) % 3


def clear(params: dict[str, int], example: int) -> float:
    return float(is_right(SPACE.row(params), example))


def wide(seed: int = 0) -> qEISampler:
    """A sampler that leaves the size of batches to the search."""
    return qEISampler(embedder=letters, seed=seed, batch_size=None)


def scores_of(result: SearchResult, row: Row) -> dict[int, float]:
    """What was measured of a configuration."""
    return next((m.scores for m in result.configurations if SPACE.row(m.params) == row), {})


def asked_in(result: SearchResult) -> list[tuple[Row, tuple[int, ...]]]:
    """Every trial's configuration and examples."""
    return [(SPACE.row(t.params), tuple(t.user_attrs[EXAMPLES])) for t in result.study.trials]


# What is asked.


@pytest.mark.parametrize("confirm", CONFIRM)
@pytest.mark.parametrize("num_threads", [1, 64])
def test_every_pair_is_paid_once(confirm: Any, num_threads: int) -> None:
    """The metric counts each pair of configuration and example once, and as many as the result says."""
    scores = Scores()
    result = run(scores, confirm=confirm, num_threads=num_threads, sampler=wide())
    assert set(scores.asked.values()) == {1}
    assert sum(scores.asked.values()) == result.calls <= 300


@pytest.mark.parametrize(("batch_size", "block_size"), [(4, 5), (2, 10), (7, 3)])
def test_a_batch_holds_as_many_blocks_as_it_is_large(batch_size: int, block_size: int) -> None:
    """After the baseline's block, each batch makes q times block_size calls while there are examples left."""
    ends: list[int] = []
    result = run(
        sampler=wide(),
        batch_size=batch_size,
        block_size=block_size,
        confirm=False,
        callbacks=[lambda study, trial: ends.append(len(study.trials))],
    )
    asked = asked_in(result)
    assert (asked[0][0], len(asked[0][1])) == (BASELINE, block_size)
    bounds = [1, *sorted(set(ends))]
    calls = [sum(len(examples) for _, examples in asked[a:b]) for a, b in pairwise(bounds)]
    assert calls[0] % (batch_size * block_size) == 0  # all batches in flight
    assert set(calls[1:4]) == {batch_size * block_size}
    assert max(calls[1:]) == batch_size * block_size  # less where a configuration lacks less than its blocks
    assert sum(len(examples) for _, examples in asked) == 300


@pytest.mark.parametrize(("num_threads", "max_calls"), [(16, 300), (32, 600)])
def test_up_to_32_threads_the_trials_are_those_of_one(num_threads: int, max_calls: int) -> None:
    """With batches of the usual size, and latencies that are shuffled."""
    serial = run(Scores(), num_threads=1, sampler=wide(), max_calls=max_calls)
    threaded = run(Scores(delay=0.005), num_threads=num_threads, sampler=wide(), max_calls=max_calls)
    assert trials_of(threaded) == trials_of(serial)
    assert threaded.best_params == serial.best_params


@pytest.mark.parametrize("confirm", CONFIRM)
def test_a_large_pool_has_the_same_trials_under_any_timing(confirm: Any) -> None:
    """The same seed and 64 threads, with no latency, some, and more."""
    given = {"num_threads": 64, "confirm": confirm}
    first, *others = [trials_of(run(Scores(d), sampler=wide(), **given)) for d in (0.0, 0.002, 0.01)]
    assert others == [first, first]


def test_another_seed_has_other_trials() -> None:
    """The order of the examples and the configurations are drawn by the seed."""
    assert trials_of(run(seed=0)) != trials_of(run(seed=1))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_optuna_samplers_run_under_the_same_plan(sampler: str) -> None:
    """The baseline's block first, one block for each trial that explores, no pair twice, all calls spent."""
    scores = Scores()
    result = run(scores, sampler=sampler, batch_size=4, confirm=False)
    asked = asked_in(result)
    assert asked[0][0] == BASELINE
    assert {len(examples) for _, examples in asked} == {5}
    assert set(scores.asked.values()) == {1}
    assert result.calls == 300
    assert trials_of(run(sampler=sampler, batch_size=4, confirm=False, num_threads=16)) == trials_of(result)


# Who is confirmed.


@pytest.mark.parametrize(("max_calls", "is_whole"), [(300, True), (60, False)])
def test_the_winner_is_completed_where_that_costs_little(max_calls: int, is_whole: bool) -> None:
    """A fifth of 300 calls is more than a whole measurement; of 60 it is 12, and the winner lacks more."""
    for seed in range(3):
        result = run(max_calls=max_calls, seed=seed, sampler=wide(seed))
        measured = scores_of(result, SPACE.row(result.best_params))
        assert (len(measured) == N) == is_whole
        assert is_whole or N - len(measured) > max_calls / 5


def test_what_is_not_kept_back_explores() -> None:
    """With confirm=False all calls do, and the winner has the highest posterior mean."""
    result = run(confirm=False, sampler=wide(), callbacks=[])
    assert result.calls == 300
    assert result.best_params == result.configurations[0].params
    largest = max(len(examples) for _, examples in asked_in(result))
    assert largest <= 2 * 5  # a batch of two blocks; nobody was measured on what it lacked


def test_a_baseline_that_is_clearly_worse_is_asked_no_further() -> None:
    """It is wrong on all five of its block, the winner right on everything: that is 95 % sure."""
    result = run(lambda params, example: float(SPACE.row(params) != BASELINE), sampler=wide())
    assert len(scores_of(result, BASELINE)) == 5
    assert result.best_score == 1.0


def test_a_baseline_that_is_as_good_is_compared_on_all_shared_examples() -> None:
    """All configurations answer alike, so it is never sure: it ends on what the winner has, all of it."""
    result = run(lambda params, example: float(example % 3 == 0), sampler=wide(), max_calls=400)
    winner = scores_of(result, SPACE.row(result.best_params))
    assert scores_of(result, BASELINE) == winner
    assert len(winner) == N


@pytest.mark.parametrize(("max_calls", "seed"), [(2 * N, 0), (2 * N, 1), (3 * N, 2), (300, 0)])
def test_full_confirmation_measures_winner_and_baseline_on_everything(max_calls: int, seed: int) -> None:
    """With confirm=True, from the smallest budget on; and the winner is not worse."""
    result = run(confirm=True, max_calls=max_calls, seed=seed, sampler=wide(seed))
    assert len(scores_of(result, SPACE.row(result.best_params))) == len(scores_of(result, BASELINE)) == N
    assert result.best_score >= result.baseline_score == TABLE[BASELINE].mean()
    assert result.calls <= max_calls


@pytest.mark.parametrize("confirm", CONFIRM)
@pytest.mark.parametrize("max_calls", [1, 2, 3, 7, 39])
def test_a_budget_below_the_validation_set_is_kept(confirm: Any, max_calls: int) -> None:
    """All of it is spent, or with confirm=True refused, and there is a winner that was measured."""
    scores = Scores()
    if confirm is True:
        with pytest.raises(ValueError, match=f"max_calls={max_calls}"):
            run(scores, confirm=True, max_calls=max_calls)
        assert not scores.asked
        return
    result = run(scores, confirm=confirm, max_calls=max_calls, sampler=wide())
    assert result.calls == sum(scores.asked.values()) == max_calls
    assert scores_of(result, SPACE.row(result.best_params))


def test_a_baseline_that_lacks_examples_is_compared_on_the_others_too() -> None:
    """B has all six and leads; A is better on the five that both have."""
    table, a, b = ScoreTable(6), (0,), (1,)
    plan = BatchPlan(Task(6, 100, a, 3, 0), table, block_size=2, confirm=True)
    table.add(a, (0, 1, 2, 3, 4), dict.fromkeys(range(5), 0.5))
    table.add(b, (0, 1, 2, 3, 4, 5), {**dict.fromkeys(range(5), 0.4), 5: 1.0})
    assert plan.winner([b, a], is_cut_short=False) == a
    table.add(b, (0,), {0: 2.0})
    assert plan.winner([b, a], is_cut_short=False) == b


@pytest.mark.parametrize(
    ("n_scores", "is_combined", "winner"), [(19, False, 1), (20, False, 2), (5, True, 2)]
)
def test_a_few_right_answers_do_not_win(n_scores: int, is_combined: bool, winner: int) -> None:
    """C leads B: it needs 20 scores, unless several predictors are combined."""
    table, a, b, c = ScoreTable(50), (0,), (1,), (2,)
    plan = BatchPlan(Task(50, 200, a, 3, 0, is_combined=is_combined), table, confirm=False)
    for row, n in ((a, 5), (b, 30), (c, n_scores)):
        table.add(row, tuple(range(n)), dict.fromkeys(range(n), 1.0))
    assert plan.winner([c, b, a], is_cut_short=False) == (winner,)
    assert plan.winner([a, c, b], is_cut_short=False) == a


# Rules of the user's.


def test_patience_ends_a_search_in_which_nothing_is_left_to_gain() -> None:
    """With one that is always right, calls are left over, and it is returned."""

    def score(params: dict[str, int], example: int) -> float:
        return float(SPACE.row(params) == BEST or example % 4 == 0)

    result = run(score, patience=2, max_calls=600, sampler=wide())
    assert SPACE.row(result.best_params) == BEST
    assert result.calls < 400


def test_a_target_that_is_reached_ends_the_search() -> None:
    """On all examples of the winner, where completing it costs little."""
    result = run(clear, target=0.8, max_calls=600, sampler=wide())
    assert SPACE.row(result.best_params) == BEST
    assert (result.best_score, len(scores_of(result, BEST))) == (35 / 40, N)
    assert result.calls < 500


# Whatever the metric gives.

KINDS: list[Callable[[bool], Any]] = [
    lambda right: right,
    lambda right: int(right),
    lambda right: Decimal(int(right)),
    lambda right: np.float32(right),
    lambda right: np.bool_(right),
    lambda right: Fraction(int(right)),
]
METRICS: dict[str, Callable[[bool, Row, int], Any]] = {
    "percent": lambda right, row, example: 100.0 * right,
    "signs": lambda right, row, example: 1.0 if right else -1.0,
    "negative": lambda right, row, example: -5000.0 + 3.0 * right,
    "huge": lambda right, row, example: 1e200 * right,
    "thousandths": lambda right, row, example: 0.001 * right,
    "small grades": lambda right, row, example: 0.003 * right + 0.0001 * (example % 7),
    "tiny": lambda right, row, example: 1e-200 * right,
    "between": lambda right, row, example: 0.2 + 0.6 * right + 0.01 * (example % 7),
    "grades": lambda right, row, example: 1.0 + 3.0 * right + 0.1 * (example % 7),
    "beyond": lambda right, row, example: 1.5 * right - 0.25 * (example % 2),
    "kinds": lambda right, row, example: KINDS[(row[0] + example) % len(KINDS)](right),
    "an example that all fail": lambda right, row, example: float(right and example % 10 != 7),
    "an example that all solve": lambda right, row, example: float(right or example % 10 == 7),
}


@pytest.mark.parametrize(("metric", "confirm"), [*zip(METRICS.values(), cycle(CONFIRM))], ids=METRICS)
def test_the_best_is_found_on_any_scale(metric: Any, confirm: Any) -> None:
    """Where answers are right or wrong underneath, the one that is right most often wins."""

    def score(params: dict[str, int], example: int) -> Any:
        row = SPACE.row(params)
        return metric(is_right(row, example), row, example)

    result = run(score, confirm=confirm, max_calls=400, sampler=wide())
    assert SPACE.row(result.best_params) == BEST
    for measured in result.configurations:
        row = SPACE.row(measured.params)
        expected = {e: float(metric(is_right(row, e), row, e)) for e in measured.scores}
        assert measured.scores == pytest.approx(expected)
        assert np.isfinite([measured.posterior_mean, measured.posterior_std]).all()


@pytest.mark.parametrize(
    ("value", "confirm"), [*zip([0.0, 1.0, 0.3, -7.0, 1e9, False, True], cycle(CONFIRM))]
)
def test_equal_scores_end_in_that_score(value: float, confirm: Any) -> None:
    """All alike: nothing is better than anything, and nothing else is said of it."""
    result = run(lambda params, example: value, confirm=confirm, max_calls=200, sampler=wide())
    assert result.best_score == result.baseline_score == pytest.approx(float(value))
    means = [m.posterior_mean for m in result.configurations]
    assert np.isfinite(means).all()
    assert max(means) - min(means) <= 0.05 * max(1.0, abs(value))


@pytest.mark.parametrize(("metric", "confirm"), [*zip(["percent", "grades", "kinds"], CONFIRM, strict=True)])
def test_a_baseline_that_is_the_best_is_returned(metric: str, confirm: Any) -> None:
    """The search finds nothing better, and says so."""

    def score(params: dict[str, int], example: int) -> Any:
        row = SPACE.row(params)
        return METRICS[metric](is_right(row, example), row, example)

    result = run(score, confirm=confirm, baseline=SPACE.params(BEST), max_calls=400, sampler=wide())
    assert SPACE.row(result.best_params) == BEST
    assert result.best_score == result.baseline_score


@pytest.mark.parametrize(
    ("worst", "confirm"), [*zip([-10.0, -1e3, -1e6, -1e30, -1e200, -10.0], cycle(CONFIRM))]
)
def test_a_configuration_that_is_far_worse_does_not_change_who_wins(worst: float, confirm: Any) -> None:
    """Graded scores differ by tenths; one candidate loses by far more than that, on every example."""
    noise = np.random.default_rng(0).normal(0.0, 0.2, (6, 3, N))

    def score(params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        return worst if row[0] == 1 else 2.0 + 0.2 * row[0] + 0.5 * (row == BEST) + float(noise[row][example])

    result = run(score, confirm=confirm, max_calls=400, sampler=wide())
    assert SPACE.row(result.best_params) == BEST


# Spaces.


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_thousands_of_listed_configurations_are_searched(sampler: str) -> None:
    """Of 80 x 80 pairs 5000 exist: only those are measured, and what is found is far above the baseline."""
    rng = np.random.default_rng(0)
    rows = sorted({tuple(row) for row in rng.permutation(80 * 80)[:5000, None].tolist()})
    listed = [divmod(row[0], 80) for row in rows]
    texts = [f"{'ab'[i % 2] * (i // 2)} style" for i in range(80)]
    space = PromptSpace({"0_predictor_instruction": texts, "0_predictor_demos": texts}, combinations=listed)
    asked: Counter[tuple[Row, int]] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        row = space.row(params)
        asked[row, example] += 1
        return float((row[0] + row[1]) / 158 > ((example * 7) % N) / N)

    chosen = wide() if sampler == "qei" else sampler
    baseline = space.params(min(listed, key=sum))
    result = search(space, score, n_examples=N, max_calls=400, sampler=chosen, baseline=baseline)
    assert {row for row, _ in asked} <= set(listed)
    assert set(asked.values()) == {1}
    assert sum(space.row(result.best_params)) / 158 > 0.6
    assert result.calls <= 400


@pytest.mark.parametrize("confirm", CONFIRM)
def test_a_space_of_64000_combinations_is_searched(confirm: Any) -> None:
    """40 candidates of each of three predictors: what is found is better than three in four of them."""
    texts = [f"{'ab'[k % 2] * k}" for k in range(1, 41)]
    space = PromptSpace({f"{i}_predictor_instruction": texts for i in range(3)})
    asked: Counter[tuple[Row, int]] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        asked[space.row(params), example] += 1
        return float(sum(params.values()) / 117 > ((example * 7) % N) / N)

    result = search(space, score, n_examples=N, max_calls=500, sampler=wide(), confirm=confirm)
    assert set(asked.values()) == {1}
    assert sum(result.best_params.values()) / 117 > 0.6
    assert 500 - N < result.calls <= 500  # what is left could finish no other


@pytest.mark.parametrize("max_calls", [20, 500])
def test_nothing_is_kept_back_where_it_could_finish_nobody(max_calls: int) -> None:
    """A fifth of 500 calls is less than the 200 of one configuration: all calls explore."""
    space = PromptSpace(
        {f"{i}_predictor_instruction": [f"{'a' * k} style" for k in range(6)] for i in range(3)}
    )
    result = search(
        space,
        lambda p, e: float(sum(p.values()) > e % 15),
        n_examples=200,
        max_calls=max_calls,
        sampler=qEISampler(embedder=letters, seed=0),
    )
    assert result.calls == max_calls


@pytest.mark.parametrize(
    "texts", [["", " ", "\n", "\t"], ["same"] * 4, [[], [], [], []]], ids=["blank", "same", "demos"]
)
@pytest.mark.parametrize("embedder", [letters, "index"], ids=["letters", "index"])
def test_arms_without_a_text_of_their_own_are_told_by_their_index(texts: list[Any], embedder: Any) -> None:
    """Four candidates that no embedding tells apart: the one that is right most often wins."""
    space = PromptSpace({"0_predictor_demos": texts})
    sampler = qEISampler(embedder=embedder, seed=0, batch_size=None)

    def score(params: dict[str, int], example: int) -> float:
        return float(example % 4 <= (params["0_predictor_demos"] == 2) * 2)

    result = search(space, score, n_examples=N, max_calls=120, sampler=sampler)
    assert result.best_params == {"0_predictor_demos": 2}
    assert result.best_score > result.baseline_score


# Sizes, by hand.


def made(max_calls: int, num_threads: int = 1, block_size: int | None = 5, **given: Any) -> BatchPlan:
    """A plan for 200 examples, unless another number is given."""
    n_examples, combined = given.pop("n_examples", 200), given.pop("is_combined", False)
    task = Task(n_examples, max_calls, (0,), 3, 0, num_threads, combined)
    return BatchPlan(task, ScoreTable(n_examples), block_size=block_size, **given)


@pytest.mark.parametrize(
    ("block_size", "max_calls", "places"),
    [(5, 10_000, 6), (5, 1630, 6), (5, 600, 3), (5, 300, 2), (5, 10, 2), (1, 300, 8), (40, 1630, 2)],
)
def test_three_batches_make_up_the_calls_in_flight(block_size: int, max_calls: int, places: int) -> None:
    """A third of 96 calls, or of 8 % of the budget where that is less, in blocks; at least two."""
    assert made(max_calls, block_size=block_size).batch_size == places


@pytest.mark.parametrize(
    ("num_threads", "batches"), [(1, 4), (16, 4), (32, 4), (33, 5), (64, 9), (128, 14), (256, 14)]
)
def test_a_large_pool_has_four_calls_in_flight_for_each_thread(num_threads: int, batches: int) -> None:
    """Batches of 30 calls: for 96 up to 32 threads, then 4 for each, but no more than a quarter of 1630."""
    assert made(1630, num_threads, batch_size=6).batches_in_flight == batches


@pytest.mark.parametrize(("max_calls", "batches"), [(1630, 9), (800, 7), (600, 5), (120, 2), (10, 2)])
def test_calls_in_flight_are_no_more_than_a_quarter_of_the_budget(max_calls: int, batches: int) -> None:
    """64 threads and batches of 30 calls; two of them in any case, so that the pool never drains."""
    assert made(max_calls, 64, batch_size=6).batches_in_flight == batches


@pytest.mark.parametrize("max_calls", [100, 300, 1000, 1630, 10_000])
def test_up_to_32_threads_make_no_difference(max_calls: int) -> None:
    """Whatever the budget: as many calls are in flight as with one thread, so the trials are the same."""
    assert len({made(max_calls, n).batches_in_flight for n in (1, 8, 16, 32)}) == 1


@pytest.mark.parametrize(("n_examples", "size", "combined"), [(1, 1, 1), (4, 4, 3), (5, 5, 3), (200, 5, 3)])
def test_a_block_has_five_examples_or_all(n_examples: int, size: int, combined: int) -> None:
    """Three where predictors are combined; it never has more than the validation set."""
    for is_combined, expected in ((False, size), (True, combined)):
        plan = made(1000, block_size=None, n_examples=n_examples, is_combined=is_combined)
        assert plan.arguments == {"block_size": expected}


@pytest.mark.parametrize("block_size", [0, 7])
def test_impossible_block_sizes_are_refused(block_size: int) -> None:
    """The message names both numbers."""
    with pytest.raises(ValueError, match=f"6 validation examples; got {block_size}"):
        made(1000, block_size=block_size, n_examples=6)


@pytest.mark.parametrize(
    ("max_calls", "confirm", "warns"),
    [(N * 4 - 1, True, True), (N * 4, True, False), (N + 1, False, False), (N + 1, "auto", False)],
)
def test_a_budget_that_confirming_takes_most_of_is_warned_of(
    max_calls: int, confirm: Confirm, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Winner and baseline on 40 examples are 80 calls: half of 160."""
    run(max_calls=max_calls, confirm=confirm)
    assert (f"takes up to 80 of max_calls={max_calls}" in caplog.text) == warns
