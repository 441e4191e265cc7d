"""Going on with a search: after kill -9, after an outage, with a larger budget; and what is refused."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from embedders import hashed, letters
from killed import SPACE, TABLE, Logged, N, Pair, Scores, run, search_and_die
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.engine.minibatches import stock_calls
from mpromptune.errors import InvalidArgumentError, MPromptuneError, SearchStoppedError, StudyMismatchError
from mpromptune.execution.attempts import RetryPolicy, Verdict
from mpromptune.execution.usage import Usage, record
from mpromptune.storage.attributes import (
    ABANDONED,
    EXAMPLES,
    FORMAT,
    REFUSED,
    RESUMES,
    SCORES,
    SETTINGS,
    USAGE,
)

MIPRO = {
    "schedule": "mipro",
    "minibatch_size": 8,
    "minibatch_full_eval_steps": 4,
    "block_size": None,
    "max_calls": stock_calls(10, N, True, 8, 4),
}


def trials_of(result: SearchResult) -> list[tuple]:
    return [(t.number, t.params, t.state, t.value, untimed(t.user_attrs)) for t in result.study.trials]


def untimed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock, and without calls that were under way when a run was killed."""
    return {name: value for name, value in attributes.items() if name != USAGE}


def saved(storage: BaseStorage) -> Counter[Pair]:
    """Every (configuration, example) of which a storage has a score."""
    trials = [t for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id)]
    return Counter((SPACE.row(t.params), e) for t in trials for e in t.intermediate_values)


def journal(path: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


class Failing(Scores):
    """Raises once ``good`` calls were answered."""

    def __init__(self, good: int, error: Exception) -> None:
        super().__init__()
        self.good, self.error = good, error

    def __call__(self, params: dict[str, int], example: int) -> float:
        if sum(self.asked.values()) >= self.good:
            raise self.error
        return super().__call__(params, example)


@pytest.fixture(scope="module")
def in_one_go() -> SearchResult:
    return run(None, Scores())


@pytest.mark.parametrize("num_threads", [1, 4])
def test_after_kill_9_a_search_ends_as_if_nothing_had_happened(
    num_threads: int, tmp_path: Path, in_one_go: SearchResult, forks: Any
) -> None:
    """Five processes killed at random: trials and winner as in one go, and no score paid twice."""
    rng = random.Random(num_threads)
    for number, last in enumerate(rng.sample(range(1, in_one_go.calls), 5)):
        path, log = tmp_path / f"{number}.journal", tmp_path / f"{number}.log"
        killed = forks.Process(target=search_and_die, args=(path, log, last, 0.1 * rng.random(), num_threads))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        Path(f"{path}.lock").unlink(missing_ok=True)  # Optuna's own, which would time out by itself
        before, recorded = Logged.read(log, "start"), saved(journal(path))
        result = run(path, Logged(log), num_threads=num_threads)
        assert trials_of(result) == trials_of(in_one_go)
        assert result.configurations == in_one_go.configurations
        assert (result.best_params, result.calls) == (in_one_go.best_params, in_one_go.calls)
        again = Logged.read(log, "start") - before
        assert not recorded & again
        assert recorded + again == Counter(dict.fromkeys(recorded + again, 1))
        assert before & again == before - recorded  # what was in flight, and nothing else, is paid twice
        assert sum((before - recorded).values()) <= num_threads


WIDE = {"num_threads": 64, "block_size": 5, "sampler": qEISampler(embedder=letters, seed=0, batch_size=7)}


@pytest.mark.parametrize(
    "arguments", [{}, {"confirm": True}, MIPRO, WIDE], ids=["blocks", "confirmed", "mipro", "64 threads"]
)
def test_a_search_goes_on_from_any_line_of_its_journal(arguments: dict, tmp_path: Path) -> None:
    """Cut at four random lines: within a proposal, between a score and its trial's end, in the last round."""
    whole = tmp_path / "whole"
    expected = run(whole, Scores(), **arguments)
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in random.Random(0).sample(range(1, len(lines)), 4):
        path = tmp_path / f"{cut}"
        path.write_bytes(b"".join(lines[:cut]))
        recorded, scores = saved(journal(path)), Scores()
        result = run(path, scores, **arguments)
        assert trials_of(result) == trials_of(expected)
        assert result.configurations == expected.configurations
        assert sum(recorded.values()) + sum(scores.asked.values()) == result.calls == expected.calls


@pytest.mark.parametrize("arguments", [{}, MIPRO, {"patience": 1}], ids=["blocks", "mipro", "patience"])
def test_a_finished_search_is_returned_again_without_a_call(arguments: dict, tmp_path: Path) -> None:
    """Nor is a callback called; progress is told what there was."""
    first, scores, told, calls = run(tmp_path / "j", Scores(), **arguments), Scores(), [], []
    again = run(
        tmp_path / "j",
        scores,
        callbacks=[lambda study, trial: told.append(trial)],
        on_progress=lambda progress: calls.append(progress.calls),
        **arguments,
    )
    assert (len(scores.asked), told, calls[-1]) == (0, [], first.calls)
    assert trials_of(again) == trials_of(first)
    assert again.configurations == first.configurations
    assert (again.best_params, again.best_score, again.calls) == (
        first.best_params,
        first.best_score,
        first.calls,
    )


def check_taken_up(result: SearchResult, first: Scores, second: Scores) -> None:
    """Two runs that paid for nothing twice, and lost nothing that was paid for."""
    both = first.asked + second.asked
    assert max(both.values()) == 1
    assert result.calls == sum(both.values())
    abandoned = [t for t in result.study.trials if ABANDONED in t.user_attrs]
    resumed = {t.user_attrs[RESUMES]: t for t in result.study.trials if RESUMES in t.user_attrs}
    assert abandoned
    for trial in abandoned:
        successor = resumed[trial.number]
        assert (successor.params, successor.state) == (trial.params, TrialState.COMPLETE)
        answered = zip(successor.user_attrs[EXAMPLES], successor.user_attrs[SCORES], strict=True)
        assert set(zip(trial.user_attrs[EXAMPLES], trial.user_attrs[SCORES], strict=True)) <= set(answered)


@pytest.mark.parametrize("sampler", [None, "tpe"])
def test_after_an_outage_the_trials_that_it_cut_off_are_taken_up(sampler: str | None, tmp_path: Path) -> None:
    """They are closed, so they go on under new numbers, and only what they lack is measured."""
    given = {} if sampler is None else {"sampler": sampler}
    down = Failing(61, ConnectionError("down"))
    with pytest.raises(SearchStoppedError, match="down"):
        run(tmp_path / "j", down, retry=RetryPolicy(attempts=1), **given)
    scores = Scores()
    result = run(tmp_path / "j", scores, **given)
    check_taken_up(result, down, scores)


def test_databases_are_gone_on_with_too(tmp_path: Path) -> None:
    """SQLite, with scores written from several threads."""
    url, down, scores = f"sqlite:///{tmp_path}/runs.db", Failing(30, ConnectionError("down")), Scores()
    given = {"confirm": False, "max_calls": 50, "study_name": "mine"}
    with pytest.raises(SearchStoppedError, match="down"):
        run(url, down, retry=RetryPolicy(attempts=1), **given)
    check_taken_up(run(url, scores, **given), down, scores)


def test_after_an_interruption_the_trials_that_it_cut_off_are_taken_up(tmp_path: Path) -> None:
    """Twice: what takes up an abandoned trial may be abandoned too."""
    first = Scores()
    for number in (3, 9):

        def interrupt(study: optuna.Study, trial: Any, number: int = number) -> None:
            if trial.number >= number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "j", first, callbacks=[interrupt])
    states = {t.state for t in optuna.load_study(study_name=None, storage=journal(tmp_path / "j")).trials}
    assert states <= {TrialState.COMPLETE, TrialState.FAIL}
    second = Scores()
    result = run(tmp_path / "j", second)
    both = first.asked + second.asked
    assert result.calls == sum(both.values()) == len(both)


def test_optunas_samplers_do_not_begin_their_stream_again(tmp_path: Path) -> None:
    """What a random sampler proposes after going on is not what it proposed at first."""

    def proposals(result: SearchResult) -> list[tuple[int, ...]]:
        return [SPACE.row(t.params) for t in result.study.trials if t.number]

    for sampler in ("random", optuna.samplers.RandomSampler(seed=0)):
        path = tmp_path / type(sampler).__name__
        n = len(proposals(run(path, Scores(), sampler=sampler, confirm=False, max_calls=100)))
        both = proposals(run(path, Scores(), sampler=sampler, confirm=False, max_calls=190))
        assert both[n : 2 * n - 3] != both[: n - 3]


@pytest.mark.parametrize("arguments", [{}, MIPRO], ids=["blocks", "mipro"])
def test_a_larger_budget_goes_on_from_there(arguments: dict, tmp_path: Path) -> None:
    """All that was measured counts, and the two budgets together are not exceeded."""
    first, second = Scores(), Scores()
    small = run(tmp_path / "j", first, **arguments)
    max_calls = arguments.get("max_calls", 160) + 60
    large = run(tmp_path / "j", second, **{**arguments, "max_calls": max_calls})
    assert trials_of(large)[: len(small.study.trials)] == trials_of(small)
    assert large.calls == sum((first.asked + second.asked).values())
    assert small.calls < large.calls <= max_calls
    assert large.best_score >= large.baseline_score
    if not arguments:
        assert max((first.asked + second.asked).values()) == 1


def test_a_trial_that_was_cut_off_in_its_proposal_is_closed_when_it_is_not_needed(tmp_path: Path) -> None:
    """It has no scores to tell, now or to whoever goes on with a larger budget."""
    first = run(tmp_path / "j", Scores())
    first.study.ask()  # what a kill leaves in the middle of a proposal
    again = run(tmp_path / "j", Scores())
    assert (again.best_params, again.calls) == (first.best_params, first.calls)
    assert all(trial.state.is_finished() for trial in again.study.trials)
    larger = run(tmp_path / "j", scores := Scores(), max_calls=220)
    assert first.calls + sum(scores.asked.values()) == larger.calls <= 220


def test_a_trial_that_is_taken_up_keeps_what_was_refused(tmp_path: Path) -> None:
    """A limit ended it after a prompt that was refused: of all that was told, each odd example was."""

    def score(params: dict[str, int], example: int) -> float:
        record(Usage(prompt_tokens=1))
        if example % 2:
            raise ValueError("refused")
        return 1.0

    given = {"num_threads": 1, "classify": lambda error: Verdict.REFUSED}
    first = run(tmp_path / "j", score, max_tokens=23, **given)
    assert any(t.user_attrs.get(ABANDONED) and t.user_attrs.get(REFUSED) for t in first.study.trials)
    for trial in run(tmp_path / "j", score, **given).study.trials:
        odd = {example for example in trial.user_attrs[EXAMPLES] if example % 2}
        assert set(trial.user_attrs.get(REFUSED, ())) == odd


def test_what_the_baseline_lacks_is_counted_once(tmp_path: Path) -> None:
    """Its trial was cut off after three of 40 examples: a budget of 90 holds the rest, and a rival's."""
    given = {"confirm": True, "max_calls": 90, "storage": tmp_path / "j"}
    first, second = Failing(3, ConnectionError("down")), Scores()
    with pytest.raises(SearchStoppedError, match="down"):
        run(score=first, retry=RetryPolicy(attempts=1), **given)
    result = run(score=second, **given)
    assert result.calls == sum((first.asked + second.asked).values()) <= 90


def test_a_smaller_budget_is_kept(tmp_path: Path) -> None:
    """What was measured beyond it counts; the baseline must still be affordable."""
    first = Failing(140, ConnectionError("down"))
    with pytest.raises(SearchStoppedError):
        run(tmp_path / "j", first, max_calls=300, confirm=True, retry=RetryPolicy(attempts=1))
    scores = Scores()
    with pytest.raises(InvalidArgumentError, match="the study has 140 calls"):
        run(tmp_path / "j", scores, max_calls=150, confirm=True)
    assert not scores.asked
    result = run(tmp_path / "j", scores, max_calls=250, confirm=True)
    assert sum((first.asked + scores.asked).values()) == result.calls <= 250
    baseline = next(m for m in result.configurations if m.params == SPACE.params((0, 0)))
    assert baseline.fully


def test_a_baseline_that_failed_too_often_has_another_chance(tmp_path: Path) -> None:
    """The search stopped on it; whoever calls again has mended what was wrong."""
    broken = Scores()

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) == (0, 0):
            raise ConnectionError("filtered")
        return broken(params, example)

    with pytest.raises(SearchStoppedError, match="baseline"):
        run(tmp_path / "j", score, confirm=True, retry=RetryPolicy(attempts=1))
    mended = Scores()
    result = run(tmp_path / "j", mended, confirm=True)
    assert max((broken.asked + mended.asked).values()) == 1
    assert result.baseline_score == TABLE[0, 0].mean()


@pytest.mark.parametrize("changed", [{}, {"target": 0.05}], ids=["same", "target"])
@pytest.mark.parametrize(
    "lost", [{3}, set(range(0, N, 5)), set(range(N - 5))], ids=["one", "a fifth", "most"]
)
def test_what_failed_for_good_is_neither_asked_again_nor_forgotten(
    lost: set[int], changed: dict[str, Any], tmp_path: Path
) -> None:
    """The baseline lacks examples, each of the others one of its own: a finished search has the same end."""
    asked: Counter[Pair] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        asked[row, example] += 1
        if example in lost if row == (0, 0) else example == 3 * row[0] + row[1]:
            raise TimeoutError("slow")
        return float(TABLE[row][example])

    given = {"num_threads": 1, "retry": RetryPolicy(attempts=1)}
    first = run(tmp_path / "j", score, **given)
    assert first.best_params != SPACE.params((0, 0))
    asked.clear()
    again = run(tmp_path / "j", score, **given, **changed)
    assert (again.best_params, again.calls) == (first.best_params, first.calls)
    assert not asked


def test_what_a_candidate_could_not_answer_is_not_asked_again(tmp_path: Path) -> None:
    """It was paid for too: once its trial is told, it counts failure_score for whoever goes on."""
    asked: Counter[Pair] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        asked[SPACE.row(params), example] += 1
        if sum(asked.values()) > 90 and not score.up:
            raise ConnectionError("down")
        if params["0_predictor_instruction"] == 2:
            raise ValueError("cannot parse")
        return float(TABLE[SPACE.row(params)][example])

    score.up = False
    given = {"failure_score": -1.0, "num_threads": 1, "retry": RetryPolicy(attempts=1)}
    with pytest.raises(SearchStoppedError, match="down"):
        run(tmp_path / "j", score, **given)
    asked.clear()
    before = saved(journal(tmp_path / "j"))
    score.up = True
    result = run(tmp_path / "j", score, **given)
    assert not asked & before
    for measured in result.configurations:
        if measured.params["0_predictor_instruction"] == 2:
            assert set(measured.scores.values()) == {-1.0}


def test_what_a_candidate_failed_on_before_a_limit_is_not_asked_again(tmp_path: Path) -> None:
    """Its trial was cut short by the limit, but what came back had been judged."""
    asked: Counter[Pair] = Counter()

    def score(params: dict[str, int], example: int) -> float:
        asked[SPACE.row(params), example] += 1
        record(Usage(prompt_tokens=10))
        if example % 2:
            raise ValueError("cannot parse")
        return 0.5

    for max_tokens in (135, 455, 775):
        run(tmp_path / "j", score, max_tokens=max_tokens, num_threads=1)
    result = run(tmp_path / "j", score)
    assert result.calls == len(asked) == sum(asked.values())


SETTINGS_CHANGED = [
    ({"n_examples": 44}, "n_examples was 40 and now 44"),
    ({"seed": 1}, "seed was 0 and now 1"),
    ({"block_size": 8}, "block_size was 10 and now 8"),
    ({"baseline": SPACE.params((1, 1))}, "baseline was .*0.* and now .*1"),
    (MIPRO, "schedule was 'blocks' and now 'mipro'"),
]


@pytest.mark.parametrize(("changed", "message"), SETTINGS_CHANGED)
def test_other_arguments_are_refused(changed: dict, message: str, tmp_path: Path) -> None:
    """The error names what has changed and how, before any call; the study stays as it was."""
    before, scores = run(tmp_path / "j", Scores()), Scores()
    with pytest.raises(StudyMismatchError, match=message) as caught:
        run(tmp_path / "j", scores, **changed)
    assert isinstance(caught.value, MPromptuneError)
    assert "another study_name" in str(caught.value)
    assert not scores.asked
    assert trials_of(run(tmp_path / "j", scores)) == trials_of(before)


def changed_space(**components: Any) -> PromptSpace:
    return PromptSpace({**SPACE.components, **components})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (changed_space(**{"0_predictor_demos": [[], ["abc"], ["abd"]]}), "texts .* '0_predictor_demos' have"),
        (changed_space(**{"0_predictor_demos": [[], ["abc"]]}), "of '0_predictor_demos' was 3 and now 2"),
        (changed_space(**{"1_predictor_demos": [[], ["abc"]]}), "the components were"),
        (PromptSpace(SPACE.components, combinations=[(0, 0), (1, 1)]), "the combinations that exist have"),
    ],
)
def test_other_candidates_are_refused(space: PromptSpace, message: str) -> None:
    """The error names the component."""
    storage = InMemoryStorage()
    run(storage, Scores())
    with pytest.raises(StudyMismatchError, match=message):
        search(space, Scores(), n_examples=N, max_calls=160, block_size=10, storage=storage)


def test_what_may_change_may_change() -> None:
    """Threads make no other trials; another patience or failure_score is no other search."""
    storage = InMemoryStorage()
    first = run(storage, Scores(), sampler="random", num_threads=50, block_size=10)
    scores = Scores()
    changed = {"patience": 5, "target": 2.0, "failure_score": -1.0, "num_threads": 1}
    again = run(storage, scores, sampler="random", block_size=10, **changed)
    assert not scores.asked
    assert trials_of(again) == trials_of(first)


def test_studies_of_others_are_refused() -> None:
    """One with trials of its own, one that minimises, one in a format of the future."""
    storage = InMemoryStorage()
    own = optuna.create_study(storage=storage, study_name="own", direction="maximize")
    own.add_trial(optuna.trial.create_trial(value=1.0))
    optuna.create_study(storage=storage, study_name="minimised", direction="minimize")
    future = optuna.create_study(storage=storage, study_name="future", direction="maximize")
    future.set_user_attr(FORMAT, 99)
    scores = Scores()
    for name, message in [
        ("own", "trials that were not made by a search"),
        ("minimised", "does not maximise"),
        ("future", "another version of m-promptune, in format 99"),
    ]:
        with pytest.raises(StudyMismatchError, match=message):
            run(storage, scores, study_name=name)
    assert not scores.asked
    assert run(storage, scores, study_name="another").calls == sum(scores.asked.values())


def test_a_study_without_trials_belongs_to_nobody() -> None:
    """A run that ended before its first trial does not stand in the way of other arguments."""
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="mpromptune", direction="maximize")
    study.set_user_attr(SETTINGS, run(None, Scores(), max_calls=80).study.user_attrs[SETTINGS])
    assert run(storage, Scores(), seed=1).calls


def test_another_embedder_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """What was measured holds under any embedder, so nothing is refused; the same one says nothing."""
    storage = InMemoryStorage()
    for embedder, warned in [(letters, False), (letters, False), (hashed, True)]:
        scores = Scores()
        run(storage, scores, sampler=qEISampler(embedder=embedder, seed=0, batch_size=4, n_batches=0))
        assert ("gives other vectors" in caplog.text) == warned


class FullDisk(JournalFileBackend):
    """A journal that can be read, and written to ``room`` times."""

    room = 10**9

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        super().append_logs(logs)


@pytest.mark.parametrize("room", [60, 101, 102, 120])
def test_a_full_disk_stops_the_search_and_loses_nothing(
    room: int, tmp_path: Path, in_one_go: SearchResult
) -> None:
    """The error names the cause; its study is in memory, holds all that was paid, and can be gone on with."""
    backend = FullDisk(str(tmp_path / "j"))
    storage, first = optuna.storages.JournalStorage(backend), Scores()
    backend.room = room
    with pytest.raises(SearchStoppedError, match="No space left on device") as caught:
        run(storage, first)
    study = caught.value.study
    assert isinstance(study, optuna.Study)
    assert saved(study._storage) == first.asked
    assert all(t.state.is_finished() for t in study.trials)
    second = Scores()
    result = run(study._storage, second)
    assert max((first.asked + second.asked).values()) == 1
    assert result.calls == sum((first.asked + second.asked).values())
    backend.room = 10**9  # room is made; only what could not be written is paid again
    third = Scores()
    on_disk = saved(journal(tmp_path / "j"))
    assert trials_of(run(tmp_path / "j", third)) == trials_of(in_one_go)
    assert not third.asked & on_disk


def test_a_storage_that_closed_a_trial_by_itself_loses_no_score() -> None:
    """A heartbeat that stopped fails a trial; what it had measured is taken up."""
    storage, first = InMemoryStorage(), Failing(17, ConnectionError("down"))
    with pytest.raises(SearchStoppedError):
        run(storage, first, retry=RetryPolicy(attempts=1), num_threads=1)
    study = optuna.load_study(study_name=None, storage=storage)
    failed = [t for t in study.trials if t.state == TrialState.FAIL and t.intermediate_values]
    assert failed
    for trial in failed:
        live = storage.get_trial(trial._trial_id)
        live.user_attrs = {EXAMPLES: trial.user_attrs["mpromptune:planned"]}
    second = Scores()
    result = run(storage, second)
    assert result.calls == sum((first.asked + second.asked).values())
    assert max((first.asked + second.asked).values()) == 1


def test_attributes_are_plain_json(tmp_path: Path) -> None:
    """A journal is text that anybody may read, and nothing in it is evaluated."""
    result = run(tmp_path / "j", Scores())
    assert set(result.study.user_attrs) >= {SETTINGS}
    assert b"pickle" not in (tmp_path / "j").read_bytes()
