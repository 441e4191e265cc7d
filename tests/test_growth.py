"""Candidates written during a search: what they bring and cost, and proposers that fail or hang."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from writers import DEMOS, INSTRUCTION, SECOND, SPACE, World, Writer, better, proposals_of, run

from mpromptune import Noted, PromptSpace, RetryPolicy, SearchResult
from mpromptune.engine.proposers import Brief, visible_examples
from mpromptune.errors import InvalidArgumentError, ProposalRefusedError
from mpromptune.execution.interrupts import contained
from mpromptune.execution.usage import Usage, record

PAIR = PromptSpace({INSTRUCTION: ["0.30 a", "0.40 b"], SECOND: ["0.30 c", "0.35 d", "0.20 e"]})
SETS = PromptSpace({INSTRUCTION: ["0.30 a", "0.40 b"], DEMOS: [[], ["0.40 x"]]})


def fails(brief: Brief) -> Any:
    raise ProposalRefusedError("nothing fits")


def trials_of(result: SearchResult) -> list[tuple]:
    return [(t.number, t.params, t.state, t.value) for t in result.study.trials]


def told_of(result: SearchResult) -> list[tuple]:
    """The proposals without what depends on the clock."""
    found = proposals_of(result)
    return [(p.number, p.component, p.index, p.proposer, p.parent, p.written, p.refused) for p in found]


@pytest.mark.parametrize("space", [SPACE, PAIR, SETS], ids=["one", "two predictors", "demos"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_writer_that_improves_its_parents_wins(space: PromptSpace, seed: int) -> None:
    """The winner has a candidate that was written, and no pair is measured twice."""
    world, writer = World(space), Writer(better, only=[n for n in space.names if n != DEMOS])
    result = run(world, [writer], space, seed=seed, max_calls=240)
    new = {name for name, index in result.best_params.items() if index >= len(space.components[name])}
    assert new
    assert result.best_score > 0.4
    assert set(world.asked.values()) == {1}
    assert not world.unknown
    assert len(writer.briefs) == len(proposals_of(result)) > 2


def test_a_small_pool_is_not_the_end() -> None:
    """When everything is measured, there is still something to write, until the budget is spent."""
    only = PromptSpace({INSTRUCTION: ["0.30 only"]})
    result = run(World(only), [Writer(better)], only)
    assert len(proposals_of(result)) > 2
    assert result.calls + len(proposals_of(result)) == 120


@pytest.mark.parametrize(
    "write",
    [
        fails,
        lambda brief: None,
        lambda brief: 1 / 0,
        lambda brief: {1, 2},
        lambda brief: [float("nan")],
        lambda brief: contained(lambda: (_ for _ in ()).throw(SystemExit("no"))),
        lambda brief: (_ for _ in ()).throw(KeyboardInterrupt),
        lambda brief: "0.40 second",
    ],
    ids=["refuses", "none", "error", "no JSON", "NaN", "exit", "interrupt", "repeats"],
)
def test_a_writer_that_fails_is_not_asked_again(write: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """The search goes on with its pool, and says so once; its trials leave no score and no failure."""
    world, writer = World(), Writer(write)
    with caplog.at_level(logging.WARNING, "mpromptune"):
        result = run(world, [writer])
    assert len(writer.briefs) == 3
    assert [
        r.getMessage().startswith("The proposer 'writer' has failed several times") for r in caplog.records
    ] == [True]
    assert all(proposal.refused for proposal in proposals_of(result))
    assert result.calls == sum(world.asked.values()) == 60  # the whole pool
    assert result.best_params == {INSTRUCTION: 1}
    failed = [t for t in result.study.trials if t.state != TrialState.COMPLETE]
    assert [t.params[INSTRUCTION] for t in failed] == [3, 4, 5]
    assert not any(t.intermediate_values for t in failed)
    assert {m.params[INSTRUCTION] for m in result.configurations} == {0, 1, 2}


def test_a_writer_may_fail_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """Two failures in a row are forgotten when it writes again."""
    world = World()
    writer = Writer(lambda brief: better(brief) if brief.number % 3 == 2 else fails(brief))
    result = run(world, [writer], max_calls=200)
    refused = [proposal.refused is not None for proposal in proposals_of(result)]
    assert refused[:6] == [True, True, False] * 2
    assert not caplog.records


def test_with_several_predictors_no_more_than_three_requests_fail() -> None:
    """Also when those for different predictors are under way at the same time."""
    four = PromptSpace({f"{i}_predictor_instruction": ["0.3 a", "0.4 b"] for i in range(4)})

    def slow(brief: Brief) -> Any:
        time.sleep(0.05)
        fails(brief)

    writer = Writer(slow)
    run(World(four), [writer], four, max_calls=200)
    assert len(writer.briefs) == 3


def test_another_writer_goes_on() -> None:
    """What one cannot do says nothing about the other."""
    bad, good = Writer(fails, "bad"), Writer(better, "good")
    run(World(), [bad, good], max_calls=200)
    assert len(bad.briefs) <= 3
    assert len(good.briefs) > 3


@pytest.mark.parametrize("space", [SPACE, PAIR], ids=["one", "two predictors"])
def test_timing_changes_nothing(space: PromptSpace) -> None:
    """One, 4 and 16 threads, with and without latencies of scores and writers: the same trials and texts."""
    found = []
    for threads, delay in ((1, 0.0), (4, 0.01), (16, 0.002), (4, 0.0)):
        rng = np.random.default_rng(threads)

        def slow(brief: Brief, rng: Any = rng, delay: float = delay) -> str:
            time.sleep(5 * delay * rng.random())
            if brief.number % 4 == 1:
                raise ProposalRefusedError("not now")
            known = sum(len(one.scores) for one in brief.standings)
            return f"{better(brief)} of {len(brief.standings)} with {known} scores"

        world = World(space, delay)
        result = run(world, [Writer(slow), Writer(slow, "other")], space, num_threads=threads, max_calls=160)
        assert not world.unknown
        found.append((trials_of(result), told_of(result), result.best_params, result.best_score))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("calls", [0, 1, 5])
@pytest.mark.parametrize("arguments", [{}, {"confirm": True}, {"confirm": False}])
def test_requests_count_like_program_calls(calls: int, arguments: dict) -> None:
    """Never more than the budget in all; at the end of a search there is nothing left to spend on."""
    for max_calls in (77, 100):
        world, writer = World(), Writer(better, calls=calls)
        result = run(world, [writer], max_calls=max_calls, **arguments)
        spent = sum(world.asked.values()) + calls * len(writer.briefs)
        assert spent <= max_calls
        assert result.calls == sum(world.asked.values())
        assert writer.briefs
        if "confirm" in arguments:
            assert spent > max_calls - max(calls, 1) - 1


@pytest.mark.parametrize("limit", [{"max_cost": 1.0}, {"max_tokens": 1000}])
def test_usage_of_proposals_is_limited(limit: dict) -> None:
    """A proposal costs a quarter of the budget, a program call nothing: four, and not a fifth."""

    def paid(brief: Brief) -> str:
        record(Usage(lm_calls=1, cost=0.25, prompt_tokens=250))
        return better(brief)

    writer = Writer(paid)
    result = run(World(), [writer], max_calls=400, **limit)
    assert result.usage["propose"].lm_calls == len(writer.briefs) == 4
    assert result.usage["propose"].cost == 1.0
    assert result.usage["search"].lm_calls == 0
    assert result.stopped_by == next(iter(limit))
    assert result.overspent == 0


def test_a_limit_on_cost_does_not_depend_on_timing() -> None:
    """Scores cost too, a proposal as much as five; what is left is reckoned from what was told."""

    class Paid(World):
        def __call__(self, params: dict[str, int], example: int) -> float:
            record(Usage(cost=0.01))
            return super().__call__(params, example)

    def paid(brief: Brief) -> str:
        time.sleep(0.03 * np.random.default_rng(brief.number).random())
        record(Usage(cost=0.05))
        return better(brief)

    found = []
    for delay in (0.0, 0.01):
        result = run(Paid(delay=delay), [Writer(paid, calls=5)], max_calls=400, max_cost=1.2)
        found.append((trials_of(result), told_of(result)))
        assert result.usage.total.cost <= 1.2 + 1e-9
    assert found[0] == found[1]


def test_two_candidates_of_a_predictor_at_a_time() -> None:
    """The next one is asked for when the last but one has a score; all numbers are in order."""
    writer = Writer(better)
    result = run(World(PAIR), [writer], PAIR, max_calls=240)
    for name in PAIR.names:
        own = sorted((b for b in writer.briefs if b.component == name), key=lambda b: b.number)
        assert [b.index for b in own] == [
            *range(len(PAIR.components[name]), len(own) + len(PAIR.components[name]))
        ]
        for before, brief in zip(own, own[2:], strict=False):
            assert any(m.params[name] == before.index for m in brief.standings)
    assert [p.number for p in proposals_of(result)] == [*range(len(writer.briefs))]


def test_there_are_no_more_candidates_than_the_storage_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two, two are written, and the search goes on with these."""
    monkeypatch.setattr("mpromptune.engine.search.capacity_of", lambda space, max_calls: {INSTRUCTION: 5})
    writer = Writer(better)
    run(World(), [writer])
    assert len(writer.briefs) == 2


@pytest.mark.parametrize("timeout", [0.2, None])
def test_a_writer_that_hangs(timeout: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails after the timeout, that of the search or one of its own; others go on meanwhile."""
    monkeypatch.setattr("mpromptune.engine.writing._TIMEOUT", 0.2)
    over, world = threading.Event(), World()
    writer = Writer(lambda brief: over.wait(60))
    began = time.monotonic()
    result = run(world, [writer], timeout=timeout)
    over.set()
    assert time.monotonic() - began < 10
    assert len(writer.briefs) == 3
    assert all("CallTimeoutError" in str(p.refused) for p in proposals_of(result))
    assert result.calls == 60


def test_time_is_up_while_a_writer_hangs() -> None:
    """The search ends in time, with what it has; the proposal stays open."""
    over = threading.Event()
    began = time.monotonic()
    result = run(World(), [Writer(lambda brief: over.wait(60))], max_seconds=1.0, grace=0.2)
    took = time.monotonic() - began
    over.set()
    assert took < 5
    assert result.stopped_by == "max_seconds"
    assert result.best_score > 0
    assert not any(proposal.is_over for proposal in proposals_of(result))


def test_an_outage_of_the_prompt_model_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each proposal is tried again, then refused; the program is scored all the same."""
    monkeypatch.setattr("mpromptune.engine.search._REQUESTS", RetryPolicy(attempts=3, max_wait=0.01))
    attempts: Counter[int] = Counter()

    def down(brief: Brief) -> str:
        attempts[brief.number] += 1
        if brief.number or attempts[brief.number] < 2:
            raise ConnectionError("down")
        return better(brief)

    result = run(World(), [Writer(down)])
    assert attempts[0] == 2
    assert [p.refused is None for p in proposals_of(result)] == [True, False, False, False]
    assert all(m.posterior_mean > 0 for m in result.configurations)


def test_equal_texts_are_refused_later_too() -> None:
    """But not two that are written at the same time; demo sets are compared by their texts."""
    world = World(SETS)
    written = {INSTRUCTION: "0.90 again", DEMOS: ["0.90 again"]}
    result = run(world, [Writer(lambda brief: written[brief.component])], SETS, max_calls=200)
    for name, text in written.items():
        own = [p for p in proposals_of(result) if p.component == name]
        assert all(p.written == text for p in own[:1])
        assert all(p.written is None and "the same as candidate 2" in str(p.refused) for p in own[2:])


class Noting(World):
    def __call__(self, params: dict[str, int], example: int) -> float:
        return Noted(super().__call__(params, example), {"of": [*params.values(), example]})


def test_proposers_see_visible_examples_only() -> None:
    """60 % of the examples by seed, with their notes; the means are of all."""
    writer = Writer(better)
    run(Noting(PAIR), [writer], PAIR, seed=3, max_calls=200)
    visible = visible_examples(20, 3)
    assert len(visible) == 12
    assert visible != visible_examples(20, 4)
    shown = set()
    for brief in writer.briefs:
        for i, one in enumerate(brief.standings):
            shown |= one.scores.keys()
            for example in one.scores:
                assert brief.notes[i, example] == {"of": [*one.params.values(), example]}
        assert set(brief.notes) == {(i, e) for i, one in enumerate(brief.standings) for e in one.scores}
        assert brief.parent[brief.component] in [m.params[brief.component] for m in brief.standings]
        means = [m.posterior_mean for m in brief.standings]
        assert means == sorted(means, reverse=True)
    assert shown == visible


def test_a_brief_has_the_candidates_that_are_measured() -> None:
    """None where a proposal has failed or is not measured yet."""
    writer = Writer(lambda brief: fails(brief) if brief.number == 1 else better(brief))
    run(World(), [writer], max_calls=160)
    briefs = sorted(writer.briefs, key=lambda brief: brief.number)
    assert briefs[0].candidates == {INSTRUCTION: [*SPACE.components[INSTRUCTION]]}
    last = briefs[-1].candidates[INSTRUCTION]
    assert last[4] is None
    assert str(last[3]).endswith("by 0")
    assert len(last) <= briefs[-1].index


def processes() -> ProcessPoolExecutor:
    raise AssertionError("no process is needed")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sampler": "tpe"}, "sampler='tpe'"),
        ({"sampler": "random"}, "sampler='random'"),
        ({"schedule": "mipro", "minibatch_size": 5}, "schedule"),
        ({"executor": processes}, "ThreadPoolExecutor"),
        (
            {"space": PromptSpace({INSTRUCTION: ["0.3 a", "0.4 b"]}, combinations=[(0,), (1,)])},
            "combinations",
        ),
        ({"writers": [Writer(better), Writer(better)]}, "'writer' twice"),
        ({"writers": ["reflect"]}, "reflect"),
        ({"writers": "reflect"}, "list"),
        ({"writers": [Writer(better, calls=-1)]}, "-1"),
        ({"writers": [Writer(better, calls=0.5)]}, "0.5"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_grow_is_refused_before_any_call(arguments: dict, match: str) -> None:
    """The error names what was given."""
    world, given = World(), {"writers": [Writer(better)], **arguments}
    with pytest.raises(InvalidArgumentError, match=match):
        run(world, **given)
    assert not world.asked


def test_candidates_must_be_an_object_with_both_methods() -> None:
    """A function, say, is refused before any call."""
    world = World()
    with pytest.raises(InvalidArgumentError, match="candidates must be an object with the methods"):
        run(world, [Writer(better)], candidates=print)
    assert not world.asked


def test_threads_of_the_caller_are_fine() -> None:
    """They share the memory of the search."""
    with ThreadPoolExecutor(2) as executor:
        assert proposals_of(run(World(), [Writer(better)], executor=executor))


def test_infrastructure_that_fails_for_a_candidate_does_not_stop_others() -> None:
    """A candidate that never gets a score is dropped in the end, and its predictor is written for again."""

    class Unlucky(World):
        failed = 0

        def __call__(self, params: dict[str, int], example: int) -> float:
            if params[INSTRUCTION] == 10:
                self.failed += 1
                raise ConnectionError("only here")
            return super().__call__(params, example)

    pool, writer = PromptSpace({INSTRUCTION: [f"0.3{i} text" for i in range(10)]}), Writer(better)
    world = Unlucky(pool)
    # Ten failures in a batch would count as an outage.
    sizes = {"block_size": 2, "batch_size": 3}
    result = run(world, [writer], pool, max_calls=170, retry=RetryPolicy(attempts=1), **sizes)
    assert world.failed
    assert len(writer.briefs) > 1
    assert {INSTRUCTION: 10} not in [m.params for m in result.configurations]
