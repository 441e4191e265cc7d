"""Where studies are kept: a path, a URL, or any Optuna storage; in memory where nothing is given."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages import get_storage as as_optuna_does
from optuna.study import Study, StudyDirection
from tenacity import retry, stop_after_attempt, wait_random

from mpromptune.errors import InvalidArgumentError, StorageError, StudyMismatchError
from mpromptune.storage.attributes import FORMAT
from mpromptune.storage.damage import readable
from mpromptune.storage.journal import TolerantJournal
from mpromptune.storage.reconnecting import ReconnectingStorage

DEFAULT_STUDY_NAME = "mpromptune"
FORMAT_VERSION = 1

StorageSpec = str | os.PathLike[str] | BaseStorage | None

# NOTE: processes that open an empty database at the same time create its tables at the same time, and
# all but one fail; a second later they are there.
_OPENINGS = 3

_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@\s]*@")


def open_storage(spec: StorageSpec) -> BaseStorage:
    """A storage of its own in memory for None, a journal file for a path, Optuna's own for a URL.

    Args:
        spec: An Optuna storage, a URL (``sqlite:///run.db``), a path of a journal file, or None.

    Raises:
        InvalidArgumentError: It is none of these.
        StorageError: The file or the database cannot be opened.
    """
    check_storage(spec)
    if spec is None:
        return InMemoryStorage()
    if isinstance(spec, BaseStorage):
        return _reconnecting(spec) if _is_remote(spec) else spec
    path = os.fspath(spec)
    if "://" in path:
        return _open_database(path)
    return JournalStorage(TolerantJournal(path))


def check_storage(spec: object, study_name: object = None) -> None:
    """Whether these can be a storage and the name of a study at all.

    Raises:
        InvalidArgumentError: They cannot.
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
    """The study of that name, which is created unless it exists; by default, `DEFAULT_STUDY_NAME`.

    Raises:
        InvalidArgumentError: ``storage`` is of no kind that is known, or the name is no string.
        StorageError: It cannot be read and written.
        StudyMismatchError: The study is none of ours.
    """
    check_storage(storage, study_name)
    opened = open_storage(storage)
    with reported(), readable(f"The storage {_public(storage)}"):
        study = optuna.create_study(
            storage=opened,
            study_name=study_name or DEFAULT_STUDY_NAME,
            direction="maximize",
            load_if_exists=True,
        )
        _require_ours(study)
        study.set_user_attr(FORMAT, FORMAT_VERSION)  # and shows that it can be written to
    return study


@contextmanager
def reported() -> Iterator[None]:
    """Errors of any storage as a `StorageError`, as those of `TolerantJournal` already are."""
    try:
        yield
    except StorageError:
        raise
    except (StorageInternalError, OSError) as error:
        # Optuna's message does not say what happened, and SQLAlchemy's holds all that was to be written.
        cause = getattr(error.__cause__, "orig", error)
        raise StorageError(f"The storage cannot be read and written: {_public(cause)}") from error


def _require_ours(study: Study) -> None:
    name = f"The study {study.study_name!r}"
    advice = "Give another study_name or storage."
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise StudyMismatchError(f"{name} does not maximise one value, as a search does. {advice}")
    version = study.user_attrs.get(FORMAT)
    if version is None and study.get_trials(deepcopy=False):
        raise StudyMismatchError(f"{name} has trials that no search has left there. {advice}")
    if version not in (None, FORMAT_VERSION):
        raise StudyMismatchError(
            f"{name} was written by another version of m-promptune, in format {version!r}; this one reads "
            f"format {FORMAT_VERSION}. {advice}"
        )


def _open_database(url: str) -> BaseStorage:
    try:
        storage = _database(url)
        return _reconnecting(storage) if _is_remote(storage) else storage
    except Exception as error:  # any of SQLAlchemy's, of its drivers', of Optuna's
        raise StorageError(f"The database {_public(url)} cannot be opened: {_public(error)}") from error


@retry(stop=stop_after_attempt(_OPENINGS), wait=wait_random(0.2, 1.0), reraise=True)
def _database(url: str) -> RDBStorage:
    # A connection that was closed meanwhile is noticed before it is used.
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def _is_remote(storage: BaseStorage) -> bool:
    """Whether there is a connection that may be lost."""
    if isinstance(storage, RDBStorage):
        return bool(storage.engine.dialect.name != "sqlite")
    return isinstance(storage, GrpcStorageProxy)


def _reconnecting(storage: BaseStorage) -> BaseStorage:
    return ReconnectingStorage(as_optuna_does(storage))


def _public(text: object) -> str:
    """A message without the password that a URL in it may hold."""
    return _PASSWORD.sub(r"\1:***@", str(text))
