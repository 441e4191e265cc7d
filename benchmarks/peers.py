"""Published ways to find the best prompt with a fixed number of calls, each a method of the benchmark.

All of them take prompts in a random order, which breaks ties; none pays twice for a prompt on an example,
and none depends on ``q``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from benchmarks.tables import Task
from mpromptune.model.space import FloatArray

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class _Arms:
    """The prompts in a random order, and the scores paid for: ``P x N``, 0 where there is none."""

    problem: Task
    left: int
    rng: np.random.Generator
    params: list[dict[str, int]] = field(init=False)
    scores: FloatArray = field(init=False)
    seen: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        space = self.problem.space
        self.params = [space.params(row) for row in self.rng.permutation(space.rows())]
        self.scores = np.zeros((len(self.params), self.problem.n_examples))
        self.seen = np.zeros(self.scores.shape, dtype=bool)

    def measure(self, arm: int, example: int) -> float:
        """One call; its score."""
        self.left -= 1
        assert self.left >= 0
        assert not self.seen[arm, example]
        self.seen[arm, example] = True
        score = self.scores[arm, example] = self.problem.score(self.params[arm], example)
        return float(score)


def sysrs(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """Synchronized successive rejects: all on the same examples, and after each phase the worst one goes.

    Z. Lyu et al., Cutting LLM evaluation costs with SySRs, 2026 (arXiv 2606.07726): successive rejects of
    J.-Y. Audibert, S. Bubeck and R. Munos, Best arm identification in multi-armed bandits, 2010, with the
    same examples for all. Of the former only the abstract was at hand; the phases are the latter's
    (`phase_lengths`). Chosen here, for lack of a word on it: no phase is longer than there are examples, and
    the schedule is that of the largest budget whose phases, so shortened, the calls pay for. With fewer calls
    than prompts, as many prompts as calls take part, each on one example.
    """
    rng = np.random.default_rng(seed)
    arms = _Arms(problem, calls, rng)
    order = rng.permutation(problem.n_examples).tolist()
    alive, done = list(range(min(len(arms.params), max(1, calls)))), 0
    for length in affordable_phases(len(alive), calls, problem.n_examples):
        for example in order[done:length]:
            for arm in alive:
                arms.measure(arm, example)
        done = length
        alive.remove(min(alive, key=lambda arm: arms.scores[arm].sum()))
    return arms.params[alive[0]]


def phase_lengths(n_arms: int, calls: int) -> list[int]:
    """Examples that each arm has been measured on after phases 1 to K - 1 of successive rejects.

    n_k = ceil((n - K) / (L(K) (K + 1 - k))) with L(K) = 1/2 + 1/2 + 1/3 + ... + 1/K, for n >= K calls.
    """
    scale = 0.5 + sum(1 / i for i in range(2, n_arms + 1))
    return [math.ceil((calls - n_arms) / (scale * (n_arms + 1 - k))) for k in range(1, n_arms)]


def affordable_phases(n_arms: int, calls: int, n_examples: int) -> list[int]:
    """`phase_lengths`, none over ``n_examples``, of the largest budget that makes them cost <= ``calls``."""

    def lengths(budget: int) -> list[int]:
        return [min(n, n_examples) for n in phase_lengths(n_arms, budget)]

    def cost(budget: int) -> int:
        phases = lengths(budget)  # each is that of the arm rejected after it
        return sum(phases) + sum(phases[-1:])  # the winner goes through the last one too

    everything = n_arms + math.ceil(n_arms * n_examples * (1 + math.log(n_arms)))  # L(K) <= 1 + log K
    budgets = range(n_arms, everything + 1)
    return lengths(budgets[bisect_right(budgets, calls, key=cost) - 1])


# Posterior draws until a challenger turns up, at most.
_DRAWS = 32


def ttts(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """Top-two Thompson sampling with Beta-Bernoulli posteriors; the highest posterior mean wins.

    D. Russo, Simple Bayesian algorithms for best-arm identification, 2016 (Operations Research, 2020), with
    uniform priors and beta = 1/2: the best arm of a posterior draw is measured, or, every other time on
    average, that of the first draw with another best arm. Chosen here: an arm has its examples in a random
    order of its own, and a draw whose best arm has none left is drawn again; after 32 draws in vain
    it is the arm that came closest to being the best; a score between 0 and 1 counts as that part
    of a success. The paper is about rates of posteriors and returns nothing after a fixed number of calls.
    """
    rng = np.random.default_rng(seed)
    arms = _Arms(problem, calls, rng)
    orders = rng.permuted(np.tile(np.arange(problem.n_examples), (len(arms.params), 1)), axis=1).tolist()
    won, lost = np.ones(len(orders)), np.ones(len(orders))
    closed = np.zeros(len(orders), dtype=bool)
    while arms.left > 0 and not closed.all():
        arm = _best_of_draw(won, lost, closed, rng)
        if rng.random() < 0.5:
            others = closed.copy()
            others[arm] = True
            arm = arm if others.all() else _best_of_draw(won, lost, others, rng)
        score = arms.measure(arm, orders[arm].pop())
        won[arm] += score
        lost[arm] += 1.0 - score
        closed[arm] = not orders[arm]
    return arms.params[int(np.argmax(won / (won + lost)))]


def _best_of_draw(won: FloatArray, lost: FloatArray, excluded: BoolArray, rng: np.random.Generator) -> int:
    """The best arm of the first posterior draw in which that is none of those excluded."""
    first = rng.beta(won, lost)
    if not excluded[best := int(np.argmax(first))]:
        return best
    draws = rng.beta(won, lost, size=(_DRAWS - 1, len(won)))
    allowed = np.where(excluded, -np.inf, draws)
    behind = draws.max(axis=1) - allowed.max(axis=1)  # 0 where an allowed arm is the best
    return int(np.argmax(allowed[np.argmin(behind)]))


# The inverse of the ridge penalty in the authors' code.
_INVERSE_PENALTY = 100.0


def prompteval(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """PromptEval with elimination: the better half by a Rasch model of all scores so far goes on.

    F. Maia Polo et al., Efficient multi-prompt evaluation of LLMs, 2024 (arXiv 2405.17202), as in their
    experiment on best-prompt identification (github.com/felipemaiapolo/prompteval, bai_evaluation.py): equal
    phases; a call goes to the prompt in the race with fewest, on the example with fewest; a prompt's
    performance is the mean of its scores and, where there is none, of the model's probabilities; the better
    half, rounded down, goes on. Chosen here: the model without covariates of prompts (20 principal
    components of embeddings, another choice of theirs, were no better on the focus tables); and floor(log2 P)
    phases where they have ceil(log2 P), because after floor(log2 P) one prompt is left.
    """
    arms = _Arms(problem, calls, np.random.default_rng(seed))
    active = np.arange(len(arms.params))
    phases = len(active).bit_length() - 1
    for phase in range(phases):
        _stratified(arms, active, calls // phases + (calls % phases if phase == 0 else 0))
        if arms.seen[active].all():
            break
        values = np.where(arms.seen, arms.scores, rasch(arms.scores, arms.seen)).mean(axis=1)
        active = active[np.argsort(-values[active], kind="stable")[: len(active) // 2]]
    return arms.params[int(active[np.argmax(arms.scores[active].sum(axis=1))])]


def _stratified(arms: _Arms, active: Any, calls: int) -> None:
    by_arm, by_example = arms.seen.sum(axis=1)[active], arms.seen.sum(axis=0)
    for _ in range(calls):
        row = _random_minimum(by_arm, arms.rng)
        if by_arm[row] == len(by_example):
            return
        example = _random_minimum(np.where(arms.seen[active[row]], np.inf, by_example), arms.rng)
        arms.measure(int(active[row]), example)
        by_arm[row] += 1
        by_example[example] += 1


def _random_minimum(values: Any, rng: np.random.Generator) -> int:
    smallest = np.flatnonzero(values == values.min())
    return int(smallest[rng.integers(len(smallest))])


def rasch(scores: FloatArray, seen: BoolArray) -> FloatArray:
    """P(right) = logistic(prompt - example) by ridge logistic regression on the scores seen: ``P x N``."""
    n = len(scores)

    def logits(weights: FloatArray) -> FloatArray:
        return weights[:n, None] - weights[n:]

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        z = logits(weights)
        residual = np.where(seen, expit(z) - scores, 0.0)
        gradient = np.concatenate([residual.sum(axis=1), -residual.sum(axis=0)])
        value = np.where(seen, np.logaddexp(0.0, z) - scores * z, 0.0).sum()
        ridge = weights / _INVERSE_PENALTY
        return float(value + weights @ ridge / 2), gradient + ridge

    fitted = minimize(loss, np.zeros(sum(scores.shape)), jac=True, method="L-BFGS-B", options={"gtol": 1e-3})
    probabilities: FloatArray = expit(logits(fitted.x))
    return probabilities
