"""Processes that share a search, some of which are killed: what tests/test_sharing.py starts and audits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import AuditedLM, compiled
from killed import Logged, Pair, run
from optuna.storages import GrpcStorageProxy

import mpromptune.crew.members
from mpromptune import SearchResult
from mpromptune.studies.storage import open_storage

COORDINATORS, THREADS = 3, 4
# Seconds; enough for a process to give a sign of life on a machine that is busy.
LEASE = 6.0
# Seconds that processes are given to end.
PATIENCE = 120.0


@dataclass(frozen=True)
class Mate:
    """A process: where it logs its calls and leaves its result, and the call after which it is killed."""

    log: Path
    out: Path
    last: int | None = None
    delay: float = 0.0
    step: str = "search"
    signal: int = signal.SIGKILL

    @property
    def exit_code(self) -> int:
        """Of its process."""
        return 0 if self.last is None else -9 if self.signal == signal.SIGKILL else 1


def opened(storage: Any) -> Any:
    """A port stands for Optuna's gRPC proxy there."""
    return GrpcStorageProxy(host="localhost", port=storage) if isinstance(storage, int) else storage


def trials_of(result: SearchResult) -> list[list[Any]]:
    """What trials of two equal searches have in common, as JSON."""
    trials = [[t.number, t.params, t.state.name, t.value, t.user_attrs] for t in result.study.trials]
    for trial in trials:
        trial[-1] = {k: v for k, v in trial[-1].items() if "usage" not in k}
    return json.loads(json.dumps(trials))


def take_part(storage: Any, mate: Mate, arguments: dict[str, Any]) -> None:
    """A search by one of several processes."""
    mpromptune.crew.members.LEASE = LEASE
    score = Logged(mate.log, mate.last, mate.delay, latency=0.2, number=mate.signal)
    result = run(opened(storage), score, num_threads=THREADS, coordinators=COORDINATORS, **arguments)
    found = {"best": result.best_params, "calls": result.calls, "trials": trials_of(result)}
    found["used"] = result.usage["search"].program_calls
    mate.out.write_text(json.dumps(found))


def compile_together(storage: Any, mate: Mate, arguments: dict[str, Any]) -> None:
    """A compile by one of several processes, killed at the ``last`` request that it makes in a step."""
    mpromptune.crew.members.LEASE = LEASE

    def fault(number: int, step: str, messages: Any) -> None:
        time.sleep(0.1)
        if mate.step == step and number == mate.last:
            os.kill(os.getpid(), signal.SIGKILL)

    best = compiled(AuditedLM(fault, mate.log), storage=opened(storage), coordinators=COORDINATORS)
    used = {step: usage.lm_calls for step, usage in best.search_result.usage.items()}
    mate.out.write_text(json.dumps({"best": best.dump_state(), "score": best.score, "used": used}))


def serve(storage: Any, port: int) -> None:
    """Optuna's gRPC proxy of a storage, until it is killed."""
    from optuna.storages import run_grpc_proxy_server

    run_grpc_proxy_server(open_storage(storage), host="localhost", port=port)


def forks() -> Any:
    """One process imports torch; the others are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crews"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.Process(target=str).start()
    return context


def run_together(
    storage: Any, mates: Sequence[Mate], target: Any = take_part, **arguments: Any
) -> list[dict[str, Any]]:
    """What those found out that were not killed; the first leads."""
    processes = [forks().Process(target=target, args=(storage, mate, arguments)) for mate in mates]
    try:
        for process in processes:
            process.start()
            wait_for_calls(mates[0].log)
        for process, mate in zip(processes, mates, strict=True):
            process.join(PATIENCE)
            assert process.exitcode == mate.exit_code
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [json.loads(mate.out.read_text()) for mate in mates if mate.last is None]


def wait_for_calls(log: Path) -> None:
    """Until the process with that log has begun its first call."""
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def audit(mates: Sequence[Mate]) -> tuple[Counter[Pair], int]:
    """How often each pair was begun, and by how much more than once; only the killed may be the reason.

    Every further call must have a reason of its own: a process that began the same one and was killed.
    """
    begun = sum((Logged.read(mate.log, "start") for mate in mates), Counter())
    killed = sum((Logged.read(mate.log, "start") for mate in mates if mate.last is not None), Counter())
    extra = {pair: number - 1 for pair, number in begun.items() if number > 1}
    assert all(number <= killed[pair] for pair, number in extra.items())
    return begun, sum(extra.values())
