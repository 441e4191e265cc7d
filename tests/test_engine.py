"""search(): the loop by itself, on tables of scores."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from embedders import letters
from optuna.trial import TrialState
from tasks import is_spent

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.errors import InvalidArgumentError, MPromptuneError, ScoreError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy, Verdict
from mpromptune.storage.attributes import EXAMPLES, SCORES

N = 40
SPACE = PromptSpace(
    {
        "0_predictor_instruction": [f"{'a' * i} style" for i in range(6)],
        "0_predictor_demos": [[], ["abc"], ["abc", "xyz"]],
    }
)
_rng = np.random.default_rng(0)
SKILL = {row: 0.3 + 0.08 * row[0] + 0.05 * row[1] for row in map(tuple, SPACE.rows().tolist())}
TABLE = {row: (_rng.random(N) < skill).astype(float) for row, skill in SKILL.items()}


class Scores:
    """The table as a score function that counts what it is asked."""

    def __init__(self, delay: float = 0.0) -> None:
        self.asked: Counter[tuple[tuple[int, ...], int]] = Counter()
        self._delay = delay
        self._lock = threading.Lock()

    def __call__(self, params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        with self._lock:
            self.asked[row, example] += 1
        if self._delay:
            time.sleep(self._delay * np.random.default_rng([*row, example]).random())
        return float(TABLE[row][example])


def run(score: Any = None, **kwargs: Any) -> SearchResult:
    arguments = {
        "n_examples": N,
        "max_calls": 300,
        "sampler": qEISampler(embedder=letters, seed=0, batch_size=4, n_batches=4),
        "num_threads": 4,
        "block_size": 5,
        "seed": 0,
        **kwargs,
    }
    return search(SPACE, score or Scores(), **arguments)


def trials_of(result: SearchResult) -> list[tuple]:
    return [(t.number, t.params, t.value, t.user_attrs[EXAMPLES]) for t in result.study.trials]


def test_the_budget_is_spent_as_far_as_it_can_matter_and_no_pair_twice() -> None:
    """The ledger equals what the score function itself counted."""
    scores = Scores()
    result = run(scores)
    assert result.calls == sum(scores.asked.values())
    assert is_spent(result, 300)
    assert max(scores.asked.values()) == 1


def test_winner_and_baseline_are_measured_on_every_example() -> None:
    """Scores are exact means over the validation set, comparable with any other run."""
    result = run(baseline={"0_predictor_demos": 1, "0_predictor_instruction": 2}, confirm=True)
    assert result.best_score == TABLE[SPACE.row(result.best_params)].mean()
    assert result.baseline_score == TABLE[2, 1].mean()
    assert result.best_score >= result.baseline_score


def test_a_baseline_that_nothing_beats_is_returned() -> None:
    """Never worse than what the user came with."""
    best = max(TABLE, key=lambda row: TABLE[row].mean())
    result = run(lambda params, e: float(SPACE.row(params) == best), baseline=SPACE.params(best))
    assert SPACE.row(result.best_params) == best


@pytest.mark.parametrize("confirm", [True, False, "auto"])
@pytest.mark.parametrize(("sampler", "worth"), [("random", 0.0), ("tpe", 1.0), ("qei", 1.0), ("qei", 0.0)])
def test_of_equal_scores_the_baselines_wins(sampler: str, worth: float, confirm: Any) -> None:
    """Wherever it is in the space, and whether or not both were measured in full."""
    given = {"sampler": qEISampler(embedder=letters, seed=0) if sampler == "qei" else sampler}
    baseline = dict.fromkeys(SPACE.names, 1)
    given |= {"max_calls": 2 * N + 20, "baseline": baseline, "confirm": confirm}
    result = run(lambda params, example: worth, **given)
    assert (result.best_params, result.best_score) == (baseline, worth)
    assert len(result.configurations) > 1


@pytest.mark.parametrize("sampler", ["qei", "QEI", "tpe", "gp", "random", optuna.samplers.QMCSampler(seed=0)])
def test_every_sampler_spends_the_same_budget(sampler: Any) -> None:
    """By name in any case, or an object; what is left over could finish no configuration."""
    scores = Scores()
    result = run(scores, sampler=sampler, max_calls=160)
    assert 150 <= result.calls == sum(scores.asked.values()) <= 160
    assert max(scores.asked.values()) == 1


@pytest.mark.parametrize("name", ["grid", "brute force"])
def test_exhaustive_samplers_run_until_the_search_ends(name: str) -> None:
    """Optuna's would stop their study, or choke on a baseline that they did not propose."""
    grid = {name: list(range(size)) for name, size in zip(SPACE.names, SPACE.sizes, strict=True)}
    exhaustive = {
        "grid": optuna.samplers.GridSampler(grid, seed=0),
        "brute force": optuna.samplers.BruteForceSampler(seed=0),
    }
    scores = Scores()
    result = run(scores, sampler=exhaustive[name], max_calls=10**6)
    assert result.calls == len(scores.asked) == SPACE.size * N
    assert len({tuple(t.params.values()) for t in result.study.trials[1:18]}) >= 15


def test_the_same_seed_gives_the_same_trials_whatever_the_threads() -> None:
    """1 thread, and 32 threads with shuffled latencies."""
    serial = run(Scores(), num_threads=1, batch_size=4)
    threaded = run(Scores(delay=0.01), num_threads=32, batch_size=4)
    assert trials_of(serial) == trials_of(threaded)
    assert serial.best_params == threaded.best_params


@pytest.mark.parametrize(("confirm", "max_calls"), [(True, 300), ("auto", 300), (False, 60)])
def test_the_winner_has_its_score_or_an_estimate_with_an_interval(confirm: Any, max_calls: int) -> None:
    """Measured on all examples, the interval has no width; otherwise the score is foreseen within it."""
    result = run(confirm=confirm, max_calls=max_calls)
    winner = next(m for m in result.configurations if m.params == result.best_params)
    low, high = result.best_interval
    assert winner.fully == (max_calls == 300)
    if winner.fully:
        assert low == high == result.best_score == TABLE[SPACE.row(winner.params)].mean()
    else:
        assert 0.0 <= low < result.best_score < high <= 1.0


def test_a_result_has_the_candidates_and_how_they_compare() -> None:
    """Their texts, their squared distances by component, the baseline, and configurations drawn at random."""
    result = run()
    assert result.space is SPACE
    assert result.baseline_params == SPACE.params(SPACE.first())
    for name, texts in SPACE.components.items():
        distances = result.distances[name]
        assert distances.shape == (len(texts), len(texts))
        assert (distances == distances.T).all()
        assert not distances.diagonal().any()
        assert distances[~np.eye(len(texts), dtype=bool)].min() > 0
    assert result.drawn.shape == (SPACE.size, 2)
    assert 0.0 <= result.text_chance <= 1.0


def test_an_exhausted_space_ends_the_search() -> None:
    """Every pair measured once, then a clean stop below the budget."""
    scores = Scores()
    result = run(scores, max_calls=10**6)
    assert result.calls == len(scores.asked) == SPACE.size * N
    assert all(measured.fully for measured in result.configurations)
    assert result.best_params == result.configurations[0].params


def test_only_listed_combinations_are_measured() -> None:
    """For foreign samplers too, which know nothing of combinations."""
    rows = [(0, 0), (1, 1), (2, 2), (3, 0), (5, 2)]
    space = PromptSpace(SPACE.components, combinations=rows)
    for sampler in ("tpe", "gp", "random", qEISampler(embedder=letters, seed=0)):
        asked = set()

        def score(params: dict[str, int], example: int, asked: set = asked) -> float:
            asked.add(space.row(params))
            return float(TABLE[space.row(params)][example])

        search(space, score, n_examples=N, max_calls=150, sampler=sampler, block_size=5, seed=1)
        assert asked <= set(rows)


def test_rounds_share_a_block() -> None:
    """Configurations that are asked for before anything was told are compared on the same examples."""
    trials = run().study.trials
    assert len({tuple(t.user_attrs[EXAMPLES]) for t in trials[:4]}) == 1
    first = {SPACE.row(t.params): tuple(t.user_attrs[EXAMPLES]) for t in reversed(trials[:8])}
    assert len(set(first.values())) == 1


def test_with_qei_the_baseline_comes_first_and_then_what_tells_most() -> None:
    """All of the baseline; then, in a trial of a new configuration, examples that divide those before it."""
    trials = run(Scores(), num_threads=1, confirm=True).study.trials
    assert sorted(trials[0].user_attrs[EXAMPLES]) == list(range(N))
    new = next(t for t in trials[16:] if all(t.params != earlier.params for earlier in trials[: t.number]))
    told = trials[: new.number - 8]  # what batches in flight may lack

    def is_divided(example: int) -> bool:
        scores = [
            t.user_attrs[SCORES][t.user_attrs[EXAMPLES].index(example)]
            for t in told
            if example in t.user_attrs[EXAMPLES]
        ]
        return len(set(scores)) > 1

    assert np.mean([is_divided(e) for e in new.user_attrs[EXAMPLES]]) > np.mean(
        [is_divided(e) for e in range(N)]
    )


def test_trials_hold_scores_per_example() -> None:
    """The study alone tells what was measured."""
    for trial in run().study.trials:
        expected = TABLE[SPACE.row(trial.params)][trial.user_attrs[EXAMPLES]]
        assert trial.user_attrs[SCORES] == expected.tolist()
        assert trial.value == pytest.approx(expected.mean())


def test_without_confirmation_every_call_explores() -> None:
    """confirm=False allows budgets below two full evaluations."""
    result = run(max_calls=60, confirm=False)
    assert result.calls == 60
    assert result.best_params == result.configurations[0].params


def test_a_flaky_network_costs_waiting_not_trials() -> None:
    """Every third call times out once; all trials complete and nothing counts as a score of 0."""
    scores, failed = Scores(), set()

    def flaky(params: dict[str, int], example: int) -> float:
        key = (SPACE.row(params), example)
        if example % 3 == 0 and key not in failed:
            failed.add(key)
            raise TimeoutError("slow")
        return scores(params, example)

    result = run(flaky, retry=RetryPolicy(max_wait=0.001))
    assert failed
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    assert trials_of(result) == trials_of(run())


@pytest.mark.parametrize("max_calls", [300, 10**6])
def test_an_example_that_failed_for_a_while_is_asked_again(max_calls: int) -> None:
    """Two configurations fail on it, and it is left out; the finalist is answered, and in the end all are."""
    failed: list[tuple[int, ...]] = []

    def score(params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        if example == 22 and len(failed) < 2 and row not in failed:
            failed.append(row)
            raise TimeoutError("slow")
        return float(TABLE[row][example])

    result = run(score, retry=RetryPolicy(attempts=1), num_threads=1, confirm=True, max_calls=max_calls)
    assert len(set(failed)) == 2
    whole = [m for m in result.configurations if m.fully]
    assert {SPACE.row(m.params) for m in whole} >= {(0, 0), SPACE.row(result.best_params)}
    best = next(m for m in whole if m.params == result.best_params)
    assert len(best.scores) == N
    assert max_calls == 300 or all(len(m.scores) == N for m in whole)


@pytest.mark.parametrize("bad", [{7}, {1, 2, 3, 4, 5}])
@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_a_search_goes_on_without_examples_that_nobody_can_be_measured_on(
    sampler: str, bad: set[int], tmp_path: Path
) -> None:
    """They count for nobody: winner and baseline are whole without them, and nothing is left to resume."""
    scores = Scores()

    def score(params: dict[str, int], example: int) -> float:
        if example in bad:
            raise TimeoutError("slow")
        return scores(params, example)

    given = {"retry": RetryPolicy(attempts=1), "storage": tmp_path / "study.log", "study_name": "bad"}
    given["confirm"] = True
    result = run(score, sampler=sampler, **given)
    whole = [m for m in result.configurations if m.fully]
    assert {SPACE.row(m.params) for m in whole} >= {(0, 0), SPACE.row(result.best_params)}
    assert all(set(m.scores) == set(range(N)) - bad for m in whole)
    assert result.calls == sum(scores.asked.values())
    again = run(score, sampler=sampler, **given)
    assert (again.best_params, again.calls) == (result.best_params, result.calls)
    assert sum(scores.asked.values()) == result.calls


def test_examples_that_no_program_can_answer_are_no_outage() -> None:
    """The metric raises on the last twelve, at which finalists end: both of them score nothing there."""

    def score(params: dict[str, int], example: int) -> float:
        if example >= N - 12:
            raise ValueError("no label")
        return float(TABLE[SPACE.row(params)][example])

    for seed in range(2):
        result = run(score, sampler="random", num_threads=1, seed=seed, confirm=True)
        assert result.best_score <= (N - 12) / N


def test_a_configuration_that_keeps_failing_is_dropped() -> None:
    """One example of one configuration is never answered: the search goes on without it."""
    broken = max(SKILL, key=SKILL.get)

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == broken and example % 5 == 0:
            raise ConnectionError("down")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, retry=RetryPolicy(attempts=1))
    assert SPACE.row(result.best_params) != broken
    assert is_spent(result, 300, apart_from=SPACE.params(broken))


def test_a_baseline_that_is_never_answered_stops_the_search() -> None:
    """Without the baseline there is nothing to compare with."""

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0):
            raise ConnectionError("down")
        return float(TABLE[SPACE.row(params)][example])

    with pytest.raises(SearchStoppedError, match="baseline"):
        run(score, retry=RetryPolicy(attempts=1))


@pytest.mark.parametrize("lost", [{3}, set(range(0, N, 4))])
def test_a_baseline_that_lacks_examples_is_compared_on_the_others(
    lost: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing paid for is thrown away: the winner is fully measured, and not worse on what both have."""

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0) and example in lost:
            raise ConnectionError("filtered")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, retry=RetryPolicy(attempts=1), confirm=True)
    scores = {SPACE.row(m.params): m.scores for m in result.configurations}
    assert scores[0, 0].keys() == set(range(N)) - lost
    assert len(scores[SPACE.row(result.best_params)]) == N
    shared = sorted(scores[0, 0])
    assert TABLE[SPACE.row(result.best_params)][shared].mean() > TABLE[0, 0][shared].mean()
    assert "(0, 0) failed again on validation examples" in caplog.text


@pytest.mark.parametrize("schedule", ["blocks", "mipro"])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_pairs_that_are_never_answered_cost_nobody_the_victory(seed: int, schedule: str) -> None:
    """Everybody lacks one or two of 40, others than the rest do: the best is returned all the same."""
    rng = np.random.default_rng(seed)
    lost = {row: set(rng.choice(N, 1 + i % 2, replace=False).tolist()) for i, row in enumerate(SKILL)}
    asked: Counter[tuple[tuple[int, ...], int]] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        asked[row, example] += 1
        if example in lost[row]:
            raise TimeoutError("slow")
        return float(TABLE[row][example])

    given = {"schedule": schedule, "seed": seed, "retry": RetryPolicy(attempts=1)}
    sizes = {"block_size": None, "minibatch_size": 10}
    result = run(score, max_calls=400, **sizes, **given)
    assert result.best_score > result.baseline_score + 0.2
    best = next(m for m in result.configurations if m.params == result.best_params)
    assert best.fully
    assert set(range(N)) - lost[SPACE.row(best.params)] == best.scores.keys()
    if schedule == "blocks":
        assert max(asked[pair] for pair in asked if pair[1] in lost[pair[0]]) == 2
        assert max(asked[pair] for pair in asked if pair[1] not in lost[pair[0]]) == 1


@pytest.mark.parametrize("num_threads", [1, 64])
def test_one_bad_example_does_not_stop_the_others(num_threads: int) -> None:
    """Every first trial fails on it, and in the end several configurations lack nothing else."""

    def score(params: dict[str, int], example: int) -> float:
        if example == 5 and SPACE.row(params) != (0, 0):
            raise ConnectionError("filtered")
        return float(TABLE[SPACE.row(params)][example])

    given = {"retry": RetryPolicy(attempts=1), "block_size": N, "max_calls": 200, "num_threads": num_threads}
    given["confirm"] = True
    result = run(score, **given)
    whole = [SPACE.row(m.params) for m in result.configurations if m.fully]
    best = max(whole, key=lambda row: np.delete(TABLE[row], 5).mean())
    assert len(whole) > 1
    assert result.best_params == SPACE.params(best)

    def halt(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 3:
            raise RuntimeError("halt")

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(SearchStoppedError, match="halt"):
        run(score, **given, storage=storage, callbacks=[halt])
    assert run(score, **given, storage=storage).best_params == result.best_params


def test_an_outage_in_the_last_small_rounds_is_noticed() -> None:
    """Rounds of one short trial, and the network gone: the search ends all the same."""

    def score(params: dict[str, int], example: int) -> float:
        score.calls += 1
        if score.calls > 88:
            raise ConnectionError("gone")
        return float(TABLE[SPACE.row(params)][example])

    score.calls = 0
    with pytest.raises(SearchStoppedError):
        run(score, retry=RetryPolicy(attempts=1), max_calls=100, num_threads=1, batch_size=1)
    assert score.calls < 300


def test_an_outage_is_not_read_as_bad_prompts() -> None:
    """From call 100 on the network is gone: the search stops, no zero is recorded."""
    scores = Scores()

    def score(params: dict[str, int], example: int) -> float:
        if sum(scores.asked.values()) >= 100:
            raise ConnectionError("gone")
        return scores(params, example)

    with pytest.raises(SearchStoppedError, match="gone") as caught:
        run(score, retry=RetryPolicy(attempts=1))
    for trial in caught.value.study.trials:
        expected = TABLE[SPACE.row(trial.params)][trial.user_attrs.get(EXAMPLES, [])]
        assert trial.user_attrs.get(SCORES, []) == expected.tolist()


def test_an_example_that_never_answers_fails_its_trial_and_returns_the_budget() -> None:
    """FAIL, not 0.0; what was measured of the trial is kept and not paid again."""
    scores = Scores()
    broken = {((1, 1), 3), ((4, 2), 7)}

    def score(params: dict[str, int], example: int) -> float:
        if (SPACE.row(params), example) in broken:
            raise ConnectionError("down")
        return scores(params, example)

    result = run(score, retry=RetryPolicy(attempts=2, max_wait=0.001))
    assert result.calls == sum(scores.asked.values())
    assert max(scores.asked.values()) == 1
    failed = [t for t in result.study.trials if t.state == TrialState.FAIL]
    assert all((SPACE.row(t.params), e) not in broken for t in failed for e in t.user_attrs[EXAMPLES])


def test_a_candidates_own_error_scores_failure_score() -> None:
    """An exception of the program is a result, with the score that the user chose."""

    def score(params: dict[str, int], example: int) -> float:
        if params["0_predictor_instruction"] == 0:
            raise ValueError("cannot parse")
        return float(TABLE[SPACE.row(params)][example])

    baseline = {"0_predictor_instruction": 0, "0_predictor_demos": 0}
    result = run(score, failure_score=-1.0, baseline=baseline, confirm=True)
    assert result.baseline_score == -1.0
    assert is_spent(result, 300)


def test_a_metric_that_raises_on_some_examples_loses_nothing_else() -> None:
    """Every seventh example is beyond the metric: it counts failure_score for all, the rest as it is."""
    scores = Scores()

    def score(params: dict[str, int], example: int) -> float:
        value = scores(params, example)
        if example % 7 == 0:
            raise ZeroDivisionError("no reference answer")
        return value

    result = run(score, failure_score=0.25)
    assert result.calls == sum(scores.asked.values())
    assert is_spent(result, 300)
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}
    for measured in result.configurations:
        expected = {e: 0.25 if e % 7 == 0 else TABLE[SPACE.row(measured.params)][e] for e in measured.scores}
        assert measured.scores == expected


@pytest.mark.parametrize("bad", [None, "0.5", float("nan"), {"score": 1}])
def test_a_metric_without_a_number_stops_the_search(bad: Any) -> None:
    """The error names the value; nothing is recorded as a score."""
    with pytest.raises(ScoreError, match="The metric returned") as caught:
        run(lambda params, example: bad)
    assert isinstance(caught.value, SearchStoppedError)
    assert all(t.state == TrialState.FAIL for t in caught.value.study.trials)


def test_a_fatal_error_stops_and_keeps_what_was_measured() -> None:
    """Authentication fails at call 100: no call starts afterwards, the study keeps the rest."""
    scores = Scores()

    def score(params: dict[str, int], example: int) -> float:
        if sum(scores.asked.values()) >= 100:
            raise PermissionError("bad key")
        return scores(params, example)

    def verdict(error: BaseException) -> Verdict:
        return Verdict.STOP if isinstance(error, PermissionError) else Verdict.CANDIDATE

    with pytest.raises(SearchStoppedError, match="bad key") as caught:
        run(score, classify=verdict, num_threads=1)
    trials = caught.value.study.trials
    kept = sum(len(t.user_attrs.get(SCORES, ())) for t in trials)
    assert kept == 100
    assert all(t.state.is_finished() for t in trials)


def test_when_everything_fails_the_search_stops() -> None:
    """A round in which no call succeeds is an outage, not a set of bad prompts."""

    def down(params: dict[str, int], example: int) -> float:
        raise ValueError("whatever it is")

    with pytest.raises(SearchStoppedError, match=f"failures of all {5 + 4 * 5} calls of a batch"):
        run(down)


def test_callbacks_come_in_order_and_progress_counts_every_call() -> None:
    """One callback per trial, from the coordinator."""
    numbers: list[int] = []
    calls: list[int] = []
    result = run(
        callbacks=[lambda study, trial: numbers.append(trial.number)],
        on_progress=lambda progress: calls.append(progress.calls),
    )
    assert numbers == sorted(numbers)
    assert calls == sorted(calls)
    assert calls[-1] == result.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_calls": 79, "confirm": True}, "80 calls that measuring the winner"),
        ({"block_size": 41}, "block_size must be between 1 and the 40"),
        ({"sampler": "tpee"}, "sampler must be one of"),
        ({"baseline": {"0_predictor_instruction": 0}}, "lack"),
    ],
)
def test_bad_input_is_refused_before_any_call(arguments: dict, message: str) -> None:
    """Nothing is spent on arguments that cannot work."""
    scores = Scores()
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        run(scores, **arguments)
    assert isinstance(caught.value, MPromptuneError)
    assert not scores.asked


@pytest.mark.parametrize("max_calls", [80, 81, 95])
def test_the_smallest_budgets_measure_baseline_and_one_rival(max_calls: int) -> None:
    """Twice the validation set: the baseline, and one configuration to compare with it."""
    result = run(max_calls=max_calls, confirm=True)
    assert sum(m.fully for m in result.configurations) >= 1
    assert 80 <= result.calls <= max_calls


def test_one_configuration_is_measured_and_returned() -> None:
    """Nothing to search: the baseline is the winner."""
    space = PromptSpace({"a": ["only"]})
    result = search(space, lambda params, e: float(e % 2), n_examples=10, max_calls=50)
    assert (result.best_score, result.calls) == (0.5, 10)


def test_an_error_of_a_callback_stops_cleanly() -> None:
    """The first error is the one reported; nothing stays RUNNING; all scores are kept."""

    def callback(study: optuna.Study, trial: Any) -> None:
        if trial.number == 2:
            raise RuntimeError("mine")

    with pytest.raises(SearchStoppedError, match="mine") as caught:
        run(callbacks=[callback])
    trials = caught.value.study.trials
    assert all(t.state.is_finished() for t in trials)
    assert sum(len(t.user_attrs[SCORES]) for t in trials[:3]) == 5 + 2 * 5


def test_an_error_of_the_sampler_loses_no_score() -> None:
    """The sampler fails in the middle of a batch: what had started is kept, nothing stays open."""

    class Failing(optuna.samplers.RandomSampler):
        asked = 0

        def sample_independent(self, *args: Any) -> Any:
            type(self).asked += 1
            if type(self).asked > 12:
                raise RuntimeError("no proposal")
            return super().sample_independent(*args)

    scores = Scores()
    with pytest.raises(SearchStoppedError, match="no proposal") as caught:
        run(scores, sampler=Failing(seed=0), batch_size=4)
    trials = caught.value.study.trials
    assert all(t.state.is_finished() for t in trials)
    kept = sum(len(t.user_attrs.get(SCORES, ())) for t in trials)
    assert kept == sum(scores.asked.values())


def test_one_sampler_object_serves_several_searches() -> None:
    """A second search, over another space, equals one with a fresh sampler."""
    other = PromptSpace({"style": [f"{'b' * i} style" for i in range(8)]})

    def score(params: dict[str, int], example: int) -> float:
        return float(params["style"] > example % 8)

    def second(sampler: qEISampler) -> SearchResult:
        return search(other, score, n_examples=16, max_calls=80, sampler=sampler, block_size=4)

    used = qEISampler(embedder=letters, seed=0)
    run(sampler=used, max_calls=100)
    assert trials_of(second(used)) == trials_of(second(qEISampler(embedder=letters, seed=0)))


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"n_examples": 0},
        {"num_threads": 0},
        {"max_calls": 0},
        {"max_calls": 100.5},
        {"block_size": 0},
        {"block_size": 2.5},
    ],
)
def test_counts_must_be_positive(bad: dict) -> None:
    """The message names argument and value."""
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        run(**bad)


def test_numpy_booleans_are_scores() -> None:
    """A metric may compare arrays."""
    result = run(lambda params, e: TABLE[SPACE.row(params)][e] > 0.5)
    assert trials_of(result) == trials_of(run())


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_another_default_device_does_not_matter(sampler: str) -> None:
    """The surrogate lives on the CPU, whatever the caller's default device is."""
    import torch

    given = {} if sampler == "qei" else {"sampler": sampler}
    with torch.device("meta"):
        result = run(max_calls=100, **given)
    assert result.calls == 100


def test_a_lost_call_costs_its_own_score_only() -> None:
    """The baseline is scored on all but one example, fails on that, and is believed by all the others."""
    lost = iter([True])

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0) and example == 0 and next(lost, False):
            raise ConnectionError("gone")
        return TABLE[SPACE.row(params)][example]

    result = run(score, retry=RetryPolicy(attempts=1), confirm=True)
    found = next(m for m in result.configurations if SPACE.row(m.params) == (0, 0))
    assert len(found.scores) == N
    assert found.posterior_mean == pytest.approx(TABLE[0, 0].mean(), abs=0.1)


def test_the_best_rival_of_a_leading_baseline_is_fully_measured() -> None:
    """The baseline is measured in any case: what is kept back for a winner goes to its best rival."""
    best = {"0_predictor_instruction": 5, "0_predictor_demos": 2}

    def score(params: dict[str, int], example: int) -> float:
        return float(params == best)

    result = run(score, baseline=best, max_calls=2 * N + 20, confirm=True)
    assert result.best_params == best
    assert result.calls == 2 * N + 20
    assert sum(measured.fully for measured in result.configurations) == 2


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_a_space_too_large_to_list_is_searched_to_the_end(sampler: str) -> None:
    """Of 40^3 combinations what was measured may be measured again, and no trial is empty."""
    names = [f"{i}_predictor_instruction" for i in range(3)]
    space = PromptSpace({name: [f"{'ab'[k % 2] * k}" for k in range(1, 41)] for name in names})

    def score(params: dict[str, int], example: int) -> float:
        return sum(params.values()) / 117 + 0.3 * (example % 3 - 1)

    chosen = qEISampler(embedder=letters, seed=0, max_space_size=50) if sampler == "qei" else sampler
    result = search(space, score, n_examples=N, max_calls=250, sampler=chosen, block_size=5)
    assert result.calls <= 250
    assert all(t.user_attrs[EXAMPLES] for t in result.study.trials if t.state == TrialState.COMPLETE)
    assert result.best_score > result.baseline_score


def test_large_pools_have_the_same_trials_under_any_timing() -> None:
    """With 64 threads and more batches in flight the order of arrival decides nothing."""
    runs = [run(Scores(delay), num_threads=64) for delay in (0.0, 0.002)]
    assert trials_of(runs[0]) == trials_of(runs[1])


@pytest.mark.parametrize("max_calls", [2 * N, 3 * N])
def test_large_pools_confirm_a_winner_from_the_smallest_budget_on(max_calls: int) -> None:
    """With calls for winner and baseline alone, what little is left over is less than half a round."""
    baseline = {"0_predictor_instruction": 0, "0_predictor_demos": 0}
    result = run(
        lambda params, e: float(params != baseline), num_threads=64, max_calls=max_calls, confirm=True
    )
    assert result.best_score == 1.0
    assert max_calls - 4 * 5 // 2 <= result.calls <= max_calls


def test_the_smallest_budget_is_enough_where_half_a_round_is_more_than_a_configuration() -> None:
    """Rounds of 25 blocks, in a pool of 128 threads: the baseline and one rival are measured all the same."""
    result = run(num_threads=128, max_calls=2 * N, confirm=True)
    assert result.calls == 2 * N


@pytest.mark.parametrize("max_calls", [1, 3, 15, 31, 35])
def test_without_confirmation_small_budgets_are_kept_too(max_calls: int) -> None:
    """The baseline's first block is cut like any other."""
    scores = Scores()
    result = run(scores, confirm=False, max_calls=max_calls, block_size=10)
    assert result.calls == sum(scores.asked.values()) == max_calls


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e-9, 1e9])
def test_equal_scores_are_no_obstacle(value: float) -> None:
    """Means over blocks of unequal size differ in the last bit; that is not a spread."""
    space = PromptSpace({"0_predictor_instruction": ["a" * i for i in range(1, 9)]})
    sampler = qEISampler(embedder=letters, seed=0)
    result = search(space, lambda params, e: value, n_examples=47, max_calls=250, sampler=sampler)
    assert result.best_score == pytest.approx(value)
