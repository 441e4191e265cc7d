"""The peers of the benchmark: published ways to find the best prompt with a fixed number of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.methods import METHODS
from benchmarks.peers import affordable_phases, phase_lengths, rasch
from mpromptune import PromptSpace

PEERS = ("sysrs", "ttts", "prompteval")


@dataclass
class Arms:
    """Prompts that are right on a fixed set of examples each; every call is written down."""

    scores: Any
    calls: list[tuple[int, int]] = field(default_factory=list)

    @property
    def space(self) -> PromptSpace:
        return PromptSpace({"0_predictor_instruction": [f"i{i}" for i in range(len(self.scores))]})

    @property
    def n_examples(self) -> int:
        return len(self.scores[0])

    @property
    def baseline(self) -> dict[str, int]:
        return {"0_predictor_instruction": 0}

    def score(self, params: Mapping[str, int], example: int) -> float:
        """One program call."""
        self.calls.append((params["0_predictor_instruction"], example))
        return float(self.scores[self.calls[-1][0]][example])

    def per_arm(self) -> list[int]:
        """How many calls each prompt got, in descending order."""
        return sorted(Counter(arm for arm, _ in self.calls).values(), reverse=True)


def coins(*skills: float, n_examples: int = 60, seed: int = 0) -> Arms:
    """Prompts that are right with these probabilities."""
    draws = np.random.default_rng(seed).random((len(skills), n_examples))
    return Arms((draws < np.array(skills)[:, None]).astype(float))


def run(method: str, arms: Arms, calls: int, seed: int = 0) -> int:
    return METHODS[method](arms, calls, seed, 4)["0_predictor_instruction"]


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("n_arms", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("calls", [0, 1, 2, 5, 11, 12, 13, 40, 200, 239, 10**5])
def test_no_more_calls_than_given(method: str, n_arms: int, calls: int) -> None:
    """Any budget, below one call a prompt and above all calls that there are, is kept to; no pair twice."""
    arms = coins(*np.linspace(0.2, 0.8, n_arms), n_examples=20)
    assert 0 <= run(method, arms, calls) < n_arms
    assert len(arms.calls) <= calls
    assert len(set(arms.calls)) == len(arms.calls)


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
def test_scores_that_are_all_the_same(method: str, score: float) -> None:
    """Nothing to choose by is no error."""
    arms = Arms(np.full((6, 30), score))
    assert 0 <= run(method, arms, 90) < 6


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("seed", range(5))
def test_an_arm_far_ahead_is_found(method: str, seed: int) -> None:
    """Right on 95 % against 30 % of the examples: found among eight with fifteen calls a prompt."""
    skills = [0.3] * 8
    skills[seed] = 0.95
    assert run(method, coins(*skills, seed=seed), 120, seed) == seed


@pytest.mark.parametrize("method", PEERS)
def test_with_calls_for_everything_the_best_mean_wins(method: str) -> None:
    """Where all examples can be paid for, only a prompt that is right on most of them comes back."""
    arms = coins(0.4, 0.5, 0.6, 0.5, n_examples=40)
    assert run(method, arms, 160) == int(np.argmax(arms.scores.mean(axis=1)))


@pytest.mark.parametrize("method", PEERS)
def test_same_seed_same_calls(method: str) -> None:
    """A run is a function of problem, budget and seed."""
    first, second, other = (coins(*np.linspace(0.3, 0.7, 9)) for _ in range(3))
    assert run(method, first, 100, 5) == run(method, second, 100, 5)
    run(method, other, 100, 6)
    assert first.calls == second.calls != other.calls


def test_schedule_of_successive_rejects() -> None:
    """K = 4, n = 30: L = 19/12, so 26 / L = 16.42 is divided by 4, 3 and 2, and rounded up."""
    assert phase_lengths(4, 30) == [5, 6, 9]
    assert phase_lengths(2, 10) == [4]  # L = 1: 8 / 2
    assert phase_lengths(1, 10) == []


def test_phases_end_with_the_examples() -> None:
    """With 7 examples, calls that the last phase cannot use lengthen the phases before it.

    K = 4 and 25 calls more than K or so make [5, 6, 9], cut to [5, 6, 7]: 5 + 6 + 7 + 7 = 25 calls. Larger
    budgets make [5, 7, 10] and [6, 7, 11], cut to 26 and 27 calls, and in the end all 28 are paid for.
    """
    assert affordable_phases(4, 25, 7) == [5, 6, 7]
    assert affordable_phases(4, 26, 7) == [5, 7, 7]
    assert affordable_phases(4, 27, 7) == [6, 7, 7]
    assert affordable_phases(4, 28, 7) == affordable_phases(4, 10**6, 7) == [7, 7, 7]


def test_successive_rejects_measures_all_on_the_same_examples() -> None:
    """Each prompt is measured on the first examples of one order, and one goes after each phase."""
    arms = coins(0.1, 0.3, 0.5, 0.7, n_examples=50)
    run("sysrs", arms, 29)
    assert arms.per_arm() == [9, 9, 6, 5]
    order = list(dict.fromkeys(example for _, example in arms.calls))
    for arm in range(4):
        mine = [example for other, example in arms.calls if other == arm]
        assert mine == order[: len(mine)]


def test_top_two_share_the_calls() -> None:
    """With one clear winner, it gets about half of the calls, as beta = 1/2 says, until its examples end."""
    arms = coins(0.95, 0.3, 0.3, 0.3, 0.3, n_examples=600)
    run("ttts", arms, 600)
    share = sum(arm == 0 for arm, _ in arms.calls) / 600
    assert 0.4 < share < 0.6


def test_top_two_go_on_when_the_leader_is_known() -> None:
    """A leader without examples left holds nobody up: the rest of the calls go to its challengers."""
    arms = coins(1.0, 0.4, 0.4, n_examples=20)
    assert run("ttts", arms, 50) == 0
    assert len(arms.calls) == 50


def test_prompteval_halves_and_spreads() -> None:
    """Eight prompts, 120 calls: 40 for 8, 40 for 4, 40 for 2, and examples are used equally often."""
    arms = coins(*np.linspace(0.1, 0.9, 8), n_examples=40)
    run("prompteval", arms, 120)
    assert arms.per_arm() == [35, 35, 15, 15, 5, 5, 5, 5]
    first = Counter(example for _, example in arms.calls[:40])
    assert set(first.values()) == {1}


def test_rasch_predicts_what_was_not_seen() -> None:
    """Made-up skills and difficulties are found again: less than half as far off as 1/2 for everything."""
    rng = np.random.default_rng(0)
    truth = 1 / (1 + np.exp(np.linspace(-2, 2, 120) - np.linspace(-2, 2, 40)[:, None]))
    seen = rng.random(truth.shape) < 0.6
    guess = rasch(np.where(seen, rng.random(truth.shape) < truth, 0).astype(float), seen)
    assert np.abs(guess - truth)[~seen].mean() < 0.5 * np.abs(0.5 - truth)[~seen].mean()


def test_rasch_is_at_the_minimum_of_its_loss() -> None:
    """One prompt, one example, right: logit 2 w solves 1 - p(2 w) = w / 100, by symmetry of both weights."""
    probability = rasch(np.ones((1, 1)), np.ones((1, 1), dtype=bool))[0, 0]
    half_logit = np.log(probability / (1 - probability)) / 2
    assert 1 - probability == pytest.approx(half_logit / 100, abs=2e-3)


@pytest.mark.parametrize("peer", quality.PEERS)
def test_peers_are_in_every_comparison(peer: str) -> None:
    """Tables, pools, shares and few-shot prompts: wherever one peer is measured, all are."""
    slices = ["headline", "means", "own", "budgets", "pools", "few-shot"]

    def places(method: str) -> list[dict[str, Any]]:
        cells = quality.chosen(slices, [*quality.PER_EXAMPLE, *quality.MEANS_ONLY, *quality.OWN], [method])
        return [{key: value for key, value in cell.items() if key != "method"} for cell in cells]

    # 5 + 1 + 3 tables; shares 1/4, 1/2 and 2, pools 18 and 162, and few-shot for two tables each.
    assert len(places(peer)) == 9 + 2 * 3 + 2 * 2 + 2
    assert places(peer) == places("halving")
