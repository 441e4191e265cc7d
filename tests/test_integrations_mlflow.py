"""MLflow's autologging of a compile: a run for it, one below it for each trial, a trace for each call."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from embedders import hashed
from lms import arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, Adder, Counted

from mpromptune import MIPROv2
from mpromptune.errors import SearchInterrupted
from mpromptune.mipro.estimate import Estimate


def _compile(**options: Any) -> Any:
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=4, num_threads=4, **FEW_SHOT)
        options = {"sampler": "qei", "embedder": hashed, **options}
        return optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **SMALL_RUN, **options)


def _runs(mlflow: Any, experiment: str) -> tuple[list[Any], list[Any]]:
    """Runs of their own, and those below another, in the order in which they began."""
    found = mlflow.search_runs(
        experiment_names=[experiment], output_format="list", order_by=["attributes.start_time ASC"]
    )
    return (
        [run for run in found if "mlflow.parentRunId" not in run.data.tags],
        [run for run in found if "mlflow.parentRunId" in run.data.tags],
    )


def _traces(mlflow: Any, experiment: str) -> list[Any]:
    mlflow.flush_trace_async_logging()
    found = mlflow.get_experiment_by_name(experiment).experiment_id
    return list(mlflow.search_traces(locations=[found], return_type="list", max_results=500))


@pytest.fixture(scope="module")
def logged(mlflow: Any) -> Any:
    mlflow.set_experiment("compile")
    return _compile()


def test_one_run_for_the_compile_and_one_for_each_trial(mlflow: Any, logged: Any) -> None:
    """Runs are those of stock MIPROv2: finished, nested, and named by kind in the order of the trials."""
    (parent,), children = _runs(mlflow, "compile")
    assert parent.info.status == "FINISHED"
    assert parent.data.params["num_trials"] == "4"
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.info.status for child in children} == {"FINISHED"}
    logs = list(logged.trial_logs.values())
    full = [log for log in logs if "full_eval_score" in log]
    minibatch = [log for log in logs if "mb_score" in log]
    names = {id(log): f"eval_full_{i}" for i, log in enumerate(full)}
    names |= {id(log): f"eval_minibatch_{i}" for i, log in enumerate(minibatch)}
    assert [child.info.run_name for child in children] == [names[id(log)] for log in logs]
    assert mlflow.active_run() is None


def test_runs_hold_scores_and_prompts(mlflow: Any, logged: Any) -> None:
    """Each trial's run has its score in percent and its instruction; the compile's has all the scores."""
    (parent,), children = _runs(mlflow, "compile")
    for child, log in zip(children, logged.trial_logs.values(), strict=True):
        kind = "full_eval" if "full_eval_score" in log else "mb"
        assert child.data.metrics == {"eval": log[f"{kind}_score"]}
        instructions = log[f"{kind}_program"].solve.signature.instructions
        assert child.data.params["Adder.solve.signature.instructions"] == instructions
    history = mlflow.MlflowClient().get_metric_history(parent.info.run_id, "eval_full")
    fulls = [log["full_eval_score"] for log in logged.trial_logs.values() if "full_eval_score" in log]
    assert [point.value for point in sorted(history, key=lambda point: point.step)] == fulls
    assert logged.score in fulls


def test_runs_hold_predictions(mlflow: Any, logged: Any) -> None:
    """The table of a trial has its examples, what the program answered, and the score of that."""
    _, children = _runs(mlflow, "compile")
    first = next(child for child in children if child.info.run_name == "eval_minibatch_1")
    table = mlflow.artifacts.load_dict(f"{first.info.artifact_uri}/result_table.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 5  # of 12 validation examples, one block
    assert all((row["pred_answer"] == row["example_answer"]) == bool(row["score"]) for row in rows)


def test_each_program_call_is_one_trace(mlflow: Any, logged: Any) -> None:
    """Trials overlap, and still every call's spans hang together below one root, without errors."""
    traces = _traces(mlflow, "compile")
    roots = [[span for span in trace.data.spans if span.parent_id is None] for trace in traces]
    assert {len(root) for root in roots} == {1}
    calls = [trace for trace, (root,) in zip(traces, roots, strict=True) if root.name == "Adder.forward"]
    usage = logged.search_result.usage
    assert len(calls) == usage["search"].program_calls + usage["bootstrap"].program_calls
    for trace in calls:
        assert str(trace.info.state) == "OK"
        assert sum("ScriptedLM" in span.name for span in trace.data.spans) == 1


def test_a_run_of_the_users_own(mlflow: Any) -> None:
    """Within a run, trials are logged below it; a context of MLflow's has all traces belong to it."""
    mlflow.set_experiment("own")
    with (
        mlflow.start_run(run_name="mine") as run,
        mlflow.tracing.context(metadata={"mlflow.sourceRun": run.info.run_id}),
    ):
        best = _compile()
    (mine,), children = _runs(mlflow, "own")
    assert mine.info.run_name == "mine"
    assert len(children) == len(best.search_result.study.trials)
    sources = {trace.info.trace_metadata["mlflow.sourceRun"] for trace in _traces(mlflow, "own")}
    assert sources == {mine.info.run_id}


def test_a_dry_run_leaves_no_run(mlflow: Any) -> None:
    """Nothing is compiled, so nothing is logged, nor does a run stay open."""
    mlflow.set_experiment("dry")
    assert isinstance(_compile(dry_run=True), Estimate)
    assert mlflow.active_run() is None
    assert _runs(mlflow, "dry") == ([], [])


def test_an_interrupt_closes_all_runs(mlflow: Any) -> None:
    """What was logged until then stays; the compile's run has failed, and none is open."""
    mlflow.set_experiment("interrupted")

    def press_ctrl_c(study: Any, trial: Any) -> None:
        if trial.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted):
        _compile(callbacks=[press_ctrl_c])
    (parent,), children = _runs(mlflow, "interrupted")
    assert parent.info.status == "FAILED"
    assert len(children) == 3
    assert mlflow.active_run() is None
