"""The ``mpromptune`` command: its arguments and its output."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpromptune
from mpromptune.cli.arguments import (
    add_output,
    amount,
    announce,
    output_console,
    positive,
    program_file,
    up_to,
)
from mpromptune.cli.demo import DEMO, add_demo
from mpromptune.errors import (
    InvalidArgumentError,
    MissingExtraError,
    MPromptuneError,
    SearchTerminated,
    StorageError,
    StudyMismatchError,
    TargetError,
    UnknownOptionError,
)
from mpromptune.model.shared import message_of

if TYPE_CHECKING:
    from mpromptune.engine.result import SearchResult
    from mpromptune.mipro.estimate import Estimate
    from mpromptune.mipro.reading import Standing

# What the user has to change: these end a command with status 2, as wrong arguments do in argparse.
_USER_ERRORS = (
    InvalidArgumentError,
    MissingExtraError,
    StorageError,
    StudyMismatchError,
    TargetError,
    UnknownOptionError,
)
# NOTE: largest numbers of `estimate`, which makes a program and data of that size: in seconds, of some MB.
_EXAMPLES, _PREDICTORS = 1_000_000, 1000
# LiteLLM then reads its own list of prices at its import, instead of trying to load it from the web.
_LOCAL_PRICES = "LITELLM_LOCAL_MODEL_COST_MAP"

_REPORT = """\
Writes one HTML page about a search from the study in its storage=. No LM is called.

The page contains texts of prompts and demos if the study does, as after a compile. A result in
memory has more data: result.report("report.html"), best.search_result.report("report.html").
"""

_TARGET = """\
TARGET is a function that returns the result of compile of mpromptune.MIPROv2: FILE.py:FUNCTION, or
MODULE:FUNCTION for a module that is installed or in the current folder. It is called without arguments;
code under `if __name__ == "__main__"` is not run. For example, in run.py:

    def compile():
        dspy.configure(lm=dspy.LM("openai/gpt-4o-mini"))
        optimizer = MIPROv2(metric=metric, auto="medium", num_threads=16)
        return optimizer.compile(program, trainset=trainset, sampler="qei", storage="run.log")
"""

_ESTIMATE = f"""\
Estimates a compile: program calls and LM calls of each step, at most. No LM is called.

  mpromptune estimate run.py:compile
  mpromptune estimate run.py:compile --prompt-tokens 1000 --completion-tokens 200
  mpromptune estimate --auto medium --trainset 100 --valset 200 --predictors 2

{_TARGET}
The function ends at its first compile, which runs with dry_run=True. Without TARGET, the size of the
compile is given by --auto, --trainset, --valset and --predictors.
"""

_RESUME = f"""\
Resumes a compile that was interrupted, and saves its program. Nothing is paid for twice.

  mpromptune resume run.py:compile --output best.json

{_TARGET}
Its compile must have storage=, as when it was interrupted. First the command prints the state of the
compile, and what is left to pay; then it resumes it. A compile that has ended returns its program again
without an LM call.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments, without the program's name; by default those of the process.

    Returns:
        The exit status: 0; 2 if something given is wrong, 1 after another error, 130 after Ctrl-C and 143
        after SIGTERM.
    """
    args = _parser().parse_args(argv)
    try:
        if getattr(args, "announces", False) or (sys.stderr is not None and sys.stderr.isatty()):
            announce("Loading DSPy, which takes some seconds")
        with _quiet_libraries(), _any_text():
            args.run(args)
        return 0
    except MPromptuneError as error:
        if getattr(args, "traceback", False):
            traceback.print_exc()
        print(f"mpromptune: {error}", file=sys.stderr)
        return 2 if isinstance(error, _USER_ERRORS) else 1
    except KeyboardInterrupt as signalled:
        print("mpromptune: interrupted", file=sys.stderr)
        return signalled.code if isinstance(signalled, SearchTerminated) else 130


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Show only warnings and errors of DSPy and Optuna, and errors of LiteLLM.

    Log levels are not changed: loggers and handlers get a filter, which is removed at the end, as is the
    variable of the environment.
    """
    filtered: list[tuple[logging.Filterer, Any]] = [(logging.getLogger("LiteLLM"), _is_error)]
    filtered[0][0].addFilter(_is_error)
    prices = os.environ.get(_LOCAL_PRICES)
    os.environ.setdefault(_LOCAL_PRICES, "True")
    try:
        import dspy  # noqa: F401 - it creates handlers, as the call below does
        import optuna

        optuna.logging.get_verbosity()
        for name in ("dspy", "optuna"):
            filtered += [(handler, _is_news) for handler in logging.getLogger(name).handlers]
        for where, test in filtered:
            where.addFilter(test)
        yield
    finally:
        for where, test in filtered:
            where.removeFilter(test)
        if prices is None:
            os.environ.pop(_LOCAL_PRICES, None)


@contextmanager
def _any_text() -> Iterator[None]:
    """Print ``?`` for characters that the encoding of the standard output lacks, instead of failing."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    errors = out.errors
    out.reconfigure(errors="replace")
    try:
        yield
    finally:
        out.reconfigure(errors=errors)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to show a record: no messages below warnings, and not a warning caused by DSPy's proposer."""
    own_doing = message_of(record).startswith("Input contains fields not in signature")
    return record.levelno >= logging.WARNING and not own_doing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpromptune", description="Batch Bayesian optimisation of the prompts of DSPy programs."
    )
    parser.add_argument("--version", action="version", version=f"mpromptune {mpromptune.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    raw = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_demo(raw("demo", help="compile a program on a small model on this machine", description=DEMO))
    _add_estimate(raw("estimate", help="estimate a compile without calling an LM", description=_ESTIMATE))
    _add_resume(raw("resume", help="resume a compile that was interrupted", description=_RESUME))
    _add_report(
        raw(
            "report",
            help="write an HTML page about a search, finished or running, from its study",
            description=_REPORT,
        )
    )
    return parser


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("storage", metavar="STORAGE", help="path of a journal file, or URL of a database")
    report.add_argument("--study-name", help="name of the study; not needed if the storage has only one")
    add_output(report, "it", "report.html", Path)
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from mpromptune.mipro.reading import read_result
    from mpromptune.show.page import write_report

    result, notes = read_result(args.storage, args.study_name)
    print(f"Wrote {write_report(result, args.output, notes)}")


def _add_estimate(estimate: argparse.ArgumentParser) -> None:
    _add_target(estimate, nargs="?")
    tokens = estimate.add_argument_group("tokens and dollars of a typical LM call")
    tokens.add_argument("--prompt-tokens", type=positive, metavar="N", help="tokens sent")
    tokens.add_argument("--completion-tokens", type=positive, metavar="N", help="tokens received")
    tokens.add_argument(
        "--price",
        type=amount,
        nargs=2,
        metavar=("SENT", "RECEIVED"),
        help="US dollars per million tokens (default: those of prices=, or LiteLLM's)",
    )
    numbers = estimate.add_argument_group("instead of TARGET")
    numbers.add_argument("--auto", choices=("light", "medium", "heavy"), help="of MIPROv2")
    numbers.add_argument("--trainset", type=up_to(_EXAMPLES), metavar="N", help="training examples")
    numbers.add_argument("--valset", type=up_to(_EXAMPLES), metavar="N", help="validation examples")
    numbers.add_argument("--predictors", type=up_to(_PREDICTORS), metavar="N", default=1, help="default: 1")
    numbers.add_argument("--zero-shot", action="store_true", help="no demos, instructions only")
    numbers.add_argument("--model", help="LiteLLM's name, for its price")
    estimate.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> None:
    sizes = args.auto, args.trainset, args.valset
    has_target = args.target is not None
    if has_target == all(sizes) or (has_target and any(sizes)):
        raise InvalidArgumentError("Pass either TARGET, or --auto, --trainset and --valset; see --help.")
    tokens = args.prompt_tokens, args.completion_tokens
    if any(tokens) != all(tokens) or (args.price and not all(tokens)):
        raise InvalidArgumentError("Dollars need both --prompt-tokens and --completion-tokens.")
    from mpromptune.cli.compiles import estimate_by_numbers, estimate_of

    if has_target:
        estimate = estimate_of(args.target)
    else:
        estimate = estimate_by_numbers(*sizes, args.predictors, args.zero_shot, args.model)
    if args.price:
        estimate = estimate.with_price(*args.price)
    _show_estimate(estimate.with_tokens(*tokens) if all(tokens) else estimate)


def _show_estimate(estimate: Estimate) -> None:
    """Print a row for each step, and one for all; with tokens and dollars if tokens were given."""
    rows = [["at most", "program calls", "LM calls"]]
    if estimate.usage.total.tokens:
        rows[0] += ["tokens", "US dollars"]
    for step, usage in [*estimate.usage.items(), ("in total", estimate.usage.total)]:
        rows.append([step, f"{usage.program_calls:,}", f"{usage.lm_calls:,}"])
        if estimate.usage.total.tokens:
            asking = [name for name, one in estimate.usage.items() if one.lm_calls]
            unknown = any(not estimate.prices.get(name) for name in asking if step in (name, "in total"))
            rows[-1] += [f"{usage.tokens:,}", "price not known" if unknown else f"{usage.cost:.2f}"]
    _print_table(rows)
    from mpromptune.mipro.estimate import WRITING

    if WRITING in estimate.usage:
        print("A request of a proposal during the search takes the place of a program call.")
    print("Without retries. No LM was called.")


def _add_resume(resume: argparse.ArgumentParser) -> None:
    _add_target(resume)
    add_output(resume, "the program", "best.json", program_file)
    resume.set_defaults(run=_resume)


def _resume(args: argparse.Namespace) -> None:
    from mpromptune.cli.compiles import resume
    from mpromptune.show.descent import descents

    program = resume(args.target, _show_standing)
    program.save(str(args.output))
    result = program.search_result
    print(f"Best: {_best(result)}; {result.calls:,} calls of the search in all")
    for one in descents(result).values():
        print(f"{one.title}: written by {', then '.join(one.proposers)}, {' → '.join(one.names)}")
    print(f"Saved {args.output}")


def _show_standing(standing: Standing, estimate: Estimate) -> None:
    """Print what is paid, what is left to pay, and the best configuration so far."""
    print(f"Study {standing.study.study_name!r}: {standing.trials} trials have ended.")
    left = standing.left(estimate)
    rows = [["", "program calls", "LM calls", "US dollars", "left: program calls", "LM calls"]]
    for step, due in [*left.items(), ("in total", left.total)]:
        paid = standing.used.get(step) or (standing.used.total if step == "in total" else type(due)())
        cost = f"{paid.cost:.4f}" if paid.cost else ""
        counts = [f"{n:,}" for n in (paid.program_calls, paid.lm_calls, due.program_calls, due.lm_calls)]
        rows.append([step, *counts[:2], cost, *counts[2:]])
    _print_table(rows)
    if standing.result is not None:
        print(f"Best so far: {_best(standing.result)}")
    print("The numbers left are at most, without retries; answers from DSPy's cache are free.")


def _best(result: SearchResult) -> str:
    from mpromptune.show.analysis import baseline, winner
    from mpromptune.show.words import told

    best, own = (told(result, one) for one in (winner(result), baseline(result)))
    return f"{best.score} {best.basis}; your own program: {own.score} {own.basis}".rstrip()


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows[1:]:
        table.add_row(*row)
    output_console().print(table, highlight=False)


def _add_target(command: argparse.ArgumentParser, **settings: Any) -> None:
    command.add_argument(
        "target", metavar="TARGET", help="FILE.py:FUNCTION or MODULE:FUNCTION, see above", **settings
    )
    command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
