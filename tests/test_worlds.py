"""The worlds of `benchmarks.proposals`: they are what they say, and methods pay for all that they use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import proposals
from benchmarks.gepa_loop import gepa, pareto_front
from benchmarks.tables import PER_EXAMPLE, Table, draw
from benchmarks.worlds import Parametric, Recorded, World, one_of
from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalRefusedError
from tests.test_benchmarks import N_PROMPTS, tiny_table

POOL, N_VAL = 5, 20


def brief(number: int, parent: int = 0) -> Brief:
    """Proposal ``number`` of a search, where none was refused."""
    return Brief(number, "prompt", POOL + number, {"prompt": parent}, standings=(), seed=3)


def make(kind: type[World], table: Table | None = None) -> World:
    return kind(table or tiny_table(), 3, POOL, N_VAL)


WORLDS = [Recorded, Parametric]


@pytest.mark.parametrize("kind", WORLDS)
def test_a_world_begins_with_the_pool_of_its_table(kind: type[World]) -> None:
    """Prompts, baseline and validation examples are those that `tables.draw` draws."""
    world, problem = make(kind), draw(tiny_table(), 3, POOL, N_VAL)
    assert world.space.size == len(world.texts) == POOL
    assert world.n_examples == N_VAL
    assert world.table.truth[world.pool] == pytest.approx(problem.truth)
    assert world.baseline["prompt"] == problem.index(problem.baseline)
    assert len(np.unique(world.embed(world.space.components["prompt"]), axis=0)) == POOL


def test_recorded_scores_are_those_of_the_table() -> None:
    """Of the pool and of what is written: the prompt that a text names."""
    table = tiny_table()
    world = make(Recorded, table)
    world.writer("fresh").propose(brief(0))
    for index in range(POOL + 1):
        prompt = int(world.texts[index].removeprefix("p"))
        scores = [world.score({"prompt": index}, e) for e in range(N_VAL)]
        assert scores == table.scores[prompt, world.examples].tolist()
        assert world.truth(index) == table.truth[prompt]


@pytest.mark.parametrize(("kind", "writer"), [(Recorded, "reflect-1"), (Parametric, "delta+0.1")])
def test_a_pair_always_has_the_same_score(kind: type[World], writer: str) -> None:
    """In any order, and in another world of the same seed; other seeds have other scores."""
    first, second = make(kind), make(kind)
    for world in (first, second):
        world.writer(writer).propose(brief(0))
    pairs = [(i, e) for i in range(POOL + 1) for e in range(N_VAL)]
    scores = {pair: first.outcome(*pair) for pair in pairs}
    assert scores == {pair: second.outcome(*pair) for pair in reversed(pairs)}
    assert 0.0 < np.mean(list(scores.values())) < 1.0


def test_parametric_scores_have_the_mean_of_their_probabilities() -> None:
    """With every example of the table in the validation set, the truth is the expected mean score."""
    world = Parametric(tiny_table(n_examples=2000), 3, POOL, 2000)
    for index in range(POOL):
        mean = np.mean([world.outcome(index, e) for e in range(2000)])
        assert mean == pytest.approx(world.truth(index), abs=4 * 0.5 / 2000**0.5)


def test_the_truth_of_a_parametric_pool_is_close_to_the_table() -> None:
    """A Rasch model with a skill for each prompt has each prompt's mean score, but for its prior."""
    world = make(Parametric, tiny_table(n_examples=300))
    truths = [world.truth(index) for index in range(POOL)]
    assert truths == pytest.approx(world.table.truth[world.pool].tolist(), abs=0.02)


@pytest.mark.parametrize(("writer", "gain"), [("delta+0", 0.0), ("delta-0.4", -0.4), ("delta+0.1", 0.1)])
def test_children_lie_around_their_parent(writer: str, gain: float) -> None:
    """With a standard deviation of 0.4 logits around what the writer gains; their vectors are near too."""
    world = make(Parametric)
    for number in range(400):
        world.writer(writer).propose(brief(number, parent=2))
    skills = np.array([world.skills[POOL + number] for number in range(400)])
    assert skills.mean() - world.skills[2] == pytest.approx(gain, abs=4 * 0.4 / 400**0.5)
    assert skills.std() == pytest.approx(0.4, abs=0.06)
    steps = world.embed(["c5", "c6"]) - world.embed([world.texts[2]])
    assert np.linalg.norm(steps, axis=1) == pytest.approx(world.step)


def test_flat_children_have_the_skill_of_the_baseline() -> None:
    """Whoever their parent is."""
    world = make(Parametric)
    for number, parent in enumerate(range(POOL)):
        world.writer("flat").propose(brief(number, parent))
        assert world.value({"prompt": POOL + number}) == world.value(world.baseline)


def test_recorded_writers_take_each_hidden_prompt_once_and_then_refuse() -> None:
    """A refused proposal is charged as well."""
    world = make(Recorded)
    for number in range(N_PROMPTS - POOL):
        world.writer(("fresh", "reflect-0.5")[number % 2]).propose(brief(number))
    assert sorted(world.texts.values()) == sorted(f"p{i}" for i in range(N_PROMPTS))
    with pytest.raises(ProposalRefusedError, match="left"):
        world.writer("reflect-1").propose(brief(N_PROMPTS - POOL))
    assert world.spent == N_PROMPTS - POOL + 1


def test_bad_prompts_are_of_the_worst_third() -> None:
    """As many as there are of them outside of the pool."""
    world = make(Recorded)
    worst = set(np.argsort(world.table.truth)[: N_PROMPTS // 3].tolist())
    written = set()
    for number in range(len(worst - set(world.pool.tolist()))):
        written.add(int(world.writer("bad").propose(brief(number)).removeprefix("p")))
    assert written == worst - set(world.pool.tolist())


def test_reflect_with_a_bias_writes_better_prompts() -> None:
    """Among the same hidden prompts, on the mean of many draws."""

    def mean(bias: str) -> float:
        truths = []
        for number in range(200):
            world = make(Recorded)
            world.writer(f"reflect-{bias}").propose(brief(number))
            truths.append(world.truth(POOL + number))
        return float(np.mean(truths))

    assert mean("0") < mean("0.5") < mean("1")


def test_one_of_several_writers_is_drawn_for_each_proposal() -> None:
    """Each of them equally often, and a proposal is charged once."""
    world = make(Parametric)
    writer = one_of([world.writer("flat"), world.writer("delta+5")])
    for number in range(200):
        writer.propose(brief(number))
    baseline = world.skills[world.baseline["prompt"]]
    flat = sum(world.skills[POOL + number] == baseline for number in range(200))
    assert 75 <= flat <= 125
    assert world.spent == 200


@pytest.mark.parametrize(("kind", "writer"), [(Recorded, "fresh"), (Parametric, "delta+0.1")])
@pytest.mark.parametrize("calls", [10, 20, 131, 400])
def test_gepa_spends_exactly_its_budget(kind: type[World], writer: str, calls: int) -> None:
    """Proposals, refused ones too, and program calls are all the calls there are."""
    world = make(kind)
    params = gepa(world, [world.writer(writer)], calls, 0)
    assert world.spent == calls
    assert params["prompt"] in world.texts
    if calls <= N_VAL:
        assert params == world.baseline


def test_gepa_returns_a_good_child() -> None:
    """A writer of much better children is found out; one of worse children leaves the baseline."""
    for writer, is_better in (("delta+3", True), ("delta-3", False)):
        world = make(Parametric)
        params = gepa(world, [world.writer(writer)], 400, 0)
        assert (world.value(params) > world.value(world.baseline)) == is_better
        assert (params == world.baseline) != is_better


def test_pareto_front_of_examples() -> None:
    """Ties share an example; who is best on none is not on it."""
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert pareto_front(scores) == {0: {0}, 1: {0, 1, 2}, 2: {1}}


def test_the_fixed_pool_is_searched_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, the winner is of the pool, and regret and value add up to its best."""
    monkeypatch.setattr(proposals, "load", lambda name: tiny_table(name))
    monkeypatch.setattr(proposals, "N_VAL", N_VAL)
    cell = {"world": "parametric", "table": "x", "writers": "none", "method": "fixed"}
    figures = proposals.measure({**cell, "pool": POOL, "calls": 60, "q": 4}, 3)
    assert figures["written"] == figures["new"] == 0.0
    assert figures["regret"] >= 0.0
    assert figures["regret"] + figures["value"] == pytest.approx(make(Parametric).best_of_pool())


@pytest.mark.parametrize(("method", "asked"), [("adaptive", 3), ("adaptive-uniform", 1)])
def test_an_adaptive_search_is_given_the_writers(
    method: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as an operator of its own, or all as one; its winner may be one that they wrote."""

    def search(space: Any, score: Any, **options: Any) -> Any:
        assert len(options["proposers"]) == asked
        for number, writer in enumerate(options["proposers"]):
            writer.propose(brief(number))
        best = {"prompt": POOL}
        score(best, 0)
        return SimpleNamespace(best_params=best)

    monkeypatch.setattr(proposals, "load", lambda name: tiny_table(name))
    monkeypatch.setattr(proposals, "N_VAL", N_VAL)
    monkeypatch.setattr(proposals, "search", search)
    cell = {"world": "parametric", "table": "x", "writers": "mixture", "method": method}
    figures = proposals.measure({**cell, "pool": POOL, "calls": asked + 1, "q": 4}, 3)
    assert figures["written"] == asked
    assert figures["new"] == 1.0


def test_slices_have_every_writer_that_worlds_know() -> None:
    """Each cell once, the fixed pool once for a world and a number of calls, and half of a small table."""
    cells = proposals.chosen(
        [name for name in proposals.SLICES if name != "scripted"], PER_EXAMPLE, list(proposals.METHODS)
    )
    keys = [tuple(c[k] for k in ("table", *proposals.SETTING)) for c in cells]
    assert len(set(keys)) == len(keys)
    assert sum(c["method"] == "fixed" for c in cells) == len(PER_EXAMPLE) * 4
    for world, kind in proposals.WORLDS.items():
        names = {n for c in cells if c["world"] == world for n in proposals.names_of(c["writers"])}
        assert [make(kind).writer(n).name for n in sorted(names)] == sorted(names)
    pools = {c["table"]: c["pool"] for c in cells if c["world"] == "recorded"}
    assert pools["subj_llama33_70b_s42"] == 43 // 2
    assert pools["gsm8k_llama33_70b_s43"] == 72


def rows() -> list[dict[str, Any]]:
    """Two tables, three seeds: the fixed pool, and two methods with writers."""
    regrets = {"fixed": [3.0, 3.0, 3.0], "gepa": [5.0, 4.0, 3.0], "adaptive": [1.0, 2.0, 3.0]}
    return [
        {
            "world": "recorded",
            "calls": 1630,
            "writers": "none" if method == "fixed" else "fresh",
            "method": method,
            "table": table,
            "regrets": [r + (table == "two" and method == "gepa") for r in values],
        }
        for table in ("one", "two")
        for method, values in regrets.items()
    ]


def test_summary_has_paired_gains() -> None:
    """Less regret is a gain; tables are averaged seed by seed."""
    lines = proposals.summary(rows(), "fixed").splitlines()
    assert lines[2].endswith("gepa | -1.00 ± 0.58 | -2.00 ± 0.58 | -1.50 ± 0.58 (tables ± 0.50) |")
    assert lines[3].endswith("adaptive | +1.00 ± 0.58 | +1.00 ± 0.58 | +1.00 ± 0.58 (tables ± 0.00) |")
    assert len(lines) == 4
    (line,) = proposals.summary(rows(), "gepa").splitlines()[2:]
    assert line.endswith("adaptive | +2.00 ± 1.15 | +3.00 ± 1.15 | +2.50 ± 1.15 (tables ± 0.50) |")
