"""What all tests share: no network, one torch thread, readable assertions of Optuna's contract."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the default model comes from the offline package
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or importing it asks a server

import dspy
import optuna
import postgres
import pytest
import torch
from embedders import hashed
from remote_lms import WrittenLM
from tasks import Adder, additions, is_right

from mpromptune import MIPROv2
from mpromptune.model.embedding import CachedEmbedder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("optuna.testing.pytest_samplers")
torch.set_num_threads(1)
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    """A PostgreSQL server, where its programs are installed."""
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def forks() -> Any:
    """One process imports torch; those to be killed are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "faults", "paid", "writers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.Process(target=str).start()
    return context


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """MLflow on a database of its own, logging all that it can; nothing of it is left afterwards."""
    folder = tmp_path_factory.mktemp("mlflow")
    settings = {name: dspy.settings.get(name) for name in ("callbacks", "track_usage")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(folder)  # where artifacts go
        mlflow = pytest.importorskip("mlflow")
        pytest.importorskip("pandas")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True)
        yield mlflow
        mlflow.flush_trace_async_logging(terminate=True)
        mlflow.dspy.autolog(disable=True)
        pytest.importorskip("mlflow.utils.autologging_utils.safety").revert_patches("dspy")
        mlflow.set_tracking_uri(None)
        dspy.configure(**settings)


@pytest.fixture
def wandb(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """W&B, which writes to an empty folder and asks no server."""
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.teardown()


@pytest.fixture
def page_names(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages of the documentation call the reader's own, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    settings = {name: dspy.settings.get(name) for name in ("lm", "adapter")}
    lm = WrittenLM(tmp_path / "asked.txt")
    monkeypatch.setattr("mpromptune.local.lm.LocalLM", lambda *args, **kwargs: lm)  # the real ones are slow
    monkeypatch.setattr("mpromptune.model.embedding._named_embedder", lambda name: CachedEmbedder(hashed))
    dspy.configure(lm=lm)
    options = {"num_threads": 4, "embedder": hashed, "max_calls": 40, "verbose": False}
    yield {
        "program": Adder(),
        "metric": is_right,
        "trainset": additions(15),
        "optimizer": MIPROv2(metric=is_right, auto="light", **options),
    }
    dspy.configure(**settings)
