"""The prior of candidates that are proposed: by hand, and for any family."""

from __future__ import annotations

import numpy as np
import pytest
from embedders import on_a_line
from hypothesis import given, settings
from hypothesis import strategies as st

from mpromptune.model.beliefs import Beliefs
from mpromptune.model.lineage import ALIKE, BESIDE, OWN, Lineage, average, for_another_search
from mpromptune.model.skills import Group, Option, groups_of
from mpromptune.model.space import UNKNOWN, Birth, Gain, IndexSpace

GAIN = UNKNOWN.deviation**2
BY_IDENTITY = Option(0.0, 0.0, 0.7)
# Two initial candidates; 2 and 3 are of one proposer, 4 is of another, 5 descends from 2, 6 from nobody.
FAMILY = [Birth("a", 0), Birth("a", 0), Birth("b", 0), Birth("a", 2), Birth("a", None)]


def group_of(births: list[Birth], has_text: bool = False) -> Group:
    return groups_of([on_a_line([0.0, 1.0], has_text=has_text)], [births], 4096, True)[0]


def covariance_of(births: list[Birth], option: Option = BY_IDENTITY, has_text: bool = False) -> np.ndarray:
    rows = np.arange(2 + len(births))[:, None]
    return group_of(births, has_text).covariance(rows, option)


@pytest.mark.parametrize(
    ("one", "other", "beyond"),
    [
        (0, 2, 0.0),  # a parent and its child
        (2, 2, GAIN + OWN**2),
        (2, 3, GAIN),  # siblings of one proposer
        (2, 4, ALIKE * GAIN),  # of two
        (2, 5, 2 * GAIN + OWN**2),  # a child and its own child: the deviation of the first, and two gains
        (3, 5, 2 * GAIN),
        (5, 5, 4 * GAIN + 2 * OWN**2),
        (0, 5, 0.0),
    ],
)
def test_a_child_is_its_parent_and_a_gain_and_its_own_deviation(one: int, other: int, beyond: float) -> None:
    """All descend from the first candidate, whose variance all of them share."""
    covariance = covariance_of(FAMILY)
    assert covariance[one, other] - covariance[0, 0] == pytest.approx(beyond, abs=1e-12)


def test_what_descends_from_different_candidates_shares_the_task_and_the_gain() -> None:
    """The second candidate has no children; the first and its child have the same covariance with it."""
    covariance = covariance_of(FAMILY)
    assert covariance[1, 2] == covariance[1, 5] == covariance[1, 0]
    both = covariance_of([Birth("a", 0), Birth("a", 1)])
    assert both[2, 3] == pytest.approx(both[0, 1] + GAIN)


@pytest.mark.parametrize("option", [BY_IDENTITY, Option(0.85, 1.2, 0.7)])
def test_a_child_without_a_parent_is_unlike_all_others(option: Option) -> None:
    """It shares the task with all, and the gain with the children of its proposer."""
    covariance = covariance_of(FAMILY, option, has_text=True)
    unlike = covariance_of([], BY_IDENTITY)[0, 1]
    assert covariance[6, :2] == pytest.approx([unlike, unlike])
    assert covariance[6, 2:5] - unlike == pytest.approx([GAIN, GAIN, ALIKE * GAIN])
    assert covariance[6, 6] == pytest.approx(covariance[0, 0] + GAIN)


def test_each_generation_is_expected_to_gain_the_same() -> None:
    """Initial candidates gain nothing."""
    centre = group_of(FAMILY).centre(np.arange(7)[:, None])
    assert centre == pytest.approx(UNKNOWN.mean * np.array([0, 0, 1, 1, 1, 2, 1]))


def test_what_is_known_of_a_proposer_replaces_the_prior() -> None:
    """A gain of 0.3 +- 0.1 for one, and nothing known of the other; they covary by both deviations."""
    births = [Birth("a", 0, Gain(0.3, 0.1)), Birth("b", 0)]
    assert group_of(births).centre(np.arange(4)[:, None]) == pytest.approx([0, 0, 0.3, UNKNOWN.mean])
    covariance = covariance_of(births)
    beyond = covariance[2:, 2:] - covariance[0, 0]
    between = ALIKE * 0.1 * UNKNOWN.deviation
    assert beyond == pytest.approx(np.array([[0.01 + OWN**2, between], [between, GAIN + OWN**2]]))


def test_gains_of_several_predictors_and_of_another_search() -> None:
    """Means and variances are averaged; in another search less is known, but never less than nothing."""
    assert average([Gain(0.1, 0.1), Gain(0.3, 0.3)]) == pytest.approx((0.2, 0.05**0.5))
    mean, deviation = for_another_search(Gain(0.1, 0.1))
    assert mean == 0.1
    assert deviation == pytest.approx((0.01 + (1 - ALIKE) * GAIN) ** 0.5)
    assert for_another_search(Gain(0.1, 5.0)) == Gain(0.1, UNKNOWN.deviation)


def test_roots_are_the_initial_ancestors() -> None:
    """A candidate without a parent is its own root, and that of its children."""
    lineage = Lineage(2, [*FAMILY, Birth("b", 6)])
    assert lineage.roots(np.arange(8)).tolist() == [0, 1, 0, 0, 0, 0, 6, 6]


def test_beside_another_demo_set_a_child_gains_a_little_else() -> None:
    """The gain of an instruction is the same beside both demo sets, up to a small deviation."""
    geometries = [on_a_line([0.0, 1.0], group=0), on_a_line([0.0, 1.0], group=0)]
    (group,) = groups_of(geometries, [[Birth("a", 0)], []], 4096, True)
    rows = np.array([[0, 0], [0, 1], [2, 0], [2, 1]])
    gained = group.covariance(rows, BY_IDENTITY)
    whole = GAIN + OWN**2
    assert gained[2, 3] - gained[0, 1] == pytest.approx(whole)
    assert gained[2, 2] - gained[0, 0] == pytest.approx(whole + BESIDE**2)


@st.composite
def families(draw: st.DrawFn) -> list[Birth]:
    births: list[Birth] = []
    for index in range(draw(st.integers(0, 6))):
        parent = draw(st.none() | st.integers(0, 1 + index))
        births.append(Birth(draw(st.sampled_from("abc")), parent))
    return births


@settings(max_examples=40, deadline=None)
@given(families(), families(), st.booleans())
def test_any_family_has_a_covariance(some: list[Birth], others: list[Birth], has_text: bool) -> None:
    """It is symmetric and positive definite under all hyper-parameters, for one component and for two."""
    geometries = [on_a_line([0.0, 1.0], has_text=has_text), on_a_line([0.0, 2.0])]
    for count in (1, 2):
        (group,) = groups_of(geometries[:count], [some, others][:count], 4096, True)
        rows = np.indices([2 + len(births) for births in (some, others)][:count]).reshape(count, -1).T
        for option in group.options():
            covariance = group.covariance(rows, option)
            assert covariance == pytest.approx(covariance.T, abs=1e-12)
            assert np.linalg.eigvalsh(covariance)[0] > 0


def skill_of_an_offer(proposer: str, siblings: float) -> float:
    """Of an unwritten child of the first candidate; those of "a" so far have this fraction right."""
    space = IndexSpace([2])
    beliefs = Beliefs(space, [on_a_line([0.0, 1.0])])
    for _ in range(3):
        space.add(0, Birth("a", 0))
    right = np.array([0.5, 0.5, siblings, siblings, siblings])
    scores = (np.arange(40) / 40 < right[:, None]).astype(float)
    beliefs.tell([(i,) for i in range(5)], scores)
    space.add(0, Birth(proposer, 0))
    (mean,), _ = beliefs.skills([(5,)])
    return float(mean)


def test_good_children_promise_more_of_their_proposer() -> None:
    """And less of others; poor children promise poor ones."""
    after = {right: skill_of_an_offer("a", right) for right in (0.3, 0.5, 0.7)}
    assert after[0.3] < after[0.5] < after[0.7]
    other = {right: skill_of_an_offer("b", right) for right in (0.5, 0.7)}
    assert after[0.7] - after[0.5] > other[0.7] - other[0.5] > 0


def test_the_gain_of_a_proposer_is_learned() -> None:
    """From the prior mean downwards with poor children and upwards with good ones, and more surely."""
    gains = {}
    for right in (0.3, 0.5, 0.7):
        space = IndexSpace([2])
        beliefs = Beliefs(space, [on_a_line([0.0, 1.0])])
        for _ in range(3):
            space.add(0, Birth("a", 0))
        scores = (np.arange(40) / 40 < np.array([0.5, 0.5, right, right, right])[:, None]).astype(float)
        beliefs.tell([(i,) for i in range(5)], scores)
        gains[right] = beliefs.gains()[0, "a"]
    assert gains[0.3].mean < UNKNOWN.mean < gains[0.5].mean < gains[0.7].mean
    assert all(0.0 < gain.deviation < UNKNOWN.deviation for gain in gains.values())
