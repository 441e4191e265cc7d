"""GEPA's loop on the writers of a world, for the same number of calls."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from benchmarks.worlds import COMPONENT, World, Writer, one_of
from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalRefusedError
from mpromptune.model.space import FloatArray

# NOTE: the default of gepa.optimize and dspy.GEPA.
_MINIBATCH = 3


class _SpentError(Exception):
    """No call is left."""


class _Run:
    """Scores paid for one by one, until nothing is left."""

    def __init__(self, world: World, writer: Writer, calls: int, seed: int) -> None:
        self.world, self.writer, self.left, self.seed = world, writer, calls, seed
        self.rng = np.random.default_rng(seed)
        self.proposals = 0
        self.full: dict[int, FloatArray] = {}  # index to scores on all examples

    def pay(self) -> None:
        if not self.left:
            raise _SpentError
        self.left -= 1

    def scores(self, index: int, examples: Sequence[int]) -> FloatArray:
        scores = []
        for example in examples:
            self.pay()
            scores.append(self.world.score({COMPONENT: index}, example))
        return np.array(scores)

    def evaluate(self, index: int) -> None:
        """A full evaluation; one that the budget cuts short does not count."""
        self.full[index] = self.scores(index, range(self.world.n_examples))

    def child(self, parent: int) -> int | None:
        """The index of a new candidate; None if it was refused, which costs as much."""
        self.pay()
        number, index = self.proposals, max(self.world.texts) + 1
        self.proposals += 1
        params = {COMPONENT: parent}
        try:
            self.writer.propose(Brief(number, COMPONENT, index, params, standings=(), seed=self.seed))
        except ProposalRefusedError:
            return None
        return index

    def minibatches(self) -> Iterator[list[int]]:
        """Three examples at a time, shuffled anew when all have had their turn."""
        while True:
            order = self.rng.permutation(self.world.n_examples).tolist()
            order += order[: -len(order) % _MINIBATCH]
            for i in range(0, len(order), _MINIBATCH):
                yield order[i : i + _MINIBATCH]


def gepa(world: World, writers: Sequence[Writer], calls: int, seed: int) -> dict[str, int]:
    """Reflective mutation as in ``gepa.optimize``; the highest mean on all validation examples wins.

    L. A. Agrawal et al., GEPA: Reflective prompt evolution can outperform reinforcement learning, 2025 (arXiv
    2507.19457). The baseline is evaluated in full. Then, again and again, a parent is drawn from the Pareto
    front over examples and scored on a minibatch; unless all of it is right, a child is written and scored
    on the same examples; a child with a higher sum is evaluated in full. Selection is the package's own.

    Chosen here: minibatches are of the validation examples, as where ``gepa.optimize`` has one set for both;
    as there, every score is paid for, even of a pair scored before. A proposal costs one call; of several
    writers, one is drawn for each. One component has no use of a merge. A full evaluation that the budget
    cuts short is not counted, where the package overspends.
    """
    from gepa.gepa_utils import select_program_candidate_from_pareto_front as select

    run, choice = _Run(world, one_of(writers), calls, seed), random.Random(seed)
    best = world.baseline[COMPONENT]
    with suppress(_SpentError):
        run.evaluate(best)
        for examples in run.minibatches():
            indices = list(run.full)
            means = [float(run.full[i].mean()) for i in indices]
            best = indices[int(np.argmax(means))]
            parent = indices[select(pareto_front(np.stack(list(run.full.values()))), means, choice)]
            before = run.scores(parent, examples)
            if before.min() >= 1.0 or (child := run.child(parent)) is None:
                continue
            if run.scores(child, examples).sum() > before.sum():
                run.evaluate(child)
    return {COMPONENT: best}


def pareto_front(scores: FloatArray) -> dict[int, set[int]]:
    """For each example, the rows of ``candidates x examples`` with the highest score on it."""
    return {e: set(np.flatnonzero(column == column.max()).tolist()) for e, column in enumerate(scores.T)}
