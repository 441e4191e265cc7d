"""The methods compared: each takes a problem, a budget and a seed, and returns a configuration."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from benchmarks.hbbops import hbbops
from benchmarks.peers import prompteval, sysrs, ttts
from benchmarks.tables import Task
from mpromptune import qEISampler, search
from mpromptune.engine.batches import Confirm
from mpromptune.engine.minibatches import stock_calls
from mpromptune.sampling.encoding import distributions_of
from mpromptune.sampling.samplers import OpenSampler

Method = Callable[[Task, int, int, int], dict[str, int]]  # problem, calls, seed, q
Params = tuple[tuple[str, int], ...]

_MINIBATCH, _FULL_STEPS = 35, 5


def stock(sampler: Callable[[int], BaseSampler]) -> Method:
    """DSPy's protocol: minibatches of 35, and every 5 trials the best one on all examples.

    Stock samples components that form a product; where only listed combinations exist, a proposal
    is replaced by the existing one with most components in common.
    """

    def run(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
        rng = random.Random(seed)
        space = problem.space
        study = optuna.create_study(
            direction="maximize", sampler=OpenSampler(sampler(seed), space, lambda row: True, seed)
        )
        distributions = distributions_of(space)

        def measure(params: dict[str, int], n: int) -> float:
            examples = rng.sample(range(problem.n_examples), n)
            return float(np.mean([problem.score(params, e) for e in examples]))

        def full(params: dict[str, int]) -> None:
            value = best[_key(params)] = measure(params, problem.n_examples)
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))

        best: dict[Params, float] = {}
        minibatches: dict[Params, list[float]] = defaultdict(list)
        full(problem.baseline)
        num_trials = trials_for(calls, problem.n_examples)
        for step in range(1, num_trials + 1):
            trial = study.ask(distributions)
            value = measure(trial.params, min(_MINIBATCH, problem.n_examples))
            study.tell(trial, value)
            minibatches[_key(trial.params)].append(value)
            if step % _FULL_STEPS == 0 or step == num_trials:
                open_ = {k: float(np.mean(v)) for k, v in minibatches.items() if k not in best}
                if open_:
                    full(_best(open_))
        return _best(best)

    return run


def _key(params: dict[str, Any]) -> Params:
    return tuple(params.items())


def _best(means: dict[Params, float]) -> dict[str, int]:
    winner: Params = max(means, key=lambda key: means[key])
    return dict(winner)


def trials_for(calls: int, n_examples: int) -> int:
    """The most trials that DSPy's protocol fits into ``calls`` (at least one)."""
    trials = 1
    while stock_calls(trials + 1, n_examples) <= calls:
        trials += 1
    return trials


def halving(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """Paired successive halving: all on the same examples, the better half goes on."""
    space, order = problem.space, np.random.default_rng(seed).permutation(problem.n_examples)
    alive = space.rows()
    totals = np.zeros(len(alive))
    rungs = max(1, math.ceil(math.log2(len(alive))))
    seen, spent = 0, 0
    for rung in range(rungs):
        share = (calls - spent) // (rungs - rung)
        more = min(share // len(alive), problem.n_examples - seen)
        new = order[seen : seen + more].tolist()
        seen, spent = seen + more, spent + more * len(alive)
        totals += [sum(problem.score(space.params(row), e) for e in new) for row in alive]
        kept = np.argsort(-totals, kind="stable")[: max(1, len(alive) // 2)]
        alive, totals = alive[kept], totals[kept]
    return space.params(alive[0])


def ours(
    sampler: str, embeddings: bool = True, confirm: Confirm = "auto", num_threads: int = 1, **arguments: Any
) -> Method:
    """`search` with one of its samplers; further arguments are qEISampler's.

    Winner and baseline end fully measured with ``confirm=True``, if that leaves calls to explore with. Trials
    do not depend on ``num_threads`` up to 32 of them.
    """

    def run(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
        chosen: Any = sampler
        if sampler == "qei":
            embedder = problem.embed if embeddings else "index"
            chosen = qEISampler(embedder=embedder, seed=seed, **arguments)
        result = search(
            problem.space,
            problem.score,
            n_examples=problem.n_examples,
            max_calls=calls,
            sampler=chosen,
            num_threads=num_threads,
            batch_size=q,
            baseline=problem.baseline,
            seed=seed,
            confirm="auto" if confirm is True and calls < 3 * problem.n_examples else confirm,
        )
        assert result.calls <= calls
        return result.best_params

    return run


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


METHODS: dict[str, Method] = {
    "stock-tpe": stock(_tpe),
    "stock-gp": stock(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "stock-random": stock(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "halving": halving,
    "hbbops": hbbops,
    "sysrs": sysrs,
    "ttts": ttts,
    "prompteval": prompteval,
    "search-random": ours("random"),
    "search-tpe": ours("tpe"),
    "search-qei-index": ours("qei", embeddings=False),
    "search-qei": ours("qei"),
    "search-qei-confirmed": ours("qei", confirm=True),
    "search-qei-unconfirmed": ours("qei", confirm=False),
    "search-qei-64-threads": ours("qei", num_threads=64),
    "search-qei-128-threads": ours("qei", num_threads=128),
}
