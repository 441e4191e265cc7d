"""What LMs answer before the search is paid for once, however often the process is killed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lms import ScriptedLM, arithmetic_lm
from paid import PROGRAMS, THREADS, LoggedLM, compile_and_die, kind_of, read, run

from mpromptune.storage.attributes import ANSWERS
from mpromptune.storage.storage import open_study

KILLS = 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_kill_costs_one_request_a_thread(program: str, tmp_path: Path, forks: Any) -> None:
    """In bootstrap, proposals and search; and the program is that of a run in one go."""
    path, log = tmp_path / "run.journal", tmp_path / "run.log"
    expected = run(None, LoggedLM(tmp_path / "whole.log"), program, verbose=False)
    rng = random.Random(program)
    kills = 0
    for _ in range(KILLS):
        arguments = path, log, rng.randint(8, 30), 0.02 * rng.random(), program
        process = forks.Process(target=compile_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode in (0, -9)
        kills += process.exitcode == -9
        Path(f"{path}.lock").unlink(missing_ok=True)  # which would time out by itself
    best = run(path, LoggedLM(log), program, verbose=False)
    again = read(log) - read(tmp_path / "whole.log")
    assert kills >= 3
    assert sum(again.values()) <= THREADS * kills
    assert best.dump_state() == expected.dump_state()
    lost = Counter(kind for kind, _ in again.elements())
    for step, kind in (("bootstrap", "teacher"), ("propose", "proposer")):
        used, whole = best.search_result.usage[step], expected.search_result.usage[step]
        # Each kept answer counts once; of those that were lost with a process, some are known too.
        assert 0 <= used.lm_calls - whole.lm_calls <= lost[kind]
        assert used.tokens == 15 * used.lm_calls


class Killed(SystemExit):
    """What no code handles, as if the process had gone."""


class Stopping(ScriptedLM):
    """An LM whose run ends after so many requests, with a cache of its own if it is to have one."""

    def __init__(self, n: int | None = None, caches: bool = False, padding: str = "") -> None:
        of = arithmetic_lm()._answer
        super().__init__(
            lambda field, messages: of(field, messages) + padding * (field == "program_description")
        )
        self.n, self.cache, self.answers = n, caches, {}

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        key = json.dumps(messages)
        if self.cache and key in self.answers:
            return self.answers[key]
        if self.n is not None and len(self.calls) >= self.n:
            raise Killed
        self.answers[key] = super().forward(prompt, messages, **kwargs)
        return self.answers[key]


def _resumed(storage: Any, n: int, **lm: Any) -> tuple[Counter[str], Any]:
    """How often each request was made by a run that ended after n of them, and the next one; its program."""
    first, second = Stopping(n, **lm), Stopping(**lm)
    with pytest.raises((Killed, KeyboardInterrupt)):
        run(storage, first, "two predictors", verbose=False)
    best = run(storage, second, "two predictors", verbose=False)
    return Counter(json.dumps(messages) for messages in first.calls + second.calls), best


@pytest.mark.parametrize("n", [20, 90])
def test_usage_of_a_run_that_was_stopped_counts_once(n: int, tmp_path: Path) -> None:
    """Tokens are those of all requests that were answered, in both runs: 15 for each."""
    asked, best = _resumed(tmp_path / "run.journal", n)
    kinds = Counter(kind_of(json.loads(request)) for request in asked.elements())
    usage = best.search_result.usage
    assert usage["bootstrap"].tokens == 15 * kinds["teacher"]
    assert usage["propose"].tokens == 15 * kinds["proposer"]
    assert usage["search"].tokens == 15 * kinds["student"]


def test_a_cache_that_was_lost_with_its_process(tmp_path: Path) -> None:
    """Equal requests of several demo sets share one answer, whichever run paid for it."""
    asked, best = _resumed(tmp_path / "run.journal", 50, caches=True)
    assert [request for request, n in asked.items() if n > 1] == []
    assert best.dump_state() == run(None, Stopping(), "two predictors", verbose=False).dump_state()


def test_long_answers(tmp_path: Path) -> None:
    """They are kept in pieces that any database takes; what a result is pickled with has none of them."""
    storage = tmp_path / "run.journal"
    long = ' \N{GRINNING FACE}"' * 2_000
    whole = Stopping(padding=long)
    run(None, whole, "two predictors", verbose=False)
    asked, best = _resumed(storage, 40, padding=long)
    assert asked == Counter(map(json.dumps, whole.calls))
    kept = open_study(storage).user_attrs
    sizes = [len(json.dumps(value).encode()) for name, value in kept.items() if name.startswith(ANSWERS)]
    assert len(sizes) > 100
    assert max(sizes) < 65_535
    pickled = best.search_result.__getstate__()["study"]
    assert not any(name.startswith(ANSWERS) for name in pickled.user_attrs)  # type: ignore[attr-defined]
