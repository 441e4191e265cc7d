"""How busy a search keeps the workers of an executor: `python -m benchmarks.executors`."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dspy

import mpromptune
from benchmarks.lms import SimulatedLM
from benchmarks.runner import RESULTS, Cell, keep, line
from benchmarks.wallclock import exact, examples, hashed, quiet

N_TRAIN, N_VAL = 20, 300
SETUP = """\
A compile with sampler="qei" of one predictor, 300 validation examples; of its search step alone. Latency
of an LM call: lognormal, sigma 0.5. Utilisation: sum of latencies / (calls in flight x wall). CPU: seconds
of this process in the search, and of all its child processes from their start to their end. Dask's
profiler is off (distributed.worker.profile.enabled)."""


class _Timed(mpromptune.MIPROv2):
    """Says how long its search step took, by the clock and in CPU time of this process."""

    def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        try:
            return super()._optimize_prompt_parameters(*args, **kwargs)
        finally:
            self.wall, self.cpu = time.perf_counter() - began, time.process_time() - cpu


@contextlib.contextmanager
def workers(kind: str, processes: int, in_flight: int) -> Iterator[Executor | None]:
    """An executor with room for so many calls; the threads of the search itself for ``"threads"``."""
    if kind == "threads":
        yield None
    elif kind == "processes":
        with ProcessPoolExecutor(in_flight, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    else:
        import dask
        from distributed import Client, LocalCluster

        # It looks at every thread of every worker a hundred times a second.
        dask.config.set({"distributed.worker.profile.enabled": False})
        threads = -(-in_flight // processes)
        sizes = {"n_workers": processes, "threads_per_worker": threads, "memory_limit": 0}
        with (
            LocalCluster(processes=True, dashboard_address=":0", **sizes) as cluster,
            Client(cluster) as client,
        ):
            yield client.get_executor()


def measure(cell: Cell) -> Cell:
    """One compile."""
    data = examples(N_TRAIN + N_VAL)
    before = _cpu_of_children()
    with quiet(), workers(cell["executor"], cell["processes"], cell["in_flight"]) as executor:
        lm = SimulatedLM(cell["latency"])
        with dspy.context(lm=lm):
            optimizer = _Timed(metric=exact, auto=None, num_candidates=12, num_threads=cell["in_flight"])
            best = optimizer.compile(
                dspy.Predict("question -> answer"),
                trainset=data[:N_TRAIN],
                valset=data[N_TRAIN:],
                num_trials=20,
                sampler="qei",
                embedder=hashed,
                max_calls=cell["max_calls"],
                executor=executor,
            )
    used = best.search_result.usage["search"]
    busy = used.completion_tokens / 1e6  # the simulated LM reports microseconds
    return {
        **cell,
        "calls": best.search_result.calls,
        "wall": round(optimizer.wall, 2),
        "utilisation": round(busy / (cell["in_flight"] * optimizer.wall), 3),
        "cpu": round(optimizer.cpu, 2),
        "cpu_of_workers": round(_cpu_of_children() - before, 2),
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ["threads", "dask", "processes"]
    parser.add_argument("--executors", nargs="*", default=["threads", "dask"], choices=kinds)
    parser.add_argument("--processes", type=int, default=4, help="worker processes of Dask")
    parser.add_argument("--in-flight", type=int, default=64, help="program calls at a time")
    parser.add_argument("--latency", type=float, default=1.0, help="mean latency in seconds")
    parser.add_argument("--calls", type=int, default=6000, help="program calls of the search, at most")
    parser.add_argument("--output", type=Path, default=RESULTS / "executors.json")
    arguments = parser.parse_args()
    print(SETUP, flush=True)
    for kind in arguments.executors:
        cell: Cell = {
            "executor": kind,
            "processes": {"threads": 1, "dask": arguments.processes, "processes": arguments.in_flight}[kind],
            "in_flight": arguments.in_flight,
            "latency": arguments.latency,
            "max_calls": arguments.calls,
        }
        row = measure(cell)
        keep(row, cell, arguments.output)
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
