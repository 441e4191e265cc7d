"""Going on with a search that writes candidates: after kill -9, Ctrl-C, an outage, with another budget."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from writers import (
    INSTRUCTION,
    SECOND,
    SPACE,
    World,
    Writer,
    better,
    die_writing,
    proposals_in,
    proposals_of,
    run,
    slowly,
)

from mpromptune import PromptSpace, RetryPolicy, SearchResult
from mpromptune.engine.proposers import Brief
from mpromptune.errors import (
    InvalidArgumentError,
    ProposalRefusedError,
    SearchInterrupted,
    SearchStoppedError,
    StudyMismatchError,
)
from mpromptune.execution.interrupts import check_stopped, is_over
from mpromptune.execution.usage import Usage, record
from mpromptune.storage.attributes import USAGE

PAIR = PromptSpace({INSTRUCTION: ["0.30 a", "0.40 b"], SECOND: ["0.30 c", "0.35 d"]})
_TIMED = {USAGE}


def trials_of(result: SearchResult) -> list[tuple]:
    trials = result.study.trials
    return [
        (t.number, t.params, t.state, t.value, {n: v for n, v in t.user_attrs.items() if n not in _TIMED})
        for t in trials
    ]


def moody(brief: Brief) -> str:
    """Fails now and then."""
    if brief.number % 3 == 1:
        raise ProposalRefusedError("not now")
    return better(brief)


def check_same(result: SearchResult, expected: SearchResult) -> None:
    assert trials_of(result) == trials_of(expected)
    assert result.configurations == expected.configurations
    assert (result.best_params, result.calls) == (expected.best_params, expected.calls)


@pytest.mark.parametrize("space", [SPACE, PAIR], ids=["one", "two predictors"])
def test_it_goes_on_from_any_line_of_its_journal(space: PromptSpace, tmp_path: Path) -> None:
    """As if nothing had happened, and what was written is adopted and not asked for again."""
    whole = tmp_path / "whole"
    expected = run(World(space), [Writer(moody)], space, storage=whole, max_calls=100)
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in random.Random(0).sample(range(1, len(lines)), 6):
        path = tmp_path / f"{cut}"
        path.write_bytes(b"".join(lines[:cut]))
        world, writer = World(space), Writer(moody)
        saved = sum(b'\\"written\\": \\"' in line or b'\\"refused\\": \\"' in line for line in lines[:cut])
        result = run(world, [writer], space, storage=path, max_calls=100)
        check_same(result, expected)
        assert not world.unknown
        assert len(writer.briefs) == len(proposals_of(expected)) - saved
        for proposal in proposals_of(expected):
            if proposal.written is not None:
                assert world.texts[proposal.component][proposal.index] == proposal.written


def test_after_kill_9_it_ends_as_if_nothing_had_happened(tmp_path: Path, forks: Any) -> None:
    """Killed at random, while programs run and while a candidate is written."""
    expected = run(World(), [Writer(slowly)], storage=tmp_path / "whole")
    for number in range(5):
        path = tmp_path / f"{number}"
        killed = forks.Process(target=die_writing, args=(path, random.Random(number).uniform(0.02, 0.5)))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        Path(f"{path}.lock").unlink(missing_ok=True)
        check_same(run(World(), [Writer(slowly)], storage=path), expected)


def test_a_finished_search_asks_for_nothing(tmp_path: Path) -> None:
    """Neither a score nor a candidate; its usage is reported again."""

    def paid(brief: Brief) -> str:
        record(Usage(lm_calls=1, cost=0.5))
        return moody(brief)

    first = run(World(), [Writer(paid)], storage=tmp_path / "j")
    world, writer = World(), Writer(paid)
    again = run(world, [writer], storage=tmp_path / "j")
    assert not world.asked
    assert not writer.briefs
    check_same(again, first)
    assert again.usage["propose"] == first.usage["propose"]
    assert again.usage["propose"].lm_calls == len(proposals_of(first))


@pytest.mark.parametrize("is_patient", [False, True], ids=["lost", "saved"])
def test_ctrl_c_while_a_candidate_is_written(is_patient: bool, tmp_path: Path) -> None:
    """What is written within the grace is saved; otherwise it is asked for again, under the same index."""
    begun, over = threading.Event(), threading.Event()

    def interrupted(brief: Brief) -> str:
        if not begun.is_set():
            begun.set()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            over.wait(0.5 if is_patient else 60)
        return better(brief)

    path, world = tmp_path / "j", World()
    with pytest.raises(SearchInterrupted) as info:
        run(world, [Writer(interrupted)], storage=path, grace=30.0 if is_patient else 0.1)
    assert len(info.value.study.trials) > 3
    over.set()
    calls = sum(world.asked.values())
    time.sleep(0.3)
    assert sum(world.asked.values()) == calls  # nothing begins after it
    second, writer = World(), Writer(better)
    result = run(second, [writer], storage=path)
    assert not world.asked.keys() & second.asked.keys()
    first = min(brief.number for brief in writer.briefs)  # two may be written at the same time
    assert first in (1, 2) if is_patient else first == 0
    assert [p.index for p in proposals_of(result)] == [*range(3, 3 + len(proposals_of(result)))]
    assert all(p.written for p in proposals_of(result))
    assert result.calls + len(proposals_of(result)) <= 120
    assert not second.unknown


def test_what_an_interrupted_proposal_has_used_is_not_forgotten(tmp_path: Path) -> None:
    """It ends before its second request; when it is asked for again, both attempts count."""
    begun = threading.Event()

    def twice(brief: Brief) -> str:
        record(Usage(lm_calls=1))
        if not begun.is_set():
            begun.set()
            os.kill(os.getpid(), signal.SIGINT)
        while brief.number == 0 and not is_over() and not again:
            time.sleep(0.01)
        check_stopped()
        record(Usage(lm_calls=1))
        return better(brief)

    again: list[bool] = []
    with pytest.raises(SearchInterrupted):
        run(World(), [Writer(twice)], storage=tmp_path / "j")
    again.append(True)
    result = run(World(), [Writer(twice)], storage=tmp_path / "j")
    assert result.usage["propose"].lm_calls == 1 + 2 * len(proposals_of(result))


def test_ctrl_c_while_a_writer_hangs(tmp_path: Path) -> None:
    """It takes no longer than the grace."""
    over, times = threading.Event(), []

    def interrupt() -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def hangs(brief: Brief) -> str:
        if brief.number == 0:
            threading.Timer(0.1, interrupt).start()
        over.wait(60)
        return better(brief)

    with pytest.raises(SearchInterrupted):
        run(World(), [Writer(hangs)], storage=tmp_path / "j", grace=0.2)
    took = time.monotonic() - times[0]
    over.set()
    assert took < 3


def test_an_outage_while_a_candidate_is_written(tmp_path: Path) -> None:
    """The search stops; what was written meanwhile is saved, and no score is invented."""
    begun = threading.Event()

    class Down(World):
        def __call__(self, params: dict[str, int], example: int) -> float:
            if begun.is_set():
                raise ConnectionError("down")
            return super().__call__(params, example)

    def slow(brief: Brief) -> str:
        begun.set()
        time.sleep(0.3)
        return better(brief)

    path, world = tmp_path / "j", Down()
    with pytest.raises(SearchStoppedError, match="down"):
        run(world, [Writer(slow)], storage=path, retry=RetryPolicy(attempts=1))
    second, writer = World(), Writer(better)
    result = run(second, [writer], storage=path)
    assert not world.asked.keys() & second.asked.keys()
    assert 0 not in [brief.number for brief in writer.briefs]
    assert result.calls == sum(world.asked.values()) + sum(second.asked.values())


@pytest.mark.parametrize("space", [SPACE, PAIR], ids=["one", "two predictors"])
def test_another_budget(space: PromptSpace, tmp_path: Path) -> None:
    """A larger one is spent, a smaller one asks for nothing; no saved score or text is paid for again."""
    path, first, writer = tmp_path / "j", World(space), Writer(moody)
    run(first, [writer], space, storage=path, max_calls=80)
    second, later = World(space), Writer(moody)
    smaller = run(second, [later], space, storage=path, max_calls=40)
    assert not second.asked
    assert not later.briefs
    assert smaller.calls == sum(first.asked.values())
    third, again = World(space), Writer(moody)
    larger = run(third, [again], space, storage=path, max_calls=160)
    assert not first.asked.keys() & third.asked.keys()
    assert min(brief.number for brief in again.briefs) == len(writer.briefs)
    assert larger.calls == sum(first.asked.values()) + sum(third.asked.values())
    assert 80 < larger.calls + len(proposals_of(larger)) <= 160
    assert not third.unknown


def test_a_budget_that_an_open_search_has_overspent_is_refused(tmp_path: Path) -> None:
    """Proposals count: the error says how many calls there were, before any other is made."""

    class Down(World):
        def __call__(self, params: dict[str, int], example: int) -> float:
            if sum(self.asked.values()) >= 70:
                raise ConnectionError("down")
            return super().__call__(params, example)

    path, writer = tmp_path / "j", Writer(better, calls=5)
    with pytest.raises(SearchStoppedError) as info:
        run(Down(), [writer], storage=path, max_calls=200, retry=RetryPolicy(attempts=1))
    spent, world = 70 + 5 * len(proposals_in(info.value.study)), World()
    with pytest.raises(InvalidArgumentError, match=f"has {spent} calls"):
        run(world, [Writer(better, calls=5)], storage=path, max_calls=72)
    assert not world.asked


@pytest.mark.parametrize(
    ("before", "now"),
    [(["a"], ["b"]), (["a"], ["a", "b"]), (["a"], []), ([], ["a"])],
    ids=["another", "one more", "none now", "none before"],
)
def test_other_proposers_are_refused(before: list[str], now: list[str], tmp_path: Path) -> None:
    """The error names both lists; no call is made."""
    run(World(), [Writer(better, name) for name in before], storage=tmp_path / "j")
    world = World()
    with pytest.raises(StudyMismatchError, match="proposers") as info:
        run(world, [Writer(better, name) for name in now], storage=tmp_path / "j")
    assert str(before) in str(info.value)
    assert str(now) in str(info.value)
    assert not world.asked
