"""What the posterior makes of the scores, and what it expects of configurations that nobody has tried."""

from __future__ import annotations

import numpy as np
import pytest
from embedders import letters

from mpromptune import PromptSpace
from mpromptune.engine.evidence import Evidence
from mpromptune.engine.scores import ScoreTable
from mpromptune.model.embedding import as_embedder
from mpromptune.model.space import Row
from mpromptune.sampling.encoding import encode_prompts

N = 20
TEXTS = [f"{'a' * i} style" for i in range(16)]
SMALL = PromptSpace({"style": TEXTS})
# 4096 configurations; the later a candidate, the better.
LARGE = PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(3)})
A, B, C = (0,), (1,), (2,)


def nothing(space: PromptSpace = SMALL, min_cold_start: int = 1) -> Evidence:
    return Evidence(encode_prompts(space, as_embedder(letters)), ScoreTable(N), min_cold_start)


def add(evidence: Evidence, row: Row, scores: dict[int, float]) -> None:
    evidence.table.add(row, tuple(scores), scores)


def known(space: PromptSpace, n_rows: int) -> Evidence:
    """Random configurations, each measured on a random half of 20 examples."""
    rng = np.random.default_rng(0)
    evidence = nothing(space)
    for row in map(tuple, space.sample(10**6, rng)[rng.permutation(space.size)[:n_rows]].tolist()):
        examples = sorted(rng.choice(N, N // 2, replace=False).tolist())
        scores = [float(rng.random() < 0.2 + 0.6 * sum(row) / (15 * len(row))) for _ in examples]
        add(evidence, row, dict(zip(examples, scores, strict=True)))
        evidence.table.batches += 1
    return evidence


def test_nothing_measured_is_everything_to_gain() -> None:
    """Without a score there is no posterior, no reason to stop, and nobody is better than anybody."""
    evidence = nothing(LARGE)
    assert evidence.largest_gain((0, 0, 0), lambda row: True) == float("inf")
    means, deviations = evidence.posterior([(0, 0, 0), (1, 1, 1)])
    assert (means.tolist(), deviations.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert evidence.chance_of_gain((0, 0, 0), (1, 1, 1)) == 0.5
    assert evidence.best_first([]) == []


def test_the_posterior_follows_the_scores() -> None:
    """Another score changes it; asking twice does not."""
    evidence = known(SMALL, 6)
    before = evidence.posterior([(3,)])[0].tolist()
    assert evidence.posterior([(3,)])[0].tolist() == before
    row = evidence.table.rows[0]
    lacking = next(e for e in range(N) if e not in evidence.table.means(row))
    add(evidence, row, {lacking: 1.0})
    assert evidence.posterior([(3,)])[0].tolist() != before


def test_an_example_that_was_answered_twice_counts_once() -> None:
    """With the mean of its answers: the same answers again teach nothing."""
    once, twice = known(SMALL, 6), known(SMALL, 6)
    for row in twice.table.rows:
        add(twice, row, twice.table.means(row))
    assert [v.tolist() for v in twice.posterior([(3,)])] == [v.tolist() for v in once.posterior([(3,)])]


def test_who_was_measured_on_hard_examples_is_not_thought_to_be_poor() -> None:
    """B is right on two of four that A fails on, C on three of four that A solves: B is the better one."""
    evidence = nothing()
    add(evidence, A, {e: float(e >= 10) for e in range(N)})
    add(evidence, B, {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0})
    add(evidence, C, {10: 1.0, 11: 1.0, 12: 1.0, 13: 0.0})
    assert evidence.table.mean(B) < evidence.table.mean(C)
    assert evidence.best_first([A, B, C])[0] == B
    assert evidence.chance_of_gain(B, C) > 0.5 > evidence.chance_of_gain(C, B)


def test_the_standard_error_by_hand() -> None:
    """Variances of 0.5 and 0 within two pairs of scores: sqrt(0.25 / 100)."""
    evidence = nothing()
    add(evidence, A, {0: 0.0, 1: 1.0})
    add(evidence, B, {0: 1.0, 1: 1.0})
    assert evidence.standard_error(100) == pytest.approx(0.05)


def test_the_largest_gain_counts_open_configurations_only() -> None:
    """Less where its best is closed, and nothing where all are."""
    evidence = known(SMALL, 8)
    leader = evidence.best_first(evidence.table.rows)[0]
    gains = {row: evidence.largest_gain(leader, lambda r, row=row: r == row) for row in _rows(SMALL)}
    most = evidence.largest_gain(leader, lambda row: True)
    assert most == pytest.approx(max(gains.values()))
    best = max(gains, key=lambda row: gains[row])
    assert evidence.largest_gain(leader, lambda row: row != best) < most
    assert evidence.largest_gain(leader, lambda row: False) == 0.0


def test_nothing_is_gained_over_a_leader_that_is_far_ahead() -> None:
    """One is always right and the others never are, on all examples."""
    space = PromptSpace({"style": TEXTS[:4]})
    evidence = nothing(space)
    for row in _rows(space):
        add(evidence, row, dict.fromkeys(range(N), float(row == C)))
    assert evidence.largest_gain(C, lambda row: row != C) < 0.005
    assert evidence.chance_of_gain(C, A) > 0.99


def test_configurations_are_drawn_until_enough_are_known() -> None:
    """Before ``min_cold_start`` have a score: those that nobody has asked for, and only open ones."""
    evidence = nothing(min_cold_start=3)
    for row in (A, B):
        add(evidence, row, {0: 1.0})
    rows = evidence.propose(14, 100, lambda row: row != C, np.random.default_rng(0))
    assert len(rows) == 14
    assert set(rows[:13]) == set(_rows(SMALL)) - {A, B, C}
    assert rows[13] in {A, B}


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
def test_the_same_generator_gives_the_same_proposal(space: PromptSpace) -> None:
    """All randomness is handed in; what is closed is never proposed."""
    evidence = known(space, 8)
    closed = evidence.table.rows[0]

    def propose() -> list[Row]:
        return evidence.propose(6, 200, lambda row: row != closed, np.random.default_rng(3))

    first = propose()
    assert first == propose()
    assert len(first) == 6
    assert closed not in first


def test_drawn_are_all_configurations_or_a_sample() -> None:
    """Up to 500, those that were measured among them with the same posterior; more are a sample of 500."""
    small = known(PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(2)}), 20)
    drawn = small.drawn()
    assert drawn.shape == (256, 2)
    means, deviations = small.posterior(small.table.rows)
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
    blind = Evidence(encode_prompts(SMALL, None), told.table)
    assert blind.text_chance() is None


def _rows(space: PromptSpace) -> list[Row]:
    return [tuple(row) for row in space.rows().tolist()]
