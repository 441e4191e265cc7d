"""The live view of a compile: what it says, where it is shown, and that it harms nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from clocks import Clock
from embedders import hashed
from faults import press_ctrl_c
from handmade import BASELINE as BASELINE_ROW
from handmade import WINNER, findings
from lms import arithmetic_lm
from rich.console import Console
from rich.live import Live
from tasks import FEW_SHOT, SMALL_RUN, SMALL_RUN_CALLS, TRAIN, VAL, Counted, Planner

from mpromptune import MIPROv2
from mpromptune.engine.arguments import resolve
from mpromptune.engine.options import SearchOptions
from mpromptune.execution.attempts import Load
from mpromptune.execution.interrupts import handled
from mpromptune.execution.limits import Budget, Limits
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.checks import check_embedder
from mpromptune.show.closing import closing
from mpromptune.show.progress import Progress, Standing
from mpromptune.show.screens import Lines, Notebook, Terminal, choose
from mpromptune.show.view import Screen, View
from mpromptune.storage.attributes import EXAMPLES, SCORES

ROOT = Path(__file__).parent.parent
FREE = Load(running=8, limit=16, most=16)
BEST = Standing(mean=0.842, std=0.02, measured=0.86, examples=200)
BASELINE = Standing(mean=0.785, std=0.03, measured=0.79, examples=200)


def report(**changes: Any) -> Progress:
    numbers: dict[str, Any] = {
        "calls": 512,
        "max_calls": 1630,
        "trials": 13,
        "batches": 4,
        "n_examples": 200,
        "best": BEST,
        "baseline": BASELINE,
        "load": FREE,
        "usage": Usage(),
        "limits": Limits(),
        "seconds": 200.0,
        "seconds_left": 430.0,
    }
    return Progress(**{**numbers, **changes})


def view_on(
    screen: Screen | None = None,
    *,
    usage: Usage | None = None,
    limits: Limits | None = None,
    load: Load = FREE,
    clock: Clock | None = None,
) -> View:
    budget = Budget(limits)
    budget.step("search").add(usage or Usage(lm_calls=530))
    return View(lambda: screen, budget, lambda: load, clock or Clock())


def shown() -> View:
    """The search, 200 seconds after a bootstrap of 12."""
    usage = Usage(530, 12, prompt_tokens=1_000_000, completion_tokens=234_000, cost=0.3112)
    slowed, clock = Load(running=4, limit=4, most=16, pause=12.4), Clock()
    view = view_on(usage=usage, limits=Limits(max_cost=5.0), load=slowed, clock=clock)
    sets = view.bar("Bootstrapping", 6, "demo sets")
    clock.sleep(12.0)
    sets.advance(6)
    view.bar("Searching", 1630, "calls")
    clock.sleep(200.0)
    view.on_progress(report(load=slowed))
    return view


class Tty(io.StringIO):
    """What a terminal is to Python."""

    def isatty(self) -> bool:
        return True


class Recorded(Screen):
    """Keeps what it was shown: steps and status; it may fail.

    Args:
        error: Raised by the second frame.
    """

    interval = 0.001

    def __init__(self, error: BaseException | None = None) -> None:
        self.frames: list[tuple[list[tuple[str, int, int, bool]], list[str]]] = []
        self.closed = 0
        self._error = error

    def show(self, view: View) -> None:
        self.frames.append(([(b.title, b.done, b.total, b.ended) for b in view.bars], view.status))
        if self._error is not None and len(self.frames) == 2:
            raise self._error

    def close(self, view: View) -> None:
        self.show(view)
        self.closed += 1


def terminal() -> tuple[Terminal, io.StringIO]:
    screen = io.StringIO()
    return Terminal(Console(file=screen, width=80, force_terminal=True, color_system=None)), screen


def compiled(lm: Any = None, **options: Any) -> Any:
    """A small compile of two predictors, through all three steps."""
    settings = {"auto": None, "num_candidates": 3, "num_threads": 4, **FEW_SHOT, **options.pop("own", {})}
    lm = lm or arithmetic_lm()
    with dspy.context(lm=lm):
        optimizer = MIPROv2(metric=Counted(), **settings)
        run = {"sampler": "qei", "embedder": hashed, **SMALL_RUN, **options}
        return optimizer.compile(Planner(), trainset=TRAIN, valset=VAL, **run)


@pytest.fixture
def dspy_is_silent() -> Iterator[None]:
    """Its log lines have a switch of their own."""
    dspy.disable_logging()
    yield
    dspy.enable_logging()


def test_status_while_the_search_runs() -> None:
    """Estimates in percent with 1.96 deviations, expenses with their limits, calls with what lowers them."""
    assert shown().status == [
        "best 84.2 ± 3.9 %, baseline 78.5 ± 5.9 % (95 %), 13 trials",
        "530 LM calls, 12 cache hits, 1.2M tokens, $0.3112 of $5.00",
        "4 of 16 calls in flight, 4 allowed because of rate limits, pausing for 12 s",
    ]
    failing = view_on(load=replace(FREE, failed=9)).status
    assert failing[-1] == "8 of 16 calls in flight, 9 failures since the last answer"


def test_scores_of_another_unit_are_no_percentages() -> None:
    """A metric that counts, for example."""
    one = Standing(mean=8.42, std=0.5, measured=8.6, examples=200)
    view = view_on()
    view.bar("Searching", 1630, "calls")
    view.on_progress(report(best=one, baseline=None))
    assert view.status[0] == "best 8.42 ± 0.98 (95 %), 13 trials"


def test_a_continued_search_says_what_earlier_runs_have_done() -> None:
    """Also one that is to make fewer calls than they did, whose bar is full."""
    view = view_on()
    bar = view.bar("Searching", 60, "calls", earlier=512)
    view.on_progress(report(finished=True))
    view.close()
    assert view.status == ["13 trials", "530 LM calls", "including 512 program calls of earlier runs"]
    assert (bar.texts[0], bar.percent) == ("512/512 calls", 100)
    view.findings = findings(calls=520, usage=StepUsage(search=Usage(530, program_calls=600)))
    assert dict(view.summary)["Cost"] == (
        "600 program calls, 530 LM calls in all runs together; in this run: 8 calls of the search and 0:00:00"
    )


@pytest.mark.parametrize(
    ("usage", "limits", "line"),
    [
        (Usage(lm_calls=530), None, "530 LM calls"),
        (
            Usage(lm_calls=530),
            Limits(max_cost=0.5, max_tokens=20_000),
            "530 LM calls, 0 of 20.0k tokens, $0.00 of $0.5000",
        ),
        (Usage(cost=31.2), None, "0 LM calls, $31.20"),
    ],
)
def test_money_and_tokens_are_shown_where_they_are_known(
    usage: Usage, limits: Limits | None, line: str
) -> None:
    """Neither is, for a model without prices that reports none; with a limit it is what matters."""
    assert view_on(usage=usage, limits=limits).status[0] == line


def test_a_terminal_of_80_columns_holds_it() -> None:
    """Bars of one length below each other, and no line is broken or cut off."""
    drawing, screen = terminal()
    view = shown()
    drawing.show(view)
    drawing.close(view)
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()[-5:]
    bars, status = drawn[:2], drawn[2:]
    assert [line.split()[0] for line in bars] == ["Bootstrapping", "Searching"]
    assert bars[0].split()[2:] == ["6/6", "demo", "sets", "0:00:12"]
    assert bars[1].split()[2:] == ["512/1630", "calls", "0:03:20", "0:07:10", "left"]
    assert bars[0].index("demo sets") + len("demo sets") == bars[1].index("calls") + len("calls")
    assert max(map(len, drawn)) <= 80
    assert [line.strip() for line in status] == view.status


def test_steps_to_come_are_named_until_the_end() -> None:
    """Three steps from the beginning; one that was left out is not named later."""
    view = view_on()
    named = [view.ahead]
    for title in ("Bootstrapping", "Searching"):
        view.bar(title, 6, "units")
        named.append(view.ahead)
    assert named == [(), ("Proposing", "Searching"), ()]


def test_five_lines_end_a_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the status: gain, certainty, prompt, cost and what to do next, on 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    drawing, screen = terminal()
    stream, view = io.StringIO(), shown()
    usage = Usage(530, prompt_tokens=2000, cost=1.5, program_calls=12)
    view.findings = findings(usage=StepUsage(search=usage))
    assert view.summary == []
    drawing.show(view)
    view.close()
    drawing.close(view)
    Lines(stream).close(view)
    lines = [
        "Score: 25.0 % → 75.0 %, 2 more of 4 right",
        "Certainty: over 99 % sure to be better than your program; 2 doubts in the report",
        "Winner: “Answer <b>slowly</b>.”, no demos",
        "Cost: 12 program calls, 530 LM calls, 2.0k tokens, $1.50, 0:03:32",
        'Next: best.save("best.json"); best.search_result.report("report.html")',
    ]
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).splitlines()[-5:]
    assert [re.sub(r"^(\w+) +", r"\1: ", line).rstrip() for line in drawn] == lines
    assert [line.removeprefix("mpromptune: ") for line in stream.getvalue().splitlines()[-5:]] == lines
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    Lines(ascii_only).close(view)
    assert b"Score: 25.0 % \\u2192 75.0 %" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]


def test_closing_lines_are_whole_on_narrow_terminals() -> None:
    """They are wrapped, and no command is cut."""
    screen, view = io.StringIO(), shown()
    view.findings = findings(configurations=(WINNER, replace(BASELINE_ROW, scores={0: 0.0}, fully=False)))
    view.close()
    Terminal(Console(file=screen, width=60, force_terminal=True, color_system=None)).close(view)
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    assert max(map(len, drawn)) <= 60
    for command in ('best.save("best.json")', 'best.search_result.report("report.html")', "confirm=True"):
        assert any(command in line for line in drawn)
    # 0.3 ± 1.96 times 0.03.
    said = " ".join(" ".join(drawn).split())
    assert "Score 25.0 % (24.1 to 35.9 % from 1 of 4 examples) → 75.0 %, about 2 more of 4 right" in said


@pytest.mark.parametrize(
    ("changes", "label", "text"),
    [
        ({"best_params": BASELINE_ROW.params}, "Certainty", "nothing better than your program was found"),
        ({"baseline_score": float("nan")}, "Score", "not measured → 75.0 % on 4 validation examples"),
        ({"stopped_by": "max_cost"}, "Next", 'best.save("best.json"); or raise max_cost and call again'),
    ],
    ids=["no gain", "no baseline", "stopped"],
)
def test_the_end_says_what_was_not_reached(changes: dict[str, Any], label: str, text: str) -> None:
    """No gain, no baseline, or a limit."""
    assert dict(closing(findings(**changes), 1.0))[label].startswith(text)


def test_a_command_names_its_own_next_step() -> None:
    """The last line is then what the user of the command can type."""
    assert closing(findings(), 1.0, "mpromptune report run.log")[-1] == ("Next", "mpromptune report run.log")


@pytest.mark.parametrize(
    ("embedder", "titles"),
    [("none/of this name", ["Loading"]), ("index", []), (hashed, [])],
    ids=["name", "index", "function"],
)
def test_loading_the_embedding_model_is_a_step(
    monkeypatch: pytest.MonkeyPatch, embedder: Any, titles: list[str]
) -> None:
    """It is shown before it begins, unless there is no model to load."""
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    monkeypatch.setattr(SearchOptions, "made_sampler", lambda *_: None)
    view = view_on(screen=None)
    check_embedder(SearchOptions(embedder=embedder), view, Planner())
    assert [bar.title for bar in view.bars] == titles
    assert all(bar.ended for bar in view.bars)
    view.close()


def test_a_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a frame that cannot be drawn: streams are back, and the cursor is seen again."""
    streams, (drawing, screen) = (sys.stdout, sys.stderr), terminal()
    monkeypatch.setattr("mpromptune.show.screens._drawn", lambda view: 1 / 0)
    view = view_on(drawing)
    view.bar("Searching", 10, "calls")
    view.close()
    assert (sys.stdout, sys.stderr) == streams
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("piped", [True, False])
def test_what_a_script_prints_goes_where_it_went(piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe, while the terminal shows bars; above the bars, where both are the terminal."""
    out = io.StringIO() if piped else Tty()
    monkeypatch.setattr(sys, "stdout", out)
    drawing, screen = terminal()
    drawing.show(shown())
    print("a result")  # noqa: T201 - what is tested
    drawing.close(shown())
    assert ("a result" in out.getvalue(), "a result" in screen.getvalue()) == (piped, not piped)


def test_log_lines_appear_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of handlers too that were made before, as by `logging.basicConfig`; then they are given back."""
    stream = Tty()
    monkeypatch.setattr(sys, "stderr", stream)
    handler, own = logging.StreamHandler(), logging.getLogger("somebody's")
    monkeypatch.setattr(own, "handlers", [handler])
    drawing, screen = terminal()
    drawing.show(shown())
    own.error("a line")
    drawing.close(shown())
    assert (stream.getvalue(), screen.getvalue().count("a line")) == ("", 1)
    own.error("another")
    assert (stream.getvalue(), handler.stream) == ("another\n", stream)


def test_lines_begin_and_end_each_step() -> None:
    """Steps that were over before anybody looked are there too; a log can be read with anything."""
    stream, clock = io.StringIO(), Clock()
    lines, view = Lines(stream), view_on(clock=clock)
    sets = view.bar("Bootstrapping", 6, "demo sets")
    clock.sleep(12.0)
    sets.advance(6)
    view.bar("Searching", 1630, "calls")
    lines.show(view)
    clock.sleep(640.0)
    view.on_progress(report(calls=1630, finished=True))
    view.close()
    lines.close(view)
    assert not re.search(r"[\x1b\r]", stream.getvalue())
    assert [line.removeprefix("mpromptune: ") for line in stream.getvalue().splitlines()] == [
        "Bootstrapping: 6 demo sets",
        "Bootstrapping 6/6 demo sets (100 %) after 0:00:12; 530 LM calls; 8 of 16 calls in flight",
        "Searching: 1630 calls",
        "Searching 1630/1630 calls (100 %) after 0:10:40; 13 trials; 530 LM calls",
    ]


def written(moments: Iterable[tuple[float, int]]) -> list[str]:
    """The counts of the lines of one bar, after the first one, with so many done at these times."""
    stream, clock = io.StringIO(), Clock()
    lines, view = Lines(stream), view_on(clock=clock)
    bar = view.bar("Searching", 1630, "calls")
    for clock.now, done in moments:
        bar.advance(done - bar.done)
        lines.show(view)
    return [line.split()[2].split("/")[0] for line in stream.getvalue().splitlines()[1:]]


@pytest.mark.parametrize(
    ("moments", "counts"),
    [
        (enumerate([0, 100, 162, 163, 164, 325, 500, 501]), ["163", "500"]),
        (((s, 1) for s in range(601)), 20 * ["1"]),
        (((5 * 3600.0 + s, 1) for s in range(0, 1800, 60)), 2 * ["1"]),  # at once, and after 960 s
    ],
    ids=["tenths", "half minutes", "after hours"],
)
def test_lines_come_with_every_tenth_or_after_a_while(
    moments: Iterable[tuple[float, int]], counts: list[str]
) -> None:
    """Of 1630 calls: 163, 326, and so on; else every half minute, and later more rarely."""
    assert written(moments) == counts


def test_steps_follow_each_other() -> None:
    """A step ends where the next one begins; the last one shows what the search says."""
    clock = Clock()
    view = view_on(clock=clock)
    first = view.bar("Bootstrapping", 4, "demo sets")
    clock.sleep(10.0)
    first.advance(2)
    assert first.seconds_left == 10.0
    second = view.bar("Searching", 1630, "calls")
    clock.sleep(5.0)
    second.advance(0)
    view.on_progress(report())
    assert [(b.done, b.seconds, b.ended) for b in view.bars] == [(2, 10.0, True), (512, 5.0, False)]
    assert second.seconds_left == 430.0
    view.close()
    assert all(b.ended for b in view.bars)


def test_bars_count_from_any_thread() -> None:
    """No step is lost where many report at once."""
    counted = view_on().bar("Bootstrapping", 4000, "demo sets")
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [counted.advance() for _ in range(500)])
    assert counted.done == 4000


def test_an_interrupt_while_the_view_begins_leaves_one_that_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes once the thread has begun, which shows the last frame."""
    screen, start = Recorded(), threading.Thread.start

    def interrupted_start(thread: threading.Thread) -> None:
        press_ctrl_c()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    view = view_on(screen)
    with handled(), pytest.raises(KeyboardInterrupt):
        view.bar("Searching", 1630, "calls")
    view.close()
    assert screen.closed == 1
    assert screen.frames[-1][0][-1][-1]


@pytest.mark.parametrize(
    "error", [BrokenPipeError("closed"), ValueError("I/O on closed file"), SystemExit(1)]
)
def test_a_view_that_fails_ends_no_compile(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and the compile returns what it does without a view."""
    screen = Recorded(error)
    monkeypatch.setattr("mpromptune.mipro.run.choose", lambda: screen)
    with caplog.at_level(logging.WARNING, "mpromptune"):
        best = compiled(arithmetic_lm(latency=0.002))
    assert best.search_result.calls == SMALL_RUN_CALLS
    assert (len(screen.frames), screen.closed) == (3, 1)
    assert [r.message for r in caplog.records if "view" in r.message] == [
        "The live view has ended; the compile continues."
    ]


def test_the_same_trials_with_a_view_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking changes nothing; what is shown last, and what the user's listener hears, is the result."""
    screen = Recorded()
    monkeypatch.setattr("mpromptune.mipro.run.choose", lambda: screen)
    told: list[list[Progress]] = [[], []]
    seen = compiled(confirm=True, on_progress=told[0].append)
    alone = compiled(confirm=True, on_progress=told[1].append, verbose=False)
    trials = [
        [(t.params, t.user_attrs[EXAMPLES], t.user_attrs[SCORES]) for t in best.search_result.study.trials]
        for best in (seen, alone)
    ]
    assert trials[0] == trials[1]
    bars, status = screen.frames[-1]
    assert bars == [
        ("Bootstrapping", 3, 3, True),
        ("Proposing", 6, 6, True),
        ("Searching", seen.search_result.calls, SMALL_RUN_CALLS, True),
    ]
    assert status[1].startswith(f"{seen.search_result.usage.total.lm_calls} LM calls, ")
    for heard, best in zip(told, (seen, alone), strict=True):
        assert heard[-1].finished
        assert heard[-1].best is not None
        assert 100 * heard[-1].best.measured == pytest.approx(best.score, abs=0.005)
        assert heard[-1].usage == best.search_result.usage.total


def test_what_an_interrupted_run_has_made_is_shown_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call again: three full bars, and no call."""
    compiled(storage=tmp_path / "run.log", verbose=False)
    screen, lm = Recorded(), arithmetic_lm()
    monkeypatch.setattr("mpromptune.mipro.run.choose", lambda: screen)
    compiled(lm, storage=tmp_path / "run.log")
    assert [bar[:3] for bar in screen.frames[-1][0]] == [
        ("Bootstrapping", 3, 3),
        ("Proposing", 6, 6),
        ("Searching", SMALL_RUN_CALLS, SMALL_RUN_CALLS),
    ]
    assert lm.calls == []


@pytest.mark.usefixtures("dspy_is_silent")
@pytest.mark.parametrize(
    "options",
    [
        {"verbose": False},
        {"sampler": None, "sampler_config": {"sampler": "qei", "verbose": False}},
        {"own": {"verbose": False}},
    ],
    ids=["compile", "sampler_config", "constructor"],
)
def test_verbose_false_is_silence(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Wherever it is given, not a byte goes to standard output or error."""
    compiled(**options)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("dspy_is_silent")
def test_without_a_terminal_there_are_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """On standard error; standard output is the caller's."""
    best = compiled()
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert not re.search(r"[\x1b\r]", err)
    assert all(line.startswith("mpromptune: ") for line in lines)
    assert lines[0] == "mpromptune: Bootstrapping: 3 demo sets"
    *_, last, score, _, _, _, following = lines
    assert f"Searching {SMALL_RUN_CALLS}/{SMALL_RUN_CALLS} calls (100 %)" in last
    assert f" → {best.score:.1f} % (" in score
    assert following.startswith("mpromptune: Next: best.save(")


def test_verbose_alone_asks_for_no_sampler() -> None:
    """It is DSPy's own argument too: its search stays in place, and what it takes for true is taken."""
    assert resolve({"verbose": False}, {"verbose": True}) is None
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(metric=Counted(), verbose=1)
    assert optimizer.verbose == 1
    overriding = resolve({"verbose": False, "sampler": "qei"}, {"verbose": True})
    assert overriding is not None
    assert overriding.verbose


def test_the_place_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, a dumb one, a pipe, a notebook, and nothing at all."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Tty())
    assert isinstance(choose(), Terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(), Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(choose(), Lines)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert isinstance(choose(), Notebook)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    assert choose() is None


def test_another_live_display_keeps_its_terminal() -> None:
    """Whatever console it draws on."""
    with Live("somebody else's", console=Console(file=io.StringIO(), force_terminal=True)):
        assert choose() is None
    assert choose() is not None


_INTERRUPTED = """
import os, signal, sys, threading
import dspy
from embedders import hashed
from lms import arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, Counted, Planner
from mpromptune import MIPROv2
from mpromptune.errors import SearchInterrupted

def on_progress(progress):
    if progress.trials >= 4:
        os.kill(os.getpid(), signal.SIGINT)

with dspy.context(lm=arithmetic_lm(latency=0.01)):
    optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=4, **FEW_SHOT)
    try:
        optimizer.compile(Planner(), trainset=TRAIN, valset=VAL, embedder=hashed, batch_size=2, grace=1,
                          on_progress=on_progress, **{**SMALL_RUN, "num_trials": 30})
    except SearchInterrupted:
        print("interrupted", sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_ctrl_c_leaves_a_real_terminal_intact() -> None:
    """The cursor is seen again, streams are back, and no traceback is shown."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(ours, 65536):
            seen += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, seen[-2000:]
    text = seen.decode()
    assert "interrupted True True" in text
    assert "Searching" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.index("\x1b[?25h") < text.index("interrupted")
    assert "Traceback" not in text


_NOTEBOOK = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import warnings
warnings.simplefilter("ignore")
import dspy, optuna
from embedders import hashed
from lms import arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, Counted, Planner
from mpromptune import MIPROv2
dspy.disable_logging()
optuna.logging.set_verbosity(optuna.logging.WARNING)
dspy.configure(lm=arithmetic_lm(latency=0.01))
optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=4, **FEW_SHOT)
"""


def test_a_notebook_has_one_output_that_is_replaced() -> None:
    """In a real kernel: a single display, updated in place, whose last state is the result."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    run = "best = optimizer.compile(Planner(), trainset=TRAIN, valset=VAL, embedder=hashed, **SMALL_RUN"
    cells = [_NOTEBOOK, f"{run})", "print(best.score)", f"{run}, verbose=False)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kinds: list[str] = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message: Any, *args: Any) -> Any:
            kinds.append(message["msg_type"])
            return super().process_message(message, *args)

    Client(notebook, timeout=120, kernel_name="python3").execute()
    _, seen, printed, silent = (cell.outputs for cell in notebook.cells)
    assert [output.output_type for output in seen] == ["display_data"]
    assert kinds.count("display_data") == 1
    assert kinds.count("update_display_data") >= 3
    data = seen[0].data
    score = f" → {float(printed[0].text):.1f} %"
    done = f"{SMALL_RUN_CALLS}/{SMALL_RUN_CALLS} calls"
    assert score in data["text/html"]
    assert score in data["text/plain"]
    assert done in data["text/html"]
    assert done in data["text/plain"]
    assert all(step in data["text/html"] for step in ("Bootstrapping", "Proposing", "Searching"))
    assert silent == []
