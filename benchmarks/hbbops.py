"""HbBoPS-style search: Hyperband over validation examples, whose members a GP over embeddings proposes.

After L. Schneider et al., Hyperband-based Bayesian optimization for black-box prompt selection, 2025. The
kernel is this package's instead of a deep one; rungs are nested, so that configurations are compared on the
same examples and none is paid for twice; brackets are repeated until the calls are spent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.tables import Task
from mpromptune.model.acquisition import PosteriorTable, expected_improvement, ranked
from mpromptune.model.embedding import as_embedder, geometry_of
from mpromptune.model.space import Row
from mpromptune.model.surrogate import fit, quiet_single_thread

# Halving rate, examples of the smallest rung (at least), and observations that a model takes.
_ETA, _SMALLEST, _ENOUGH = 2, 10, 4


class _SpentError(Exception):
    """The calls do not pay for what was asked."""


@dataclass
class _Ledger:
    """Scores on nested examples, each paid for once."""

    problem: Task
    left: int
    order: list[int]
    scores: dict[Row, list[float]] = field(default_factory=dict)

    def mean(self, row: Row, n: int) -> float:
        """Mean score on the first ``n`` examples."""
        have = self.scores.setdefault(row, [])
        self.left -= max(0, n - len(have))
        if self.left < 0:
            raise _SpentError
        params = self.problem.space.params(row)
        have += [self.problem.score(params, e) for e in self.order[len(have) : n]]
        return float(np.mean(have[:n]))


def hbbops(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """The best mean among the configurations measured on most examples."""
    rng = np.random.default_rng(seed)
    ledger = _Ledger(problem, calls, rng.permutation(problem.n_examples).tolist())
    geometries = geometry_of(problem.space, as_embedder(problem.embed))
    top = max(0, int(math.log(problem.n_examples / _SMALLEST, _ETA)))
    rungs = [max(1, problem.n_examples // _ETA ** (top - i)) for i in range(top + 1)]
    try:
        while len(ledger.scores) < problem.space.size:  # otherwise nothing new is left to propose
            for skipped in range(top + 1):  # the bracket of all rungs first, that of the last rung last
                _bracket(ledger, rungs[skipped:], len(rungs), geometries, rng)
    except _SpentError:
        pass
    best = max(ledger.scores, key=lambda r: (len(ledger.scores[r]), sum(ledger.scores[r])))
    return problem.space.params(best)


def _bracket(ledger: _Ledger, rungs: list[int], n_rungs: int, geometries: Any, rng: Any) -> None:
    size = math.ceil(n_rungs / len(rungs) * _ETA ** (len(rungs) - 1))
    alive: list[Row] = []
    while len(alive) < size and (row := _proposal(ledger, geometries, rng)) is not None:
        alive.append(row)
        ledger.mean(row, rungs[0])
    for below, examples in itertools.pairwise(rungs):
        means = np.array([ledger.mean(row, below) for row in alive])
        best = np.argsort(-means, kind="stable")[: max(1, len(alive) // _ETA)]
        alive = [alive[i] for i in best]
        for row in alive:
            ledger.mean(row, examples)


def _proposal(ledger: _Ledger, geometries: Any, rng: np.random.Generator) -> Row | None:
    """The unmeasured configuration with most expected improvement on the largest rung with enough data."""
    new = [tuple(r) for r in ledger.problem.space.rows().tolist() if tuple(r) not in ledger.scores]
    lengths = sorted((len(s) for s in ledger.scores.values()), reverse=True)
    if not new or len(lengths) < _ENOUGH:
        return new[int(rng.integers(len(new)))] if new else None
    n = lengths[_ENOUGH - 1]
    rows = [row for row, scores in ledger.scores.items() if len(scores) >= n]
    values = torch.tensor([[ledger.mean(row, n)] for row in rows], dtype=torch.float64)
    measured = torch.tensor(rows, dtype=torch.float64)
    model = fit(measured, values, geometries)
    table = PosteriorTable(*model.joint(torch.tensor(new, dtype=torch.float64)))
    acqf = expected_improvement(table, float(ranked(model, measured)[1][0]), seed=len(rows))
    with torch.no_grad(), quiet_single_thread():
        gains = acqf(table.positions.unsqueeze(-2))
    return new[int(gains.argmax())]
