"""Optuna's dashboard and its visualisations on the studies of searches."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.trial import TrialState

from mpromptune import PromptSpace, SearchResult, search
from mpromptune.execution.attempts import RetryPolicy

SPACE = PromptSpace(
    {
        "0_predictor_instruction": ["Answer.", "Think, then answer.", "Think step by step."],
        "0_predictor_demos": [[], ["2+2: 4"], ["2+2: 4", "3+5: 8"]],
    }
)
SINGLE_OBJECTIVE = (
    "plot_contour",
    "plot_edf",
    "plot_intermediate_values",
    "plot_optimization_history",
    "plot_parallel_coordinate",
    "plot_param_importances",
    "plot_rank",
    "plot_slice",
    "plot_timeline",
)


def _search(storage: Path | str) -> SearchResult:
    def score(params: dict[str, int], example: int) -> float:
        if params["0_predictor_demos"] == 1 and example == 7:
            raise ConnectionError("reset by peer")  # a trial that fails
        skill = 0.3 + 0.2 * params["0_predictor_instruction"] + 0.1 * params["0_predictor_demos"]
        return float(skill > (example * 0.618) % 1)

    retry = RetryPolicy(attempts=1)
    return search(
        SPACE,
        score,
        n_examples=20,
        max_calls=80,
        block_size=5,
        sampler="random",
        storage=storage,
        retry=retry,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search, with trials of both kinds."""
    found = _search(tmp_path_factory.mktemp("journal") / "run.log")
    assert {t.state for t in found.study.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    return found


@pytest.fixture(scope="module", params=["journal", "sqlite"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, SearchResult]:
    """A storage as the dashboard's command line takes it, and the finished search in it."""
    folder = tmp_path_factory.mktemp(request.param)
    storage = f"{folder}/run.log" if request.param == "journal" else f"sqlite:///{folder}/run.db"
    return storage, _search(storage)


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def dashboard(stored: tuple[str, SearchResult]) -> Iterator[Any]:
    """Asks the dashboard's API, served on this machine."""
    optuna_dashboard = pytest.importorskip("optuna_dashboard")
    server = make_server("127.0.0.1", 0, optuna_dashboard.wsgi(stored[0]), handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=30) as answer:
            return answer.read()

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_dashboard_shows_a_search(stored: tuple[str, SearchResult], dashboard: Any) -> None:
    """Study, trials with params, states and scores, and what depends on them are in its answers."""
    result = stored[1]
    (summary,) = json.loads(dashboard("/api/studies"))["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == ("mpromptune", ["maximize"])
    detail = json.loads(dashboard(f"/api/studies/{summary['study_id']}"))
    trials = result.study.trials
    assert [t["state"].upper() for t in detail["trials"]] == [t.state.name for t in trials]
    for shown, trial in zip(detail["trials"], trials, strict=True):
        assert {p["name"]: int(p["param_external_value"]) for p in shown["params"]} == trial.params
        assert shown.get("values") == (None if trial.value is None else [trial.value])
        assert {v["step"]: v["value"] for v in shown["intermediate_values"]} == trial.intermediate_values
    assert detail["best_trials"][0]["values"] == [result.study.best_value]
    assert b"<html" in dashboard("/dashboard/")


@pytest.mark.parametrize("plot", SINGLE_OBJECTIVE)
def test_optunas_figures_with_plotly(result: SearchResult, plot: str) -> None:
    """Each of Optuna's figures for one objective is drawn, and has data."""
    pytest.importorskip("plotly")
    figure = getattr(optuna.visualization, plot)(result.study)
    assert json.loads(figure.to_json())["data"]


@pytest.mark.parametrize("plot", SINGLE_OBJECTIVE)
def test_optunas_figures_with_matplotlib(result: SearchResult, plot: str) -> None:
    """The same with its other backend."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    try:
        axes = getattr(optuna.visualization.matplotlib, plot)(result.study)
        figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
        figure.canvas.draw()
        assert any(one.has_data() for one in figure.axes)
    finally:
        pyplot.close("all")


def test_figures_know_the_components(result: SearchResult) -> None:
    """Importances add up to 1 over the components of the program, under their names."""
    importances = optuna.importance.get_param_importances(result.study)
    assert importances.keys() == SPACE.components.keys()
    assert sum(importances.values()) == pytest.approx(1.0)
