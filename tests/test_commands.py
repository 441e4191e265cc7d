"""The commands `estimate` and `resume`, with a file of the user's own."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dspy
import pytest
from lms import ScriptedLM, arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, SMALL_RUN_CALLS, TRAIN, VAL, Adder, Counted

from mpromptune import MIPROv2
from mpromptune.cli import main as cli
from mpromptune.cli.compiles import load_target
from mpromptune.errors import SearchInterrupted, SearchStoppedError, SearchTerminated
from mpromptune.mipro.estimate import interceptor
from mpromptune.mipro.reading import read_standing

# The user's file: `shared` holds what the test hands to it, and what it has done.
FILE = """
import dspy
import shared
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, Adder, Counted

from mpromptune import MIPROv2


def _compiled(**options):
    shared.began += 1
    with dspy.context(lm=shared.lm):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=2, **FEW_SHOT)
        return optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **SMALL_RUN, **options)


def compile():
    return _compiled(sampler="qei", embedder="index", storage=shared.storage)


def saving():
    try:
        best = compile()
    except Exception as error:
        raise AssertionError("nothing is to be caught here") from error
    best.save("saved.json")
    shared.saved = True


def plain():
    return _compiled()


def dry():
    return _compiled(sampler="qei", embedder="index", storage=shared.storage, dry_run=True)


def idle():
    return 1


def broken():
    raise ValueError("no data here\\nsecond line")


def needs(path, *more, **others):
    return path


number = 3
"""


class Shared:
    """What the test and the user's file share: a module of the name ``shared``."""

    def __init__(self, folder: Path) -> None:
        self.lm: ScriptedLM = arithmetic_lm()
        self.storage = str(folder / "run.log")
        self.began = 0
        self.saved = False


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """A folder with the file `run.py` in it, which is the current one."""
    (tmp_path / "run.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "wrong.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = Shared(tmp_path)
    monkeypatch.setitem(sys.modules, "shared", own)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "run", raising=False)
    return own


# Which requests are refused, by the field that is asked for and how many have been made.
REFUSED = {
    "bootstrap": lambda field, number: True,
    "propose": lambda field, number: field == "proposed_instruction",
    "search": lambda field, number: number > 30,
}


def interrupted(shared: Shared, step: str) -> None:
    """Runs the file's compile up to a request of this step that is refused."""
    sound = shared.lm._answer

    def answer(field: str, messages: Any) -> str:
        if REFUSED[step](field, len(shared.lm.calls)):
            error = type("AuthenticationError", (Exception,), {"__module__": "litellm.exceptions"})
            raise error("the key has expired")
        return sound(field, messages)

    shared.lm._answer = answer
    with pytest.raises(SearchStoppedError):
        load_target("run.py:compile")()
    shared.lm = arithmetic_lm()


@pytest.mark.parametrize("target", ["run.py:compile", "run:compile", "run.py:saving", "run.py:plain"])
def test_estimate_asks_nothing(target: str, shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes after the compile is not run, no file is made, and the search takes what DSPy's would."""
    assert cli.main(["estimate", target]) == 0
    rows = {name: row for name, *row in map(str.split, filter(None, capsys.readouterr().out.split("\n")))}
    assert rows["search"] == [str(SMALL_RUN_CALLS)] * 2
    assert rows["bootstrap"] == ["6", "6"]  # one set of at most all 6 examples
    assert (shared.began, shared.saved, shared.lm.calls) == (1, False, [])
    assert not Path(shared.storage).exists()
    assert interceptor().options == {}


def test_estimate_in_dollars(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """52 requests of 1000 + 500 tokens, at 2 and 4 dollars a million, come to 21 cents."""
    tokens = ["--prompt-tokens", "1000", "--completion-tokens", "500"]
    assert cli.main(["estimate", "run.py:compile", *tokens, "--price", "2", "4"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("search"))
    assert line.split() == ["search", "52", "52", "78,000", "0.21"]
    assert cli.main(["estimate", "run.py:compile", *tokens]) == 0
    assert "price not known" in capsys.readouterr().out


def test_estimate_by_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """As a compile of that size says itself: light, two predictors, few-shot; and nothing else is printed."""
    sizes = ["--auto", "light", "--trainset", "20", "--valset", "60", "--predictors", "2"]
    assert cli.main(["estimate", *sizes]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert [line.split("  ")[0] for line in printed.splitlines()] == [
        "at most",
        "bootstrap",
        "propose",
        "search",
        "in total",
        "Without retries. No LM was called.",
    ]
    lm = dspy.LM("nothing")
    program = dspy.Module()
    program.a, program.b = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    optimizer = MIPROv2(metric=Counted(), auto="light", prompt_model=lm, task_model=lm)
    usage = optimizer.compile(program, trainset=TRAIN[:1] * 20, valset=VAL[:1] * 60, dry_run=True).usage
    row = next(line for line in printed.splitlines() if line.startswith("in total"))
    total = usage.total
    assert row.split()[2:] == [f"{total.program_calls:,}", f"{total.lm_calls:,}"]


@pytest.mark.parametrize("step", ["bootstrap", "propose", "search"])
def test_resume_pays_only_what_is_left(step: str, shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where the compile stands, asks no more than it says, and saves what one in one go returns."""
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=2, **FEW_SHOT)
        data = {"trainset": TRAIN, "valset": VAL}
        whole = optimizer.compile(Adder(), **data, **SMALL_RUN, sampler="qei", embedder="index")
    interrupted(shared, step)
    standing = read_standing(shared.storage)
    assert (standing.result is None) == (step != "search")
    assert cli.main(["resume", "run.py:compile", "--output", "best.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    left = int(next(line for line in lines if line.startswith("in total")).split()[-1])
    assert 0 < len(shared.lm.calls) <= left
    assert ("bootstrap" in standing.done) == (step != "bootstrap")
    assert any(line.startswith("Best: ") for line in lines)
    assert "Saved best.json" in lines
    saved = json.loads(Path("best.json").read_text(encoding="utf-8"))
    saved.pop("metadata", None)
    assert saved == json.loads(json.dumps(whole.dump_state()))


def test_a_compile_that_has_ended_is_free(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """The same program, no LM call, and nothing left of the steps before the search."""
    best = load_target("run.py:compile")()
    shared.lm = arithmetic_lm()
    assert cli.main(["resume", "run.py:compile"]) == 0
    assert shared.lm.calls == []
    printed = capsys.readouterr().out
    search = best.search_result
    assert f"Best so far: {100 * search.best_score:.1f} % measured on 12 of 12 examples" in printed
    assert f"{search.calls} calls of the search in all" in printed
    standing = read_standing(shared.storage)
    assert standing.done == {"bootstrap", "propose"}
    assert standing.calls == search.calls == standing.result.calls
    assert standing.used.total.lm_calls == search.usage.total.lm_calls
    assert Path("best.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none.py:compile", "There is no file 'none.py'."),
        ("none:compile", "There is no module 'none'"),
        ("run.py:none", "run.py has no function 'none'; its functions are ['_compiled', 'compile',"),
        ("run.py:number", "run.py has no function 'number'"),
        ("run.py:needs", "run.py:needs is called without arguments, but needs ['path']."),
        ("run.py", "TARGET must be FILE.py:FUNCTION or MODULE:FUNCTION, e.g. run.py:compile; got 'run.py'."),
        ("wrong.py:compile", "wrong.py raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("wrong:compile", "wrong raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("run.py:broken", "run.py:broken raised ValueError: no data here"),
        ("run.py:idle", "run.py:idle returned without calling compile of mpromptune.MIPROv2."),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "resume"])
def test_what_is_wrong_with_a_target_is_one_line(
    command: str, target: str, message: str, shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with status 2 and no traceback; nothing is asked."""
    assert cli.main([command, target]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mpromptune: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert shared.lm.calls == []


def test_a_traceback_can_be_asked_for(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the line of the user's file."""
    assert cli.main(["estimate", "run.py:broken", "--traceback"]) == 2
    assert 'raise ValueError("no data here' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("run.py:compile", "There is no journal file"),
        ("run.py:plain", "compile is called without storage="),
        ("run.py:dry", "compile is called with dry_run=True"),
    ],
)
def test_there_must_be_something_to_go_on_with(
    target: str, message: str, shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise nothing is asked, and no storage is made."""
    assert cli.main(["resume", target]) == 2
    assert message in capsys.readouterr().err
    assert shared.lm.calls == []
    assert not Path(shared.storage).exists()


def test_the_program_has_to_be_returned(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """A function that keeps it for itself is told so, and that nothing is lost."""
    load_target("run.py:compile")()
    assert cli.main(["resume", "run.py:saving"]) == 2
    assert "run.py:saving returned NoneType, not the program" in capsys.readouterr().err
    assert shared.saved


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--auto", "light", "--valset", "20"],
        ["run.py:compile", "--auto", "light"],
        [""],
        ["run.py:compile", "--prompt-tokens", "10"],
        ["run.py:compile", "--price", "1", "2"],
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of what an estimate needs is an error, before the file is even loaded."""
    assert cli.main(["estimate", *arguments]) == 2
    assert capsys.readouterr().err.startswith("mpromptune: ")
    assert shared.began == 0


@pytest.mark.parametrize("path", ["best.txt", "none/best.json", "folder.json"])
def test_where_to_save_is_checked_first(path: str, shared: Shared) -> None:
    """A file that cannot be written is no surprise at the end."""
    Path("folder.json").mkdir()
    with pytest.raises(SystemExit) as raised:
        cli.main(["resume", "run.py:compile", "--output", path])
    assert raised.value.code == 2
    assert shared.began == 0


def test_characters_that_the_output_lacks_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are printed as question marks; the stream is as it was afterwards."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "_estimate", lambda args: out.write("a → b"))
    assert cli.main(["estimate"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"a ? b"  # type: ignore[attr-defined]
    assert out.errors == "strict"


@pytest.mark.parametrize(("signalled", "status"), [(SearchInterrupted, 130), (SearchTerminated, 143)])
def test_a_signal_decides_the_status(
    signalled: type[SearchInterrupted], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell reports Ctrl-C and SIGTERM."""
    monkeypatch.setattr(cli, "_estimate", Mock(side_effect=signalled("stopped")))
    assert cli.main(["estimate"]) == status


@pytest.mark.parametrize("command", ["demo", "estimate", "report", "resume"])
def test_help_has_an_example_or_says_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that take the user's file show one; the demo says what is replayed."""
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert command == "report" or ("stand-in" if command == "demo" else "def compile():") in printed


@pytest.mark.parametrize(
    ("name", "number"),
    [("predictors", "100000"), ("trainset", "2000000"), ("valset", "0"), ("valset", "ten")],
)
def test_sizes_that_nobody_has_are_refused(
    name: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a program or a data set of that size is made."""
    sizes = {"auto": "light", "trainset": "9", "valset": "9", "predictors": "1", name: number}
    with pytest.raises(SystemExit) as caught:
        cli.main(["estimate", *(f"--{key}={value}" for key, value in sizes.items())])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f"argument --{name}: must be from 1 to " in err
    assert f"; got {number!r}" in err
