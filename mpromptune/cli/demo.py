"""The command ``mpromptune demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpromptune.cli.arguments import add_output, amount, announce, output_console, positive, program_file
from mpromptune.errors import InvalidArgumentError

if TYPE_CHECKING:
    from mpromptune.demo.run import Task

DEMO = """\
Compiles a DSPy program with mpromptune.MIPROv2, through all of its steps, and shows the prompts
before and after, and the accuracy of both on test examples.

By default, a small language model runs on this machine, offline and without a key: SmolLM2-135M,
which comes with a package. It sorts words, questions or reviews. Its answers are real; the
instructions to choose from are written by hand, because it is too small to write them.
--model local:PATH takes another model, --prompt-model another source of instructions.

With --model and a LiteLLM name, that model solves word problems that are generated here. This
takes about 750 program calls on the validation set, plus those of DSPy's bootstrap and proposals.

With --replay, no model runs:
  recorded   answers: right or wrong as Llama-3.3-70B was on each (prompt, GSM8K example);
             embeddings of the prompts by all-MiniLM-L6-v2
  stand-in   texts of prompts and examples, and the proposer: the recording holds only numbers
  simulated  latency of validation calls (lognormal)
"""

_LATENCY = 0.2


def add_demo(demo: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    source = demo.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        help="local:PATH of a GGUF file or a Hugging Face model, or any LiteLLM name, e.g. "
        "openai/gpt-4o-mini or ollama_chat/llama3.2 (default: local:smollm2)",
    )
    source.add_argument("--replay", action="store_true", help="replay recorded answers")
    demo.add_argument(
        "--task", choices=("words", "questions", "reviews"), help="of the local model (default: words)"
    )
    demo.add_argument("--prompt-model", help="LiteLLM's name of a model that proposes instructions")
    demo.add_argument(
        "--sampler",
        choices=("qei", "tpe", "gp", "random", "stock"),
        default="qei",
        help="the sampler; stock is DSPy's own search, one trial after another (default: qei)",
    )
    demo.add_argument(
        "--proposals",
        choices=("fixed", "adaptive"),
        default="fixed",
        help="adaptive writes candidates during the search too; without --prompt-model, the local model gets "
        "new demo sets (default: fixed)",
    )
    demo.add_argument("--compare", action="store_true", help="compile a second time, by DSPy's own search")
    demo.add_argument("--num-threads", type=positive, default=16, help="calls in flight (default: 16)")
    demo.add_argument("--seed", type=int, default=9, help="seed of the compile (default: 9, as in DSPy)")
    demo.add_argument("--calls", type=positive, help="program calls to spend (default: as many as DSPy)")
    demo.add_argument("--latency", type=amount, help=f"mean seconds of a replayed call (default: {_LATENCY})")
    add_output(demo, "the program", "mpromptune-demo.json", program_file)
    demo.set_defaults(run=_demo, announces=True)


def _demo(args: argparse.Namespace) -> None:
    from mpromptune.demo.run import STOCK, run_demo

    options = {name: getattr(args, name) for name in ("num_threads", "seed", "calls", "proposals")}
    samplers = list(dict.fromkeys([args.sampler, *([STOCK] if args.compare else [])]))
    if STOCK in samplers and args.calls is not None:
        raise InvalidArgumentError(
            f"--calls {args.calls} has no effect on DSPy's own search, which sets its own number. Leave out "
            "--calls, or both --compare and --sampler stock."
        )
    run_demo(_task(args), output_console(), args.output, samplers=samplers, **options)


def _task(args: argparse.Namespace) -> Task:
    is_local = not args.replay and (args.model or "local:").startswith("local:")
    if not is_local and (args.task or args.prompt_model):
        raise InvalidArgumentError("--task and --prompt-model are for models that run here (local:...).")
    if not args.replay and args.latency is not None:
        raise InvalidArgumentError("--latency is for --replay.")
    if args.replay:
        from mpromptune.demo.replay import replay_task

        return replay_task(_LATENCY if args.latency is None else args.latency)
    if is_local:
        announce("Loading the local model; the first time it is converted, which takes up to a minute")
        from mpromptune.demo.sorting import sorting_task

        return sorting_task(args.task or "words", args.model or "local:smollm2", args.prompt_model)
    from mpromptune.demo.live import live_task

    return live_task(args.model)
