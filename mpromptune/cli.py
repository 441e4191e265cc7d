"""The ``mpromptune`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpromptune
from mpromptune.errors import MPromptuneError

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
        "--latency", type=_seconds, default=0.2, help="mean seconds of a simulated call (default: 0.2)"
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
    from mpromptune.reading import read_result
    from mpromptune.report import write_report

    result, notes = read_result(args.storage, args.study_name)
    print(f"Wrote {write_report(result, args.output, notes)}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds; got {text}")
    return value


_COMMANDS = (_add_demo, _add_report)
