"""Memory of a long compile: `python -m benchmarks.memory`. Linux only.

A program of four predictors, a simulated LM without latency, 2000 trials. The resident memory of the
process is read after a garbage collection at every hundredth trial, from within the search; and once
more, as live, after the allocator has given back what was freed.

The sampler is "random", so that a minute is enough, and blocks have two examples: what a trial leaves
behind is the same as with any. `--sampler qei --trials 400` measures the default sampler. DSPy itself
keeps the last 10 000 LM requests of a process; `--history` leaves it that, which is otherwise off.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy

import mpromptune
from benchmarks.lms import SimulatedLM
from benchmarks.runner import RESULTS, keep, quiet
from benchmarks.wallclock import hashed

# Memory is to stay within a tenth of what it is here.
SETTLED = 200
BLOCK = 2
N_TRAIN, N_VALIDATION = 20, 40


class Chain(dspy.Module):  # type: ignore[misc]
    """Four predictors, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = dspy.Predict("question -> plan")
        self.draft = dspy.Predict("question, plan -> draft")
        self.check = dspy.Predict("question, draft -> remarks")
        self.solve = dspy.Predict("question, draft, remarks -> answer")

    def forward(self, question: str) -> Any:
        """Every predictor sees what the one before it said."""
        plan = self.plan(question=question).plan
        draft = self.draft(question=question, plan=plan).draft
        remarks = self.check(question=question, draft=draft).remarks
        return self.solve(question=question, draft=draft, remarks=remarks)


class Enough(SystemExit):
    """Ends the compile, without a last look at what was measured."""


@dataclass
class Watch:
    """A callback of the search that reads the memory every so many trials.

    Attributes:
        last: The trial that is the last one.
        every: Trials from one reading to the next.
        readings: Trials, seconds, resident memory (MB), and that without what the allocator holds.
    """

    last: int
    every: int = 100
    readings: list[dict[str, float]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    trials: int = 0

    def __call__(self, study: Any, trial: Any) -> None:
        """Called after every trial."""
        self.trials += 1
        if self.trials % self.every:
            return
        gc.collect()
        seconds, before = round(time.perf_counter() - self.began, 1), round(resident(), 1)
        trim()
        now = round(resident(), 1)
        self.readings.append({"trials": self.trials, "seconds": seconds, "resident": before, "live": now})
        line = "{trials:6d} trials {seconds:8.1f} s {resident:8.1f} MB {live:8.1f} MB live"
        print(line.format(**self.readings[-1]), flush=True)
        if self.trials >= self.last:
            raise Enough

    def growth(self, of: str) -> float:
        """The most by which a reading after the first `SETTLED` trials differs from that one."""
        settled = [r[of] for r in self.readings if r["trials"] >= SETTLED]
        return round(max(abs(megabytes / settled[0] - 1) for megabytes in settled), 4)


def resident() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def trim() -> None:
    """Has glibc give back what was freed, which it otherwise keeps in part."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(sampler: str, trials: int, threads: int, history: bool) -> dict[str, Any]:
    """So many trials of a compile; what comes after them is another matter."""
    examples = [
        dspy.Example(question=f"{a}+{a + 3}", answer=str(2 * a + 3)) for a in range(N_TRAIN + N_VALIDATION)
    ]
    examples = [example.with_inputs("question") for example in examples]
    watch, lm = Watch(trials), SimulatedLM(0.0)
    options = {"embedder": hashed} if sampler == "qei" else {}
    with dspy.context(lm=lm, disable_history=not history), contextlib.suppress(Enough):
        optimizer = mpromptune.MIPROv2(
            metric=lambda example, prediction, trace=None: example.answer == prediction.answer,
            auto=None,
            num_candidates=10,
            num_threads=threads,
        )
        optimizer.compile(
            Chain(),
            trainset=examples[:N_TRAIN],
            valset=examples[N_TRAIN:],
            num_trials=trials,
            sampler=sampler,
            block_size=BLOCK,
            confirm=False,
            max_calls=BLOCK * trials * 2,
            callbacks=[watch],
            **options,
        )
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    setup = {"sampler": sampler, "history": history, "threads": threads, "block_size": BLOCK}
    return {
        **setup,
        "lm_calls": lm.used().calls,
        "growth": watch.growth("resident"),
        "growth_live": watch.growth("live"),
        "peak": peak,
        "readings": watch.readings,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sampler", default="random", choices=["random", "tpe", "qei"])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--history", action="store_true", help="let DSPy keep its last 10 000 requests")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--output", default="memory.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    quiet()
    logging.disable(logging.WARNING)
    row = measure(arguments.sampler, arguments.trials, arguments.threads, arguments.history)
    within = f"{row['growth']:.1%} (live: {row['growth_live']:.1%})"
    print(f"within {within} of the memory at {SETTLED} trials; peak {row['peak']} MB")
    cell = {name: row[name] for name in ("sampler", "history")}
    keep(row, cell, RESULTS / arguments.output)


if __name__ == "__main__":
    main()
