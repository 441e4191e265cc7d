"""Lost connections: waited for, nothing done twice, and an end with a plain error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import optuna
import postgres
import pytest
from killed import SPACE, Scores, run
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError

from mpromptune import SearchResult
from mpromptune.errors import SearchStoppedError, StorageError
from mpromptune.storage import storage
from mpromptune.storage.attributes import SCORES
from mpromptune.storage.storage import ReconnectingStorage, is_lost, open_study


def lost() -> StorageInternalError:
    """As Optuna raises it."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("UPDATE", {}, Exception("server closed the connection"))
    return error


class Shaky(InMemoryStorage):
    """Loses the connection when it is told to: before something is done, or before it has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.after = 0
        self.attempts = 0

    def _shaken(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.attempts += 1
        if self.before:
            self.before -= 1
            raise lost()
        done = do(*args, **kwargs)
        if self.after:
            self.after -= 1
            raise lost()
        return done

    def create_new_trial(self, *args: Any, **kwargs: Any) -> int:
        return self._shaken(super().create_new_trial, *args, **kwargs)

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        return self._shaken(super().set_trial_state_values, *args, **kwargs)

    def set_trial_user_attr(self, *args: Any, **kwargs: Any) -> None:
        self._shaken(super().set_trial_user_attr, *args, **kwargs)


def made(patience: float = 60.0) -> tuple[Shaky, optuna.Study]:
    shaky = Shaky()
    return shaky, optuna.create_study(storage=ReconnectingStorage(shaky, patience), direction="maximize")


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 1), (1, 1)])
def test_nothing_is_done_twice(before: int, after: int) -> None:
    """A trial is created, told and noted once, whether the question or the answer was lost."""
    shaky, study = made()
    for shake in ("create", "note", "tell"):
        shaky.before, shaky.after = before, after
        if shake == "create":
            trial = study.ask()
        elif shake == "note":
            trial.set_user_attr("a", 1)
        else:
            study.tell(trial, 0.5)
    (told,) = study.trials
    assert (told.state, told.value, told.user_attrs) == (TrialState.COMPLETE, 0.5, {"a": 1})
    assert shaky.before == shaky.after == 0


@pytest.mark.parametrize("after", [0, 1])
def test_enqueued_trials_are_taken_once(after: int) -> None:
    """The trial that runs is the one that waited."""
    shaky, study = made()
    study.enqueue_trial({"x": 3})
    shaky.before, shaky.after = 1, after
    assert study.ask().suggest_int("x", 0, 9) == 3
    assert len(study.trials) == 1


def test_trials_of_others_are_not_taken_for_ones_own() -> None:
    """Two trials that are alike are two, if both were answered for."""
    shaky, study = made()
    first = study.ask()
    shaky.before = 1
    assert study.ask().number == first.number + 1


def test_a_connection_that_does_not_come_back_is_a_storage_error() -> None:
    """After that nothing is waited for any more, until something works again."""
    shaky, study = made(patience=0.3)
    trial = study.ask()
    shaky.before = 10**6
    with pytest.raises(StorageError, match="did not come back within 0.3 s: OperationalError"):
        trial.set_user_attr("a", 1)
    attempts = shaky.attempts
    with pytest.raises(StorageError):
        trial.set_user_attr("a", 1)
    assert shaky.attempts == attempts + 1
    shaky.before = 0
    trial.set_user_attr("a", 1)
    assert study.trials[0].user_attrs == {"a": 1}


def test_what_the_storage_refuses_is_not_asked_again() -> None:
    """An error that is no lost connection is raised as it is, at once."""
    shaky, study = made()
    trial = study.ask()
    study.tell(trial, 1.0)
    attempts = shaky.attempts
    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr("a", 1)
    assert shaky.attempts == attempts + 1


def test_what_is_a_lost_connection() -> None:
    """Errors of a connection, by SQLAlchemy or gRPC; no others."""

    class AnswerError(Exception):
        def __init__(self, name: str) -> None:
            self.name = name

        def code(self) -> Any:
            return self

    assert is_lost(lost())
    assert is_lost(PendingRollbackError())
    assert is_lost(AnswerError("UNAVAILABLE"))
    assert not is_lost(AnswerError("NOT_FOUND"))
    assert not is_lost(IntegrityError("INSERT", {}, Exception()))
    assert not is_lost(ValueError())


class Cutting(Scores):
    """Has the server stop, as in a power cut, in the middle of a search."""

    def __init__(self, server: postgres.Server, at: int, back_after: float | None) -> None:
        super().__init__()
        self._server, self._at, self._back_after = server, at, back_after

    def __call__(self, params: dict[str, int], example: int) -> float:
        score = super().__call__(params, example)
        if sum(self.asked.values()) == self._at:
            self._server.stop()
            if self._back_after is not None:
                threading.Timer(self._back_after, self._server.start).start()
        return score


def trials_of(result: SearchResult) -> list[tuple]:
    """What trials of two equal searches have in common."""
    return [(t.number, t.params, t.state, t.value, t.user_attrs[SCORES]) for t in result.study.trials]


def test_a_lost_connection_is_waited_for(server: postgres.Server) -> None:
    """A database that is started again costs time, and nothing else."""
    score = Cutting(server, at=60, back_after=0.3)
    result = run(server.url_of("back"), score)
    assert trials_of(result) == trials_of(run(None, Scores()))
    assert result.calls == len(score.asked) == sum(score.asked.values())


def test_a_connection_that_stays_lost_ends_a_search(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plain error; all that was saved is there for the next call."""
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    url, score = server.url_of("lost"), Cutting(server, at=60, back_after=None)
    with pytest.raises(SearchStoppedError, match="connection to the storage was lost"):
        run(url, score)
    server.start()
    kept = {(SPACE.row(t.params), e) for t in open_study(url).trials for e in t.intermediate_values}
    again = Scores()
    assert trials_of(run(url, again)) == trials_of(run(None, Scores()))
    assert not again.asked.keys() & kept
    assert len(score.asked) - len(kept) <= 8  # calls in flight, of four threads
