"""Where studies are kept: a path, a URL, or any Optuna storage; in memory where nothing is given."""

from __future__ import annotations

import os

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study

DEFAULT_STUDY_NAME = "mpromptune"

StorageSpec = str | os.PathLike[str] | BaseStorage | None


def open_storage(spec: StorageSpec) -> BaseStorage:
    """A storage of its own in memory for None, a journal file for a path, Optuna's own for a URL.

    Args:
        spec: An Optuna storage, a URL (``sqlite:///run.db``), a path of a journal file, or None.
    """
    if spec is None:
        return InMemoryStorage()
    if isinstance(spec, BaseStorage):
        return spec
    path = os.fspath(spec)
    if "://" in path:
        return optuna.storages.get_storage(path)
    return JournalStorage(JournalFileBackend(path))


def open_study(storage: StorageSpec, study_name: str | None = None) -> Study:
    """The study of that name, which is created unless it exists; by default, `DEFAULT_STUDY_NAME`."""
    return optuna.create_study(
        storage=open_storage(storage),
        study_name=study_name or DEFAULT_STUDY_NAME,
        direction="maximize",
        load_if_exists=True,
    )
