"""Notes of a score function: saved with the scores, read back after a kill, and only then known."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from killed import SPACE, Scores, die_noting, note_on, noting, run
from remote_scores import noted

import mpromptune.engine.search
from mpromptune import Noted, RetryPolicy, SearchResult
from mpromptune.engine.trials import Trials
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.notes import attach_note
from mpromptune.execution.pool import as_score
from mpromptune.storage.attributes import EXAMPLES, NOTE

Notes = dict[tuple[Any, int], Any]


def saved(result: SearchResult) -> Notes:
    """(trial, example) to the note in a study."""
    return {
        (trial.number, int(name.removeprefix(f"{NOTE}:"))): note
        for trial in result.study.trials
        for name, note in trial.user_attrs.items()
        if name.startswith(f"{NOTE}:")
    }


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Notes]:
    """What each search that follows knows in the end: (configuration, example) to note."""
    found: list[Notes] = []

    class Watched(Trials):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self.notes)

    monkeypatch.setattr(mpromptune.engine.search, "Trials", Watched)
    return found


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        ("why", "why"),
        (None, None),
        ({"a": 1, 2: [True, None, 0.5]}, {"a": 1, "2": [True, None, 0.5]}),
        ("cut in \ud83d two", "cut in ? two"),
        (float("nan"), "nan"),
        (10**20, "1" + "0" * 20),
        ((Path("/x"), b"y"), ["/x", "b'y'"]),
        ("long" * 2000, "long" * 1000 + "..."),
        (["x" * 5000] * 20, ["x" * 1000 + "..."] * 20),
        ([["x"] * 100] * 500, None),
    ],
)
def test_a_note_is_json_of_limited_size(note: Any, kept: Any) -> None:
    """What is not JSON becomes text, long texts are cut, and a note that is still too long is dropped."""
    noted = Noted(0.5, note)
    assert noted.note == kept
    assert noted == 0.5
    assert json.loads(json.dumps(noted.note)) == kept


def test_a_note_without_an_end_is_cut() -> None:
    """A container that contains itself has no text of its own to the last level."""
    endless: list[Any] = [1]
    endless.append(endless)
    assert Noted(1.0, endless).note[0] == 1


def test_an_object_whose_text_fails_is_named_by_its_class() -> None:
    """The class of a value is what is left to say."""

    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert Noted(1.0, {"said": Mute()}).note == {"said": "<Mute>"}


def test_a_number_keeps_its_note_on_its_way() -> None:
    """As a score, and between processes."""
    for back in (as_score(Noted(0.5, "why")), pickle.loads(cloudpickle.dumps(Noted(0.5, "why")))):
        assert (back, back.note) == (0.5, "why")


def test_notes_are_saved_with_their_scores(tmp_path: Path, known: list[Notes]) -> None:
    """Every example of every trial has its own, in a file too, and the search knows those of its trials."""
    result = run(tmp_path / "journal", partial(noting, Scores()))
    asked = [(t, e) for t in result.study.trials for e in t.user_attrs[EXAMPLES]]
    assert saved(result) == {(t.number, e): note_on(t.params, e) for t, e in asked}
    assert known == [{(SPACE.row(t.params), e): note_on(t.params, e) for t, e in asked}]
    assert len(asked) == result.calls


@pytest.mark.parametrize("url", ["{}/journal", "sqlite:///{}/run.db"])
def test_any_note_is_read_back_as_it_was_known(url: str, tmp_path: Path, known: list[Notes]) -> None:
    """From a file and from a database: what cannot be encoded, is no JSON, or is too long for either."""
    odd = ["\ud83d\x00", "long" * 10_000, {1: {2, 3}, "at": tmp_path}, float("inf"), [{}], "é" * 4000]

    def noted(params: dict[str, int], example: int) -> float:
        return Noted(example % 2, {"of": odd[example % len(odd)]})

    storage = url.format(tmp_path)
    first, again = run(storage, noted, max_calls=80), run(storage, Scores(), max_calls=80)
    assert known[0] == known[1]
    assert len(known[0]) == first.calls == again.calls
    assert saved(again) == saved(first)
    assert {len(str(note["of"])) > 4003 for note in known[0].values()} == {False}


def test_a_pickled_result_has_no_notes() -> None:
    """They are large, and only a search needs them; everything else is there."""
    result = run(None, partial(noting, Scores()))
    again = pickle.loads(pickle.dumps(result))
    assert saved(again) == {}
    assert len(saved(result)) == again.calls
    assert again.configurations == result.configurations
    assert [t.user_attrs[EXAMPLES] for t in again.study.trials] == [
        t.user_attrs[EXAMPLES] for t in result.study.trials
    ]


def test_scores_without_notes_save_none(known: list[Notes]) -> None:
    """A search without notes is what it was."""
    assert saved(run(None, Scores())) == {}
    assert known == [{}]


def test_notes_change_no_score() -> None:
    """The same trials, with their values."""
    trials = [
        [(t.params, t.value, t.intermediate_values) for t in run(None, score).study.trials]
        for score in (Scores(), partial(noting, Scores()))
    ]
    assert trials[0] == trials[1]


def test_notes_are_read_back_after_a_kill(tmp_path: Path, known: list[Notes], forks: Any) -> None:
    """A search that was killed with SIGKILL ends with the notes of one that was not."""
    whole = run(None, partial(noting, Scores()))
    for last in random.Random(0).sample(range(1, whole.calls), 3):
        path, log = tmp_path / f"{last}.journal", tmp_path / f"{last}.log"
        killed = forks.Process(target=die_noting, args=(path, log, last))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        Path(f"{path}.lock").unlink(missing_ok=True)  # Optuna's own, which would time out by itself
        scores = Scores()
        assert saved(run(path, partial(noting, scores))) == saved(whole)
        assert scores.asked.total() < whole.calls
    assert all(notes == known[0] for notes in known)


def test_notes_are_read_back_from_any_line_of_a_journal(tmp_path: Path, known: list[Notes]) -> None:
    """Notes that were lost with their scores are made again; those of saved scores are never lost."""
    path = tmp_path / "whole"
    whole = run(path, partial(noting, Scores()))
    lines = path.read_bytes().splitlines(keepends=True)
    start = len(lines) // 2
    for cut in range(start, start + 4):  # usage, note, score and the next usage
        path = tmp_path / f"{cut}"
        path.write_bytes(b"".join(lines[:cut]))
        assert saved(run(path, partial(noting, Scores()))) == saved(whole)
    assert all(notes == known[0] for notes in known)


def test_notes_of_an_interrupted_trial_go_on_with_it(tmp_path: Path, known: list[Notes]) -> None:
    """A trial that an outage cut off continues as another one, with the notes of its first part."""
    first, second = Scores(), Scores()

    def breaking(params: dict[str, int], example: int) -> float:
        if first.asked.total() >= 75:
            raise ConnectionError("gone")
        return noting(first, params, example)

    with pytest.raises(SearchStoppedError):
        run(tmp_path / "j", breaking, retry=RetryPolicy(attempts=1))
    result = run(tmp_path / "j", partial(noting, second))
    assert known[1] == {
        (SPACE.row(t.params), e): note_on(t.params, e)
        for t in result.study.trials
        for e in t.user_attrs[EXAMPLES]
    }
    assert len(known[1]) == result.calls > second.asked.total()


def test_a_failure_of_the_candidate_has_a_note_too(known: list[Notes]) -> None:
    """An error carries it; one without a note says nothing."""

    def failing(params: dict[str, int], example: int) -> float:
        if example % 2:
            return 1.0
        error = ValueError("no answer")
        if not example % 4:
            attach_note(error, {"feedback": "ValueError: no answer"})
        raise error

    result = run(None, failing, failure_score=0.0)
    assert known[0]
    assert {example % 4 for _, example in known[0]} == {0}
    assert set(map(str, known[0].values())) == {str({"feedback": "ValueError: no answer"})}
    assert {example for _, example in saved(result)} == {example for _, example in known[0]}


def test_damaged_notes_are_ignored(tmp_path: Path, known: list[Notes]) -> None:
    """What else is in a study under their names ends no search."""
    path = tmp_path / "j"
    whole = run(path, partial(noting, Scores()))
    text = path.read_text()
    for name in ("x", "-1", "10000", "", "[1]"):
        text = text.replace(f'"{NOTE}:3"', f'"{NOTE}:{name}"', 1)
    path.write_text(text)
    again = run(path, Scores())
    assert again.calls == whole.calls
    lost = known[0].keys() - known[1].keys()
    assert lost
    assert {example for _, example in lost} == {3}
    assert known[1].items() <= known[0].items()


def test_notes_come_back_from_other_processes(known: list[Notes]) -> None:
    """With the numbers and with the errors."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        run(None, noted, executor=pool)
    assert known[0]
    assert all(note == ["of", example] for (_, example), note in known[0].items())
    assert {example % 3 for _, example in known[0]} == {0, 1, 2}  # a third of them fail
