"""Opens storages and studies: a path, a URL or any Optuna storage; by default in memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, RDBStorage
from optuna.storages import get_storage as as_optuna_does
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial
from tenacity import (
    RetryCallState,
    Retrying,
    retry,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random,
    wait_random_exponential,
)

from mpromptune.errors import InvalidArgumentError, StorageError, StudyMismatchError
from mpromptune.execution.interrupts import deferred
from mpromptune.storage.attributes import FORMAT
from mpromptune.storage.damage import public, readable, reported
from mpromptune.storage.journal import TolerantJournal

logger = logging.getLogger(__name__)

DEFAULT_STUDY_NAME = "mpromptune"
# Increased when older versions would misread new studies.
FORMAT_VERSION = 2

StorageSpec = str | os.PathLike[str] | BaseStorage | None

# NOTE: attempts to open a database. Processes that open an empty one at the same time all create its tables,
# and all but one fail; a second later the tables exist.
_OPENINGS = 3
# NOTE: seconds to wait for a lost connection: a database needs a few to restart, and about 30 to fail over to
# another host.
PATIENCE = 60.0
# NOTE: most seconds between two attempts; short compared with the wait of a takeover (`lease.SILENCE`).
_LONGEST_WAIT = 2.0
# Status codes of gRPC by name, since its package may not be installed. A proxy reports errors of its database
# as UNKNOWN.
_LOST_CODES = {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"}


def open_storage(spec: StorageSpec) -> BaseStorage:
    """Open a storage.

    Args:
        spec: An Optuna storage, a URL (``sqlite:///run.db``), the path of a journal file, or None for a new
            storage in memory.

    Raises:
        InvalidArgumentError: ``spec`` is none of these.
        StorageError: The file or the database cannot be opened.
    """
    check_storage(spec)
    if spec is None:
        return InMemoryStorage()
    if isinstance(spec, BaseStorage):
        return _reconnecting(spec)
    path = os.fspath(spec)
    if "://" not in path:
        return TolerantJournal(path)
    try:
        return _reconnecting(_database(path))
    except Exception as error:  # SQLAlchemy, its drivers and Optuna raise many kinds
        reason = str(error).partition("\n")[0].rstrip(".")  # SQLAlchemy adds an address
        raise StorageError(
            f"The database {public(path)} cannot be opened: {public(reason)}. Check its URL."
        ) from error


def check_storage(spec: object, study_name: object = None) -> None:
    """Require a possible storage and study name.

    Raises:
        InvalidArgumentError: One of them has the wrong type, or the path is empty.
    """
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if spec == "" or not (spec is None or isinstance(spec, str | BaseStorage)):
        raise InvalidArgumentError(
            f"storage must be a path, a URL such as sqlite:///run.db, or an Optuna storage; got {spec!r}."
        )
    if not (study_name is None or isinstance(study_name, str)):
        raise InvalidArgumentError(f"study_name must be a string; got {study_name!r}.")


def open_study(storage: StorageSpec, study_name: str | None = None) -> Study:
    """Open the study of that name (by default `DEFAULT_STUDY_NAME`), or create it.

    Raises:
        InvalidArgumentError: ``storage`` is of an unknown type, or the name is not a string.
        StorageError: The storage cannot be read and written.
        StudyMismatchError: The study was not made by a search, or by one of another format version.
    """
    check_storage(storage, study_name)
    opened = open_storage(storage)
    with reported(), readable(f"The storage {public(storage)}"), _unannounced():
        study = optuna.create_study(
            storage=opened,
            study_name=study_name or DEFAULT_STUDY_NAME,
            direction="maximize",
            load_if_exists=True,
        )
        require_ours(study)
        study.set_user_attr(FORMAT, FORMAT_VERSION)  # this also checks that the storage is writable
    return study


@contextmanager
def _unannounced() -> Iterator[None]:
    """A context in which Optuna does not log in this thread that a study was created or found."""
    optuna.logging.get_verbosity()  # creates the handler, if it is the first call
    handlers, thread = [*logging.getLogger("optuna").handlers], threading.get_ident()

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.thread != thread

    for handler in handlers:
        handler.addFilter(is_news)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_news)


def require_ours(study: Study) -> None:
    """Require a study that is new or was made by a search of this format version.

    Raises:
        StudyMismatchError: It was not.
    """
    name = f"The study {study.study_name!r}"
    advice = "Pass another study_name or storage."
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise StudyMismatchError(f"{name} does not maximise one value, as a search does. {advice}")
    version = study.user_attrs.get(FORMAT)
    if version is None and study.get_trials(deepcopy=False):
        raise StudyMismatchError(f"{name} has trials that were not made by a search. {advice}")
    if version not in (None, FORMAT_VERSION):
        raise StudyMismatchError(
            f"{name} was written by another version of m-promptune, in format {version!r}; this one reads "
            f"format {FORMAT_VERSION}. {advice}"
        )


@retry(stop=stop_after_attempt(_OPENINGS), wait=wait_random(0.2, 1.0), reraise=True)
def _database(url: str) -> RDBStorage:
    # A closed connection is noticed before it is used.
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def _reconnecting(storage: BaseStorage) -> BaseStorage:
    """``storage``, wrapped in a `ReconnectingStorage` if it has a network connection."""
    over_network = isinstance(storage, RDBStorage) and storage.engine.dialect.name != "sqlite"
    if over_network or isinstance(storage, GrpcStorageProxy):
        return cast("BaseStorage", ReconnectingStorage(as_optuna_does(storage)))
    return storage


@BaseStorage.register
class ReconnectingStorage:
    """Calls another storage, and repeats calls whose connection was lost.

    A call that was executed before its answer was lost is not repeated; a general retry cannot know this. It
    works for studies whose trials are created and changed by one process at a time, as those of a search are.

    Args:
        inner: The storage.
        patience: Seconds to wait for a lost connection.
    """

    def __init__(self, inner: BaseStorage, patience: float | None = None) -> None:
        self._inner = inner
        self._patience = PATIENCE if patience is None else patience
        self._created: set[int] = set()
        self._is_down = False  # if true, calls do not wait for a connection until one succeeds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._inner, name)
        return partial(self._persistently, value) if callable(value) else value

    def _persistently(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        attempts = Retrying(
            retry=retry_if_exception(is_lost),
            stop=stop_after_delay(0.0 if self._is_down else self._patience),
            wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT),
            before_sleep=_warn,
            reraise=True,
        )
        name, again = method.__name__, False

        def attempt() -> Any:
            nonlocal again
            if again and (done := self._done(name, (*args, *kwargs.values()))) is not None:
                return done
            again = True
            with deferred():  # an interrupt during a query would make its connection unusable
                return method(*args, **kwargs)

        try:
            value = attempts(attempt)
        except Exception as error:
            if not is_lost(error):
                raise
            self._is_down = True
            raise StorageError(
                f"The connection to the storage was lost and did not come back within {self._patience:g} s: "
                f"{type(error.__cause__ or error).__name__}. Its trials are kept: make the same call again."
            ) from error
        self._is_down = False
        if name == "create_new_trial":
            self._created.add(value)
        return value

    def _done(self, name: str, args: tuple[Any, ...]) -> int | None:
        """The result of an attempt that was executed but whose answer was lost; None if there is none."""
        if name == "set_trial_state_values":
            trial_id, state = args[:2]
            return self._inner.get_trial(trial_id).state == state or None
        if name == "create_new_trial":
            study_id, template = (*args, None)[:2]
            for trial in self._inner.get_all_trials(study_id, deepcopy=False)[-1:]:
                if trial._trial_id not in self._created and _is_like(trial, template):
                    return trial._trial_id
        return None


def is_lost(error: BaseException) -> bool:
    """Whether an error means that the connection failed, rather than the operation."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    code = getattr(error, "code", None)
    # Optuna's second way to read trials raises the last one if the first lost the connection of the session.
    if isinstance(cause, OperationalError | InterfaceError | PendingRollbackError):
        return True
    return callable(code) and getattr(code(), "name", None) in _LOST_CODES


def _is_like(trial: FrozenTrial, template: FrozenTrial | None) -> bool:
    if template is None:
        return not (trial.params or trial.user_attrs or trial.system_attrs)
    return (trial.user_attrs, trial.system_attrs) == (template.user_attrs, template.system_attrs)


def _warn(state: RetryCallState) -> None:
    if state.attempt_number == 1:
        logger.warning("The connection to the storage is lost; waiting for it to come back.")
