"""Several coordinators on one PostgreSQL study: `python -m benchmarks.coordinators`.

1, 2 and 4 processes of 8 threads each share one search with a language model that takes a second.
What counts is trials per second, from the first call that begins to the last that ends, and
calls that were made twice. `--kills` has one of four processes killed at random every half minute
(`kill -9`, the one that leads among them) and another one take its place, over 1000 trials.

Each process keeps a log of its own of the calls that it begins and ends; the audit reads nothing else.
`--storage` is the URL of a server, where a database can be created and is not missed; without, one is
started, where PostgreSQL is installed. The sampler is "random", because the time of proposals is
what `benchmarks.proposal` measures; `--sampler qei` has both.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runner import RESULTS, keep, quiet

THREADS, BLOCK, N = 8, 5, 100
LATENCY = 1.0
# Trials of a process in a run without kills.
EACH = 80
# Seconds between two kills; those without a sign of life after which a process is taken for dead are 10.
KILL_EVERY = 30.0

Pair = tuple[int, int, int]


def take_part(storage: str, number: int, log: Path, trials: int, sampler: str, start: Any) -> None:
    """A process: ready, it waits for the others, and logs its calls as they begin and end."""
    import logging

    from mpromptune import PromptSpace, search
    from mpromptune.sampling.sampler import qEISampler

    quiet()
    logging.disable(logging.WARNING)
    space = PromptSpace({"a": [f"{'a' * i} b" for i in range(20)], "b": [f"{'b' * i} c" for i in range(20)]})
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def score(params: dict[str, int], example: int) -> float:
        pair = params["a"], params["b"], example
        os.write(file, f"start {time.time()} {pair}\n".encode())
        time.sleep(LATENCY)
        os.write(file, f"end {time.time()} {pair}\n".encode())
        return random.Random(repr(pair)).random()

    if start is not None:
        start.wait()
    search(
        space,
        score,
        n_examples=N,
        max_calls=trials * BLOCK,
        sampler=qEISampler(embedder="index", seed=0) if sampler == "qei" else sampler,
        num_threads=THREADS,
        batch_size=8,
        block_size=BLOCK,
        confirm=False,
        storage=storage,
        study_name=f"{trials} trials",
        coordinators=number,
    )


def read(log: Path, what: str) -> list[tuple[float, str]]:
    """When each call began, or ended, and its pair; of a killed process, without a torn last line."""
    lines = [line.split(" ", 2) for line in log.read_text().splitlines() if line.endswith(")")]
    return [(float(at), pair) for kind, at, pair in lines if kind == what]


def audit(logs: list[Path], killed: list[Path]) -> dict[str, Any]:
    """Throughput, and calls that were made twice: because of a kill, and for no reason."""
    begun = Counter(pair for log in logs for _, pair in read(log, "start"))
    excused = Counter(pair for log in killed for _, pair in read(log, "start"))
    twice = {pair: count - 1 for pair, count in begun.items() if count > 1}
    first = min(at for log in logs for at, _ in read(log, "start"))
    last = max(at for log in logs for at, _ in read(log, "end"))
    return {
        "trials": len(begun) // BLOCK,
        "seconds": round(last - first, 1),
        "trials_per_second": round(len(begun) / BLOCK / (last - first), 3),
        "kills": len(killed),
        "again_after_kills": sum(min(count, excused[pair]) for pair, count in twice.items()),
        "duplicates": sum(max(0, count - excused[pair]) for pair, count in twice.items()),
    }


def measure(storage: str, number: int, sampler: str) -> dict[str, Any]:
    """So many processes that nobody kills."""
    context = multiprocessing.get_context("spawn")
    start, trials = context.Barrier(number), EACH * number
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory) / f"{i}.log" for i in range(number)]
        run = partial(context.Process, target=take_part, daemon=True)
        processes = [run(args=(storage, number, log, trials, sampler, start)) for log in logs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return audit(logs, [])


def measure_killed(storage: str, number: int, sampler: str, trials: int) -> dict[str, Any]:
    """So many processes, of which one is killed now and then, and replaced."""
    context, rng = multiprocessing.get_context("spawn"), random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        logs: list[Path] = []  # of all processes
        killed: list[Path] = []
        running: dict[Path, Any] = {}

        def begin() -> None:
            log = Path(directory) / f"{len(logs)}.log"
            log.touch()
            arguments = storage, number, log, trials, sampler, None
            running[log] = context.Process(target=take_part, args=arguments, daemon=True)
            running[log].start()
            logs.append(log)

        for _ in range(number):
            begin()
        while all(process.is_alive() for process in running.values()):
            until = time.monotonic() + KILL_EVERY
            while time.monotonic() < until and all(p.is_alive() for p in running.values()):
                time.sleep(0.2)
            victim = rng.choice(list(running))
            # Of those that are about to read the result of a search that has ended, none is interesting.
            if all(p.is_alive() for p in running.values()) and read(victim, "start"):
                running[victim].kill()
                running.pop(victim).join()
                killed.append(victim)
                begin()
                print(f"killed one of {number}; {_begun(logs)} calls begun", flush=True)
        for process in running.values():
            process.join()
            assert process.exitcode == 0
        return audit(logs, killed)


def _begun(logs: list[Path]) -> int:
    return sum(len(read(log, "start")) for log in logs)


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """The URL of a database that is empty."""
    if url is not None:
        yield url
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import postgres

    with postgres.running() as running:
        yield running.url_of("benchmark")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coordinators", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kills", action="store_true", help="1000 trials by 4 processes, some killed")
    parser.add_argument("--trials", type=int, default=1000, help="with --kills")
    parser.add_argument("--sampler", default="random", choices=["random", "tpe", "qei"])
    parser.add_argument("--storage", help="URL of an empty database")
    parser.add_argument("--output", default="coordinators.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    with server(arguments.storage) as url:
        for number in [4] if arguments.kills else arguments.coordinators:
            cell = {"coordinators": number, "sampler": arguments.sampler, "killed": arguments.kills}
            load = os.getloadavg()[0]
            if arguments.kills:
                figures = measure_killed(url, number, arguments.sampler, arguments.trials)
            else:
                figures = measure(url, number, arguments.sampler)
            row = {**cell, "threads": THREADS, "latency": LATENCY, **figures, "load_before": round(load, 1)}
            print(row, flush=True)
            keep(row, cell, RESULTS / arguments.output)


if __name__ == "__main__":
    main()
