"""The operator that makes demo sets from others, and the effects of single demos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
import numpy as np
import pytest
from briefs import (
    DEMOS,
    INSTRUCTION,
    TEXTS,
    brief,
    propose,
    setting,
)
from tasks import Planner

from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalRefusedError
from mpromptune.operators.base import Setting
from mpromptune.operators.effects import Effects
from mpromptune.operators.registry import OPERATORS
from mpromptune.operators.texts import demo_text


def labelled(i: int) -> dspy.Example:
    return dspy.Example(question=f"q{i}", answer=f"a{i}").with_inputs("question")


def demo_setting(sets: list[list[Any]], **changes: Any) -> Setting:
    given = {
        "candidates": {INSTRUCTION: TEXTS, DEMOS: sets},
        "trainset": [labelled(i) for i in range(8)],
        "valset": [labelled(i) for i in (100, 101)],
        **changes,
    }
    return setting(**given)


def demo_brief(own: Setting, means: Mapping[int, float], parent: int = 0, **changes: Any) -> Brief:
    rows = [({INSTRUCTION: 0, DEMOS: i}, mean, {0: 1.0}) for i, mean in means.items()]
    rows.sort(key=lambda row: -row[1])
    return brief(own, DEMOS, {INSTRUCTION: 0, DEMOS: parent}, rows, {}, **changes)


def test_effects_of_single_demos_are_recovered() -> None:
    """Means that are sums of the effects of their parts give these effects, less a little shrinkage."""
    truth = {"a": 0.2, "b": 0.1, "c": 0.0, "d": -0.1}
    parts = [[x for i, x in enumerate(truth) if code >> i & 1] for code in range(16)]
    effects = Effects(parts, [sum(truth[x] for x in some) for some in parts], [0.01] * 16)
    for part, effect in truth.items():
        assert effects.mean[part] == pytest.approx(effect, abs=0.02)
    rng = np.random.default_rng(0)
    draws = [effects.draw([*truth, "new"], rng) for _ in range(2000)]
    assert np.mean([draw["a"] for draw in draws]) == pytest.approx(effects.mean["a"], abs=0.005)
    assert np.mean([draw["new"] for draw in draws]) == pytest.approx(0.0, abs=0.02)
    spread = {part: np.std([draw[part] for draw in draws]) for part in ("a", "new")}
    assert spread["a"] < spread["new"]


def test_nothing_measured_gives_draws_all_the_same() -> None:
    """Without any configuration the effects are their prior."""
    assert set(Effects([], [], []).draw(["a"], np.random.default_rng(0))) == {"a"}


def test_certain_means_count_more_than_uncertain_ones() -> None:
    """A demo whose good mean is certain has a higher effect than one whose equal mean is not."""
    effects = Effects([["a"], ["b"], []], [0.9, 0.9, 0.1], [0.0, 0.5, 0.0])
    assert effects.mean["a"] > effects.mean["b"] > 0.0


def test_good_demos_come_and_bad_ones_go() -> None:
    """A demo whose sets score high is put into a middling set, and one whose sets score low is not."""
    sets = [[labelled(0)], [labelled(1)], [labelled(2)], []]
    own = demo_setting(sets, trainset=[])
    means = {0: 0.8, 1: 0.2, 2: 0.5}
    made_sets = [propose("demos", own, demo_brief(own, means, parent=2, number=n)) for n in range(40)]
    good, bad = (sum(labelled(i) in some for some in made_sets) for i in (0, 1))
    assert good > 35
    assert bad < 5


def test_moves_of_demo_sets() -> None:
    """All five moves occur; every set is new, within the limits, and without one example twice."""
    sets = [[labelled(i) for i in (0, 1, 2)], [labelled(3), labelled(4)], []]
    own = demo_setting(sets, max_labeled_demos=4, max_bootstrapped_demos=2)
    taken = [[demo_text(demo) for demo in some] for some in sets]
    changes = set()
    for n in range(100):
        new = [demo_text(d) for d in propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))]
        assert new not in taken
        assert len(new) == len(set(new)) <= 4
        here, there = (len({*new} & {*some}) for some in taken[:2])
        changes.add((len(new), here, there > 1))
    assert (3, 2, False) in changes  # swap
    assert (4, 3, False) in changes  # add
    assert (2, 2, False) in changes  # remove
    assert (3, 3, False) in changes  # reorder
    assert any(both for _, _, both in changes)  # recombine


def test_demos_are_the_same_for_the_same_seed_and_number() -> None:
    """Equal briefs give equal sets, and no request is made."""
    own = demo_setting([[labelled(0)], [labelled(1)]], prompt_model=None)
    first, second = (propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7})) for _ in range(2))
    assert first == second
    assert OPERATORS["demos"](own).calls == 0
    assert (
        len({str(propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))) for n in range(20)}) > 3
    )


def test_validation_examples_are_never_demos() -> None:
    """Neither from the training set nor from sets that have one already, bootstrapped or not."""
    told = dspy.Example(augmented=True, question="q100", reasoning="r", answer="other")
    sets = [[labelled(100), labelled(0)], [told, labelled(1)]]
    own = demo_setting(sets, trainset=[labelled(i) for i in (100, 101, 2, 3)])
    for n in range(50):
        new = propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))
        assert not {demo.question for demo in new} & {"q100", "q101"}


def test_no_demo_set_is_left() -> None:
    """If every change is known already, the proposal is refused instead of repeated."""
    own = demo_setting(
        [[labelled(0)], []], trainset=[labelled(0)], max_labeled_demos=1, max_bootstrapped_demos=1
    )
    with pytest.raises(ProposalRefusedError, match="No demo set was found"):
        propose("demos", own, demo_brief(own, {0: 0.6}))


def test_demos_of_a_predictor_have_some_of_its_fields() -> None:
    """A training example without any output of the predictor is no demo of it."""
    own = demo_setting([[]], program=Planner())  # its first predictor plans, and examples have no plans
    with pytest.raises(ProposalRefusedError, match="No demo set was found"):
        propose("demos", own, demo_brief(own, {0: 0.5}))


def test_kinds_of_demos_keep_their_limits() -> None:
    """There are at most as many bootstrapped and labelled demos as in DSPy's sets."""
    told = [dspy.Example(augmented=True, question=f"t{i}", answer="a") for i in range(4)]
    own = demo_setting([told[:2], told[2:], []], max_bootstrapped_demos=2, max_labeled_demos=3)
    for n in range(60):
        new = propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))
        assert sum("augmented" in demo for demo in new) <= 2
        assert len(new) <= 3
