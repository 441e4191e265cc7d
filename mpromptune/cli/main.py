"""The ``mpromptune`` command."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mpromptune
from mpromptune.errors import InvalidArgumentError, MPromptuneError

_DEMO = """\
Compiles a DSPy program with mpromptune.MIPROv2, through all of its steps.

Without --model, nothing leaves this machine:
  recorded   answers: right or wrong as Llama-3.3-70B was on each (prompt, GSM8K example);
             embeddings of the prompts by all-MiniLM-L6-v2
  stand-in   texts of prompts and examples, and the proposer: the recording holds only numbers
  simulated  latency of validation calls (lognormal)

With --model, a real model solves word problems that are generated here; about 750 program
calls on the validation set, plus those of DSPy's bootstrap and proposals.
"""

_REPORT = """\
Writes one HTML page about a search from the study that its storage= was given. No LM is asked.

The page holds texts of prompts and demos where the study does, as after a compile. A result in
memory says more: result.report("report.html"), best.search_result.report("report.html").
"""

_TARGET = """\
TARGET is a function of yours that returns what compile of mpromptune.MIPROv2 returns: FILE.py:FUNCTION,
or MODULE:FUNCTION for a module in the current folder or installed. It is called without arguments; what
stands under `if __name__ == "__main__"` is not run. For example, in run.py:

    def compile():
        dspy.configure(lm=dspy.LM("openai/gpt-4o-mini"))
        optimizer = MIPROv2(metric=metric, auto="medium", num_threads=16)
        return optimizer.compile(program, trainset=trainset, sampler="qei", storage="run.log")
"""

_ESTIMATE = (
    """\
Says what a compile takes: program calls and LM calls of each step, at most. No LM is asked.

  mpromptune estimate run.py:compile
  mpromptune estimate run.py:compile --prompt-tokens 1000 --completion-tokens 200
  mpromptune estimate --auto medium --trainset 100 --valset 200 --predictors 2

"""
    + _TARGET
    + """
The function is left at its first compile, with dry_run=True. Without TARGET, a compile of the size that
--auto, --trainset, --valset and --predictors say is reckoned with.
"""
)

_RESUME = (
    """\
Goes on with a compile that was interrupted, and saves its program. Nothing that was paid is paid again.

  mpromptune resume run.py:compile --output best.json

"""
    + _TARGET
    + """
Its compile has to have storage=, as it had when it was interrupted. Where it stands, and what is left to
pay, is printed first; then it goes on. One that has ended gives its program again without an LM call.
"""
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: Arguments, without the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except MPromptuneError as error:
        if getattr(args, "traceback", False):
            traceback.print_exc()
        print(f"mpromptune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mpromptune: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpromptune", description="Batch Bayesian optimisation of the prompts of DSPy programs."
    )
    parser.add_argument("--version", action="version", version=f"mpromptune {mpromptune.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="compile a program against recorded answers, or live",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--model", help="run live: any LiteLLM name, e.g. openai/gpt-4o-mini or ollama_chat/llama3.2"
    )
    demo.add_argument(
        "--sampler",
        choices=("qei", "tpe", "gp", "random", "stock"),
        default="qei",
        help="what proposes; stock is DSPy's own search, one trial after the other (default: qei)",
    )
    demo.add_argument("--num-threads", type=_positive, default=16, help="calls in flight (default: 16)")
    demo.add_argument("--seed", type=int, default=9, help="of the compile (default: 9, DSPy's own)")
    demo.add_argument("--calls", type=_positive, help="program calls to spend (default: what DSPy would)")
    demo.add_argument(
        "--latency", type=_amount, default=0.2, help="mean seconds of a simulated call (default: 0.2)"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("mpromptune-demo.json"),
        help="where to save the program (default: ./mpromptune-demo.json)",
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mpromptune.demo.run import DemoOptions, live_task, replay_task, run_demo

    options = DemoOptions(args.sampler, args.num_threads, args.seed, args.calls, args.output)
    task = live_task(args.model) if args.model else replay_task(args.latency)
    run_demo(task, options, Console(file=sys.stdout))
    return 0


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write an HTML page about a search, finished or running, from its study",
        description=_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("storage", metavar="STORAGE", help="path of a journal file, or URL of a database")
    report.add_argument("--study-name", help="which study; not needed where the storage has only one")
    report.add_argument(
        "--output", type=Path, default=Path("report.html"), help="where to write it (default: ./report.html)"
    )
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from mpromptune.mipro.reading import read_result
    from mpromptune.show.page import write_report

    result, notes = read_result(args.storage, args.study_name)
    print(f"Wrote {write_report(result, args.output, notes)}")
    return 0


def _add_estimate(commands: Any) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="say what a compile takes, without asking an LM",
        description=_ESTIMATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(estimate, nargs="?")
    tokens = estimate.add_argument_group("tokens and dollars, of a typical LM call")
    tokens.add_argument("--prompt-tokens", type=_positive, metavar="N", help="tokens sent")
    tokens.add_argument("--completion-tokens", type=_positive, metavar="N", help="tokens received")
    tokens.add_argument(
        "--price",
        type=_amount,
        nargs=2,
        metavar=("SENT", "RECEIVED"),
        help="US dollars per million tokens (default: those of prices=, or LiteLLM's)",
    )
    numbers = estimate.add_argument_group("instead of TARGET")
    numbers.add_argument("--auto", choices=("light", "medium", "heavy"), help="of MIPROv2")
    numbers.add_argument("--trainset", type=_positive, metavar="N", help="training examples")
    numbers.add_argument("--valset", type=_positive, metavar="N", help="validation examples")
    numbers.add_argument("--predictors", type=_positive, metavar="N", default=1, help="default: 1")
    numbers.add_argument("--zero-shot", action="store_true", help="no demos, instructions only")
    numbers.add_argument("--model", help="LiteLLM's name, for its price")
    estimate.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> int:
    sizes = args.auto, args.trainset, args.valset
    if (args.target is None) != all(sizes) or (args.target and any(sizes)):
        raise InvalidArgumentError("Give either TARGET, or --auto, --trainset and --valset; see --help.")
    tokens = args.prompt_tokens, args.completion_tokens
    if any(tokens) != all(tokens) or (args.price and not all(tokens)):
        raise InvalidArgumentError("Dollars need both --prompt-tokens and --completion-tokens.")
    from rich.console import Console

    from mpromptune.cli.compiles import estimate_by_numbers, estimate_of
    from mpromptune.cli.output import show_estimate
    from mpromptune.cli.targets import load_target

    if args.target:
        estimate = estimate_of(args.target, load_target(args.target))
    else:
        estimate = estimate_by_numbers(*sizes, args.predictors, args.zero_shot, args.model)
    if args.price:
        estimate = estimate.with_price(*args.price)
    show_estimate(Console(file=sys.stdout), estimate.with_tokens(*tokens) if all(tokens) else estimate)
    return 0


def _add_resume(commands: Any) -> None:
    resume = commands.add_parser(
        "resume",
        help="go on with a compile that was interrupted",
        description=_RESUME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(resume)
    resume.add_argument(
        "--output",
        type=_program_file,
        default=Path("best.json"),
        help="where to save the program (default: ./best.json)",
    )
    resume.set_defaults(run=_resume)


def _resume(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mpromptune.cli.compiles import resume
    from mpromptune.cli.output import show_program, show_standing
    from mpromptune.cli.targets import load_target

    console = Console(file=sys.stdout)
    program = resume(args.target, load_target(args.target), partial(show_standing, console))
    program.save(str(args.output))
    show_program(console, program.search_result, str(args.output))
    return 0


def _add_target(command: argparse.ArgumentParser, **settings: Any) -> None:
    command.add_argument(
        "target", metavar="TARGET", help="FILE.py:FUNCTION or MODULE:FUNCTION, see above", **settings
    )
    command.add_argument("--traceback", action="store_true", help="show where an error comes from")


def _program_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json" or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .json file in a folder that exists; got {text!r}")
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return value


_COMMANDS = (_add_demo, _add_estimate, _add_resume, _add_report)
