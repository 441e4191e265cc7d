"""A result from a study alone, and the command that writes its page."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest
from tasks import QEI, Adder, compiled

from mpromptune import PromptSpace, SearchResult, search
from mpromptune.cli import main as cli
from mpromptune.errors import InvalidArgumentError, StudyMismatchError
from mpromptune.mipro.reading import read_result
from mpromptune.storage.attributes import ESTIMATE, PREDICTORS, SETTINGS
from mpromptune.storage.storage import open_study

SPACE = PromptSpace({"style": ["secret a", "secret b", "secret c", "secret d"]})


def run(storage: Any, **options: Any) -> SearchResult:
    def score(params: dict[str, int], example: int) -> float:
        return float(params["style"] > (example * 0.618) % 3)

    arguments = {"n_examples": 20, "max_calls": 70, "sampler": "random", "block_size": 5, **options}
    return search(SPACE, score, storage=storage, num_threads=2, **arguments)


@pytest.mark.parametrize("schedule", [{}, {"schedule": "mipro", "minibatch_size": 5, "block_size": None}])
def test_what_was_measured_is_read_again(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """Scores, calls, winner, baseline and usage are those of the search itself."""
    result = run(tmp_path / "run.log", **schedule)
    read, notes = read_result(tmp_path / "run.log")
    assert read.best_params == result.best_params
    assert (read.best_score, read.baseline_score) == (result.best_score, result.baseline_score)
    assert (read.calls, read.n_examples) == (result.calls, result.n_examples)
    assert read.baseline_params == {"style": 0}
    assert read.usage == result.usage
    assert read.space is None
    key = lambda measured: sorted(measured.params.items())  # noqa: E731
    expected = [(m.params, m.scores, m.fully) for m in sorted(result.configurations, key=key)]
    assert [(m.params, m.scores, m.fully) for m in sorted(read.configurations, key=key)] == expected
    assert any("style are not kept" in note for note in notes)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    """Another process may be at work on the journal."""
    run(tmp_path / "run.log")
    before = (tmp_path / "run.log").read_bytes()
    read_result(tmp_path / "run.log")
    assert (tmp_path / "run.log").read_bytes() == before
    with pytest.raises(InvalidArgumentError, match="no journal file"):
        read_result(tmp_path / "none.log")
    assert not (tmp_path / "none.log").exists()


def test_open_trials_count_as_far_as_they_are(tmp_path: Path) -> None:
    """Of a search that is running, scores that have come in are read, and the page says so."""
    run(tmp_path / "run.log")
    read, _ = read_result(tmp_path / "run.log")
    study = optuna.load_study(study_name="mpromptune", storage=read.study._storage)
    distributions = {"style": optuna.distributions.CategoricalDistribution(range(4))}
    trial = study.ask(fixed_distributions=distributions)
    trial.report(0.0, step=3)
    assert read_result(read.study._storage)[0].calls == read.calls + 1
    assert cli.main(["report", str(tmp_path / "run.log"), "--output", str(tmp_path / "page.html")]) == 0
    assert "open trials: 1." in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_several_studies_need_a_name(tmp_path: Path) -> None:
    """A name that is missing or wrong is answered with those that there are."""
    for name in ("one", "two"):
        run(tmp_path / "run.log", study_name=name)
    with pytest.raises(InvalidArgumentError, match=r"several studies.*'one', 'two'"):
        read_result(tmp_path / "run.log")
    with pytest.raises(InvalidArgumentError, match=r"no study 'three'.*'one', 'two'"):
        read_result(tmp_path / "run.log", "three")
    assert read_result(tmp_path / "run.log", "two")[0].study.study_name == "two"


def test_an_empty_storage_is_said_to_be_empty(tmp_path: Path) -> None:
    """Without any study there is no name to pass, and the message asks for none."""
    (tmp_path / "run.log").touch()
    with pytest.raises(InvalidArgumentError, match=r"no study yet: run a compile with it first\.$"):
        read_result(tmp_path / "run.log")


def test_studies_of_others_are_refused(tmp_path: Path) -> None:
    """A study that no search has made, and one in which none has begun."""
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(study_name="other", storage=url)
    with pytest.raises(StudyMismatchError, match="was not made by a search"):
        read_result(url)
    open_study(tmp_path / "empty.log")
    with pytest.raises(InvalidArgumentError, match="No search has begun"):
        read_result(tmp_path / "empty.log")


def test_a_compile_is_read_with_its_texts(tmp_path: Path) -> None:
    """Its study has the candidates: the same texts as in the result, under the same indices."""
    best = compiled(storage=tmp_path / "run.log", **QEI)
    read, notes = read_result(tmp_path / "run.log")
    assert read.space is not None
    assert read.space.components == best.search_result.space.components
    assert read.usage == best.search_result.usage
    assert len(notes) == 1


def test_reading_evaluates_and_unpickles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of a compile may come from anybody."""
    compiled(storage=tmp_path / "run.log", **QEI)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what was read would be run")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (builtins, "eval")):
        monkeypatch.setattr(module, name, refuse)
    assert read_result(tmp_path / "run.log")[0].calls > 0


def test_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where; texts that a plain search does not keep are not in it, and errors are one line."""
    run(tmp_path / "run.log")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run.log"), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"Wrote {page}\n"
    assert "secret" not in page.read_text(encoding="utf-8")
    assert cli.main(["report", str(tmp_path / "none.log")]) == 2
    assert "There is no journal file" in capsys.readouterr().err


def test_texts_that_a_compile_does_not_keep_are_named(tmp_path: Path) -> None:
    """A student whose own demos no candidate equals: its study has all texts but those."""
    student = Adder()
    student.solve.demos = [dspy.Example(question="90+9", answer="99")]
    best = compiled(student, sampler="random", storage=tmp_path / "run.log")
    read, notes = read_result(tmp_path / "run.log")
    assert read.space is not None
    known, kept = best.search_result.space.components, read.space.components
    assert known["0_predictor_demos"][-1] == ["question: 90+9\nanswer: 99"]
    assert kept["0_predictor_demos"][:-1] == known["0_predictor_demos"][:-1]
    assert "does not keep" in kept["0_predictor_demos"][-1]
    assert any("0_predictor_demos are not kept" in note for note in notes)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [(SETTINGS, 5), (PREDICTORS, 3), (ESTIMATE, [1]), (ESTIMATE, {"search": {"x": 1}})],
)
def test_damaged_attributes_are_an_error_of_the_storage(
    attribute: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the study; the command ends with status 2, as where the file or the URL is wrong."""
    path = str(tmp_path / "run.log")
    run(path, max_calls=40)
    open_study(path).set_user_attr(attribute, value)
    assert cli.main(["report", path, "--output", str(tmp_path / "report.html")]) == 2
    assert "The record of the study 'mpromptune' in" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("storage", ["nosuch://host/database", __file__])
def test_a_wrong_storage_is_the_users_error(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, as for other wrong arguments."""
    assert cli.main(["report", storage]) == 2
    assert capsys.readouterr().err.startswith("mpromptune: ")


def test_optuna_does_not_announce_the_study(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither in memory nor in a file; its level stays, and other studies are announced."""
    optuna.logging.set_verbosity(optuna.logging.INFO)
    open_study(None)
    assert capfd.readouterr().err == ""
    optuna.create_study()
    assert "A new study created" in capfd.readouterr().err
