"""Storages: what can be opened, what is kept of a damaged journal, and what an error says."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from tenacity import wait_none

from mpromptune import PromptSpace, search
from mpromptune.errors import InvalidArgumentError, MPromptuneError, StorageError, StudyMismatchError
from mpromptune.storage import journal, storage
from mpromptune.storage.storage import DEFAULT_STUDY_NAME, open_storage, open_study


def _trial(study: optuna.Study, x: int) -> None:
    trial = study.ask({"x": optuna.distributions.CategoricalDistribution(range(10))})
    trial.set_user_attr("x", x)
    trial.report(x / 10, step=x)
    study.tell(trial, float(x))


def _journal(path: Path, n_trials: int = 3) -> list[bytes]:
    """The lines of a journal whose trial i has the value i."""
    study = open_study(path)
    for x in range(n_trials):
        _trial(study, x)
    return path.read_bytes().splitlines(keepends=True)


def _line(lines: list[bytes], code: int, number: int = 0) -> int:
    """Where the record of that kind and number is."""
    return [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == code][number]


def _values(path: Path) -> list[Any]:
    return [trial.value for trial in open_study(path).trials]


def test_kinds_of_storages(tmp_path: Path) -> None:
    """None is memory, a path a journal file, a URL Optuna's database; a storage is taken as it is."""
    assert isinstance(open_storage(None), InMemoryStorage)
    assert isinstance(open_storage(tmp_path / "run.log"), JournalStorage)
    assert isinstance(open_storage(str(tmp_path / "run.log")), JournalStorage)
    assert isinstance(open_storage(f"sqlite:///{tmp_path}/run.db"), RDBStorage)
    own = InMemoryStorage()
    assert open_storage(own) is own


def test_an_empty_database_is_opened_by_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come too late to make its tables find them a moment later; only lasting errors are told."""
    attempts: list[int] = []

    class Late(RDBStorage):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            attempts.append(1)
            if len(attempts) <= losses:
                raise OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(storage, "RDBStorage", Late)
    monkeypatch.setattr(storage._database.retry, "wait", wait_none())
    losses = 2
    assert open_study(f"sqlite:///{tmp_path}/run.db").trials == []
    losses = 10
    with pytest.raises(StorageError, match="table studies already exists"):
        open_study(f"sqlite:///{tmp_path}/run.db")
    assert len(attempts) == 3 + 3


@pytest.mark.parametrize("spec", [5, "", b"run.log", ["run.log"], object])
def test_no_storage(spec: Any) -> None:
    """Anything else is refused with what was received."""
    with pytest.raises(InvalidArgumentError, match="storage must be"):
        open_storage(spec)


def test_names_are_strings() -> None:
    """Any other name of a study is refused."""
    with pytest.raises(InvalidArgumentError, match="study_name must be a string; got 5"):
        open_study(None, 5)  # type: ignore[arg-type]


def test_first_record_may_be_torn(tmp_path: Path) -> None:
    """A journal that was torn as it began is a journal, and nothing was in it."""
    path = tmp_path / "run.log"
    for torn in (b"", b'{"op', b'{"op_code":0,"worker_id":"a"'):
        path.write_bytes(torn)
        for _ in range(2):
            assert open_study(path).trials == []


@pytest.mark.parametrize("suffix", ["run.log", "sqlite:///{}/run.db"])
def test_the_same_call_opens_the_same_study(tmp_path: Path, suffix: str) -> None:
    """Without a name too, a study is found again with all that was written to it."""
    spec = suffix.format(tmp_path) if "://" in suffix else tmp_path / suffix
    study = open_study(spec)
    _trial(study, 1)
    study.set_user_attr("key", {"a": [1, None, "ü"]})
    again = open_study(spec)
    assert again.study_name == DEFAULT_STUDY_NAME
    assert again.user_attrs == study.user_attrs
    assert [t.value for t in again.trials] == [1.0]
    assert open_study(spec, "another").trials == []


@pytest.mark.parametrize("where", ["missing/run.log", "", "sqlite:///{}/missing/run.db", "sqlite:///{}"])
def test_places_that_cannot_be_opened(tmp_path: Path, where: str) -> None:
    """A missing directory, and a directory instead of a file, are a StorageError that names it."""
    spec = where.format(tmp_path) if "://" in where else tmp_path / where
    with pytest.raises(StorageError, match="cannot be opened") as caught:
        open_study(spec)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, MPromptuneError)
    assert isinstance(caught.value, OSError)


def test_errors_hold_no_password() -> None:
    """What a database is opened with stays out of the message."""
    for url in ("nosuchdb://me:secret@host/studies", "nosuchdb://me:sec/ret@host/studies"):
        with pytest.raises(StorageError, match="cannot be opened") as caught:
            open_storage(url)
        assert "sec" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"SQLite format 3\0" + bytes(100), "sqlite:///"),
        (b'{"question": "1+1", "answer": "2"}\n', "not an Optuna journal"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not an Optuna journal"),
        (b"notes\n", "not an Optuna journal"),
        (b"\nnotes\n", "not an Optuna journal"),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes, hint: str) -> None:
    """A file that is no journal is refused, and not a byte of it changes."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=hint):
        open_study(path)
    assert path.read_bytes() == content


def test_read_only_database(tmp_path: Path) -> None:
    """A database that can be read and not written is a StorageError when a study of it is opened."""
    open_study(f"sqlite:///{tmp_path}/run.db")
    with pytest.raises(StorageError, match="readonly database"):
        open_study(f"sqlite:///file:{tmp_path}/run.db?mode=ro&uri=true")


FULL, READ_ONLY = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
)


@pytest.mark.parametrize("spec", [Path, lambda path: JournalStorage(JournalFileBackend(str(path)))])
@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied")])
def test_a_journal_that_cannot_be_written(
    spec: Any, error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, and Optuna's: a StorageError, before anything is paid for."""
    open_study(tmp_path / "run.log")
    storage, opened = spec(tmp_path / "run.log"), open

    def refuse(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            raise error
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match=f"cannot be .*: {error.strerror}"):
        open_study(storage)


def test_a_journal_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that is read-only, say: nothing can be written, which shows at once."""
    open_study(tmp_path / "run.log")

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise READ_ONLY

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(StorageError, match="cannot be opened: Read-only file system"):
        open_study(tmp_path / "run.log")


def test_studies_of_something_else(tmp_path: Path) -> None:
    """Other directions, several objectives, and trials of somebody else's are refused by name."""
    url = f"sqlite:///{tmp_path}/run.db"
    optuna.create_study(storage=url, study_name="down", direction="minimize")
    optuna.create_study(storage=url, study_name="two", directions=["maximize", "maximize"])
    foreign = optuna.create_study(storage=url, study_name="foreign", direction="maximize")
    foreign.tell(foreign.ask(), 1.0)
    with pytest.raises(StudyMismatchError, match="'down' does not maximise one value"):
        open_study(url, "down")
    with pytest.raises(StudyMismatchError, match="'two' does not maximise one value"):
        open_study(url, "two")
    with pytest.raises(StudyMismatchError, match="'foreign' has trials that were not made by a search"):
        open_study(url, "foreign")


def test_study_of_another_version(tmp_path: Path) -> None:
    """A format that this version does not know is refused, with both."""
    open_study(tmp_path / "run.log").set_user_attr("mpromptune:format", 99)
    with pytest.raises(StudyMismatchError, match="in format 99; this one reads format 2"):
        open_study(tmp_path / "run.log")


GARBAGE = [
    b"\0" * 40,
    b"\xff\xfe garbage",
    b'{"op_code":6,"worker_',
    b"[1, 2]",
    b"17",
    b'{"op_code":99,"worker_id":"a"}',
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_unreadable_line_in_the_middle(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is skipped with its number; everything before and after it is kept, and can be added to."""
    path = tmp_path / "run.log"
    lines = _journal(path)
    path.write_bytes(b"".join([*lines[:4], garbage + b"\n", *lines[4:]]))
    with caplog.at_level(logging.WARNING):
        study = open_study(path)
    assert [t.value for t in study.trials] == [0.0, 1.0, 2.0]
    assert [r.getMessage() for r in caplog.records] == [f"Line 5 of {path} is unreadable; skipped."]
    _trial(study, 3)
    assert [t.value for t in study.trials] == _values(path) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_torn_last_line(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    """What is written after it stands on a line of its own; only the torn record is lost."""
    path = tmp_path / "run.log"
    _journal(path)
    path.write_bytes(path.read_bytes()[:-cut])
    study = open_study(path)
    _trial(study, 3)
    # The last record says that trial 2 is complete; all but its end of line is still the record.
    expected = [0.0, 1.0, 2.0 if cut == 1 else None, 3.0]
    assert [t.value for t in study.trials] == _values(path) == expected
    assert study.trials[2].intermediate_values == {2: 0.2}


@pytest.mark.parametrize("code", [4, 5, 6, 7, 8])
def test_lost_parts_of_a_trial(tmp_path: Path, code: int) -> None:
    """A lost creation, parameter, state, score or attribute leaves the other trials as they were.

    A trial whose creation is lost comes back when it is mentioned, with its scores.
    """
    path = tmp_path / "run.log"
    lines = _journal(path)
    lost = _line(lines, code, number=1)
    path.write_bytes(b"".join([*lines[:lost], lines[lost][:15] + b"\n", *lines[lost + 1 :]]))
    study = open_study(path)
    values: list[Any] = [0.0, None if code == 6 else 1.0, 2.0]
    assert [t.value for t in study.trials] == values
    assert [t.user_attrs.get("x") for t in study.trials] == [0, None if code == 8 else 1, 2]
    assert study.trials[1].state is (TrialState.RUNNING if code == 6 else TrialState.COMPLETE)
    _trial(study, 3)
    assert _values(path) == [*values, 3.0]


def test_a_number_out_of_all_proportion(tmp_path: Path) -> None:
    """A record of a trial that cannot have been created is skipped, not made room for."""
    path = tmp_path / "run.log"
    lines = _journal(path)
    wrong = lines[-1].replace(b'"trial_id":2', b'"trial_id":2000000')
    path.write_bytes(b"".join([*lines, wrong]))
    assert _values(path) == [0.0, 1.0, 2.0]


def test_lost_creation_of_the_study(tmp_path: Path) -> None:
    """Without it nothing can go on, and nothing is begun anew in silence."""
    path = tmp_path / "run.log"
    lines = _journal(path)
    path.write_bytes(b"".join([lines[0][:30] + b"\n", *lines[1:]]))
    with pytest.raises(StorageError, match="created study 0 is unreadable"):
        open_study(path)


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
@pytest.mark.parametrize("lock", [JournalFileSymlinkLock, JournalFileOpenLock])
def test_lock_of_a_dead_process(tmp_path: Path, lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that was left behind is broken after a few seconds."""
    monkeypatch.setattr(journal, "_GRACE", 1)
    path = tmp_path / "run.log"
    _journal(path)
    lock(str(path)).acquire()
    assert _values(path) == [0.0, 1.0, 2.0]
    assert not os.path.lexists(f"{path}.lock")


def test_two_write_at_once(tmp_path: Path) -> None:
    """Records of several runs, which know of each other by the file alone, neither mix nor get lost."""
    path = tmp_path / "run.log"
    study = open_study(path)

    def write(name: str) -> None:
        own = open_study(path)
        for i in range(20):
            own.set_user_attr(f"{name}{i}", "x" * 3000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert {f"{name}{i}" for name in "ab" for i in range(20)} <= study.user_attrs.keys()


def test_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is a StorageError; what was written before stays, and later writes go on from there."""
    path = tmp_path / "run.log"
    _journal(path)
    study = open_study(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written: File too large. Its data are kept"):
            study.set_user_attr("key", "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [t.value for t in study.trials] == [0.0, 1.0, 2.0]
    _trial(study, 3)
    assert _values(path) == [0.0, 1.0, 2.0, 3.0]


def test_pickled_result_needs_no_storage(tmp_path: Path) -> None:
    """A result that was searched in a file is pickled with its study and without the file."""
    path = tmp_path / "run.log"
    space = PromptSpace({"0_predictor_instruction": ["a", "b", "c"]})
    result = search(
        space, lambda p, e: float(e % 3 == 0), n_examples=10, max_calls=30, sampler="random", storage=path
    )
    pickled = pickle.dumps(result)
    assert str(tmp_path).encode() not in pickled
    path.unlink()
    loaded = pickle.loads(pickled)
    assert loaded.best_params == result.best_params
    assert isinstance(loaded.study.trials[0].value, float)
    assert not path.exists()
