"""What the posterior makes of the scores, and what it expects of configurations that nobody has tried."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from embedders import letters

from mpromptune import PromptSpace
from mpromptune.engine.knowledge import Knowledge
from mpromptune.model.embedding import as_embedder
from mpromptune.model.space import Row
from mpromptune.sampling.encoding import encode_prompts

N = 20
TEXTS = [f"{'a' * i} style" for i in range(16)]
SMALL = PromptSpace({"style": TEXTS})
# 4096 configurations; the later a candidate, the better.
LARGE = PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(3)})
A, B, C = (0,), (1,), (2,)


def nothing(space: PromptSpace = SMALL, min_cold_start: int = 1) -> Knowledge:
    study = optuna.create_study(direction="maximize")
    return Knowledge(study, encode_prompts(space, as_embedder(letters)), N, min_cold_start)


def known(space: PromptSpace, n_rows: int) -> Knowledge:
    """Random configurations, each measured on a random half of 20 examples."""
    rng = np.random.default_rng(0)
    knowledge = nothing(space)
    for row in map(tuple, space.sample(10**6, rng)[rng.permutation(space.size)[:n_rows]].tolist()):
        examples = sorted(rng.choice(N, N // 2, replace=False).tolist())
        scores = [float(rng.random() < 0.2 + 0.6 * sum(row) / (15 * len(row))) for _ in examples]
        knowledge.ledger.add(row, dict(zip(examples, scores, strict=True)))
        knowledge.ledger.rounds += 1
    return knowledge


def test_nothing_measured_is_everything_to_gain() -> None:
    """Without a score there is no posterior, no reason to stop, and nobody is better than anybody."""
    knowledge = nothing(LARGE)
    assert knowledge.largest_gain((0, 0, 0), lambda row: True) == float("inf")
    means, deviations = knowledge.posterior([(0, 0, 0), (1, 1, 1)])
    assert (means.tolist(), deviations.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert knowledge.chance_of_gain((0, 0, 0), (1, 1, 1)) == 0.5
    assert knowledge.best_first([]) == []


def test_the_posterior_follows_the_scores() -> None:
    """Another score changes it; asking twice does not."""
    knowledge = known(SMALL, 6)
    before = knowledge.posterior([(3,)])[0].tolist()
    assert knowledge.posterior([(3,)])[0].tolist() == before
    row = knowledge.ledger.rows()[0]
    lacking = next(e for e in range(N) if e not in knowledge.ledger.means(row))
    knowledge.ledger.add(row, {lacking: 1.0})
    assert knowledge.posterior([(3,)])[0].tolist() != before


def test_an_example_that_was_answered_twice_counts_once() -> None:
    """With the mean of its answers: the same answers again teach nothing."""
    once, twice = known(SMALL, 6), known(SMALL, 6)
    for row in twice.ledger.rows():
        twice.ledger.add(row, twice.ledger.means(row))
    assert [v.tolist() for v in twice.posterior([(3,)])] == [v.tolist() for v in once.posterior([(3,)])]


def test_who_was_measured_on_hard_examples_is_not_thought_to_be_poor() -> None:
    """B is right on two of four that A fails on, C on three of four that A solves: B is the better one."""
    knowledge = nothing()
    knowledge.ledger.add(A, {e: float(e >= 10) for e in range(N)})
    knowledge.ledger.add(B, {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0})
    knowledge.ledger.add(C, {10: 1.0, 11: 1.0, 12: 1.0, 13: 0.0})
    assert knowledge.ledger.mean(B) < knowledge.ledger.mean(C)
    assert knowledge.best_first([A, B, C])[0] == B
    assert knowledge.chance_of_gain(B, C) > 0.5 > knowledge.chance_of_gain(C, B)


def test_the_standard_error_by_hand() -> None:
    """Variances of 0.5 and 0 within two pairs of scores: sqrt(0.25 / 100)."""
    knowledge = nothing()
    knowledge.ledger.add(A, {0: 0.0, 1: 1.0})
    knowledge.ledger.add(B, {0: 1.0, 1: 1.0})
    assert knowledge.standard_error(100) == pytest.approx(0.05)


def test_the_largest_gain_counts_open_configurations_only() -> None:
    """Less where its best is closed, and nothing where all are."""
    knowledge = known(SMALL, 8)
    leader = knowledge.best_first(knowledge.ledger.rows())[0]
    gains = {row: knowledge.largest_gain(leader, lambda r, row=row: r == row) for row in _rows(SMALL)}
    most = knowledge.largest_gain(leader, lambda row: True)
    assert most == pytest.approx(max(gains.values()))
    best = max(gains, key=lambda row: gains[row])
    assert knowledge.largest_gain(leader, lambda row: row != best) < most
    assert knowledge.largest_gain(leader, lambda row: False) == 0.0


def test_nothing_is_gained_over_a_leader_that_is_far_ahead() -> None:
    """One is always right and the others never are, on all examples."""
    space = PromptSpace({"style": TEXTS[:4]})
    knowledge = nothing(space)
    for row in _rows(space):
        knowledge.ledger.add(row, dict.fromkeys(range(N), float(row == C)))
    assert knowledge.largest_gain(C, lambda row: row != C) < 0.005
    assert knowledge.chance_of_gain(C, A) > 0.99


def test_configurations_are_drawn_until_enough_are_known() -> None:
    """Before ``min_cold_start`` have a score: those that nobody has asked for, and only open ones."""
    knowledge = nothing(min_cold_start=3)
    for row in (A, B):
        knowledge.ledger.add(row, {0: 1.0})
    asked = {A: {0}, B: {0}}
    rows = knowledge.propose(14, 100, lambda row: row != C, asked, np.random.default_rng(0))
    assert len(rows) == 14
    assert set(rows[:13]) == set(_rows(SMALL)) - {A, B, C}
    assert rows[13] in asked


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
def test_the_same_generator_gives_the_same_proposal(space: PromptSpace) -> None:
    """All randomness is handed in; what is closed is never proposed."""
    knowledge = known(space, 8)
    closed = knowledge.ledger.rows()[0]

    def propose() -> list[Row]:
        return knowledge.propose(6, 200, lambda row: row != closed, {}, np.random.default_rng(3))

    first = propose()
    assert first == propose()
    assert len(first) == 6
    assert closed not in first


def test_drawn_are_all_configurations_or_a_sample() -> None:
    """Up to 500, those that were measured among them with the same posterior; more are a sample of 500."""
    small = known(PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(2)}), 20)
    drawn = small.drawn()
    assert drawn.shape == (256, 2)
    means, deviations = small.posterior(small.ledger.rows())
    found = [int(np.argmin(np.abs(drawn[:, 0] - mean))) for mean in means.tolist()]
    assert drawn[found, 0] == pytest.approx(means)
    assert sorted(drawn[found, 1]) == pytest.approx(sorted(deviations.tolist()))
    assert len(known(LARGE, 20).drawn()) == pytest.approx(500, abs=40)  # what is drawn twice counts once


def test_nothing_is_drawn_from_nothing_known() -> None:
    """Before any trial, all configurations are alike; and texts have explained nothing yet."""
    assert len(set(map(tuple, nothing(LARGE).drawn().tolist()))) == 1
    assert nothing(LARGE).text_chance() is None


def test_texts_are_judged_only_where_there_are_any() -> None:
    """Scores that rise with the letters of a text are explained by it; by identity, nothing is said."""
    told = known(SMALL, 16)
    assert told.text_chance() == pytest.approx(0.0, abs=0.1)
    blind = Knowledge(told.study, encode_prompts(SMALL, None), N, ledger=told.ledger)
    assert blind.text_chance() is None


def _rows(space: PromptSpace) -> list[Row]:
    return [tuple(row) for row in space.rows().tolist()]
