"""The second step of a compile: the instructions of DSPy's proposer, with concurrent LM calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import dspy
from dspy.propose import GroundedProposer
from dspy.propose.dataset_summary_generator import create_dataset_summary
from dspy.propose.grounded_proposer import GenerateModuleInstruction, generate_instruction_class
from dspy.propose.utils import strip_prefix
from dspy.teleprompt.mipro_optimizer_v2 import BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT
from dspy.teleprompt.utils import get_signature
from dspy.utils.callback import BaseCallback

from mpromptune.errors import EmptyInstructionError
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.interrupts import check_stopped, contained, result_of
from mpromptune.lms.adapters import Keeping, keep_nothing
from mpromptune.lms.errors import classify
from mpromptune.lms.metering import measured
from mpromptune.mipro.checkpoint import Instructions
from mpromptune.mipro.run import Run, Threads
from mpromptune.operators.texts import encodable
from mpromptune.show.view import PROPOSING

logger = logging.getLogger(__name__)

# Attributes that determine the fields of a request for an instruction, in addition to the summary.
_FIELDS = ("program_aware", "use_task_demos", "use_instruct_history", "use_tip")


def begin(run: Run, program: Any, trainset: Any) -> None:
    """Request the dataset summary, which needs no demos, during the bootstrap."""
    flags = run.arguments
    own = ("prompt_model", "verbose", "rng", "init_temperature")
    with measured(run.budget.step("propose")):
        run.proposer = ConcurrentProposer(
            run.threads,
            partial(run.keeping, "propose"),
            program=program,
            trainset=trainset,
            view_data_batch_size=flags["view_data_batch_size"],
            program_aware=flags["program_aware_proposer"],
            use_dataset_summary=flags["data_aware_proposer"],
            use_task_demos=flags["fewshot_aware_proposer"],
            num_demos_in_context=BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
            use_tip=flags["tip_aware_proposer"],
            set_tip_randomly=flags["tip_aware_proposer"],
            use_instruct_history=False,
            set_history_randomly=False,
            **{name: getattr(run.optimizer, name) for name in own},
        )


def instructions(run: Run, given: Mapping[str, Any]) -> Instructions:
    """Step 2: the instructions of each predictor, its own first. ``given`` are DSPy's arguments, by name."""
    with run.step("propose"):
        kept = None if run.checkpoint is None else run.checkpoint.instructions()
        if kept is not None:
            logger.info("The instructions of an interrupted run are used again.")
            number = sum(map(len, kept.values()))
            run.view.bar(PROPOSING, number, "instructions").advance(number)
            return kept
        proposed = _proposed(run, given)
        if run.checkpoint is not None:
            run.checkpoint.keep_instructions(proposed)
        return proposed


def _proposed(run: Run, given: Mapping[str, Any]) -> Instructions:
    program, trainset, demos = (given[name] for name in ("program", "trainset", "demo_candidates"))
    number, predictors = given["num_instruct_candidates"], program.predictors()
    if run.proposer is None:
        begin(run, program, trainset)
    each = min(number, max(len(demos[0]), 1)) if demos else number
    bar = run.view.bar(PROPOSING, each * len(predictors), "instructions")
    proposed: Instructions = run.proposer.propose_instructions_for_program(
        trainset=trainset,
        program=program,
        demo_candidates=demos,
        trial_logs={},
        N=number,
        on_instruction=bar.advance,
    )
    for i, predictor in enumerate(predictors):
        proposed[i][0] = get_signature(predictor).instructions
    return proposed


class ConcurrentProposer(GroundedProposer):
    """Makes all random draws in DSPy's order, and requests all instructions concurrently.

    The dataset summary is requested first; only the last request for each instruction waits for it.

    Args:
        threads: Make the LM calls.
        keep: Makes the context of a proposal, from its random draw, or of the ``"summary"``.
        **arguments: Arguments of ``GroundedProposer``.
    """

    def __init__(
        self,
        threads: Threads,
        keep: Keeping = keep_nothing,
        **arguments: Any,
    ) -> None:
        self._threads = threads
        self._keep = keep
        self._summary: Future[str | None] | None = None
        wants_summary = arguments.pop("use_dataset_summary", True)
        super().__init__(use_dataset_summary=False, **arguments)
        if wants_summary:
            seen = arguments["trainset"], arguments["view_data_batch_size"]
            self._summary = threads.submit(self._summarised, *seen)

    def propose_instructions_for_program(
        self, *args: Any, program: Any, on_instruction: Callable[[], None] = lambda: None, **kwargs: Any
    ) -> Instructions:
        """As in ``GroundedProposer``; ``on_instruction`` is called after every instruction, in order.

        If a request gives no instruction, the predictor's own instruction, which is always a candidate, is
        used instead.
        """
        propose: Callable[..., dict[int, list[Future[str]]]] = super().propose_instructions_for_program
        started = propose(*args, program=program, **kwargs)
        failures: list[Exception] = []
        proposed: Instructions = {}
        for i, predictor in enumerate(program.predictors()):
            proposed[i] = []
            for future in started[i]:
                text = _instruction(future, failures)
                proposed[i].append(get_signature(predictor).instructions if text is None else text)
                on_instruction()
        _check_failures(failures, sum(map(len, proposed.values())))
        return proposed

    def propose_instruction_for_predictor(
        self,
        demo_candidates: Any,
        tip: Any = None,
        predictor: Any = None,
        trial_logs: Any = None,
        **given: Any,
    ) -> Future[str]:
        """Start a proposal, with the tip that DSPy has just drawn and a rollout id that is drawn here."""
        rollout = self.rng.randint(0, 10**9)
        generator = GenerateModuleInstruction(
            program_code_string=self.program_code_string,
            use_dataset_summary=False,
            program_aware=self.program_aware,
            use_task_demos=self.use_task_demos and demo_candidates,
            use_instruct_history=False,
            use_tip=self.use_tip,
            verbose=self.verbose,
        )
        # Read now, because the generator changes them if it fails to describe the program, but DSPy's last
        # request uses the original ones.
        fields = {name: getattr(generator, name) for name in _FIELDS}
        generator.generate_module_instruction = partial(self._generated, fields)
        given.update(demo_candidates=demo_candidates, tip=tip, num_demos_in_context=self.num_demos_in_context)
        return self._threads.submit(self._ask, generator, rollout, given)

    def _ask(self, generator: Any, rollout: int, given: Mapping[str, Any]) -> str:
        lm = self.prompt_model.copy(rollout_id=rollout, temperature=self.init_temperature)
        with self._keep(rollout), _retrying(self._threads), dspy.context(lm=lm):
            made = generator(data_summary=None, previous_instructions="", **given)
            return str(strip_prefix(made.proposed_instruction))

    def _generated(self, fields: Mapping[str, Any], /, **inputs: Any) -> Any:
        """The last request of DSPy's generator, with the summary, which the generator does not know."""
        summary = None if self._summary is None else self._summary.result()
        ask = generate_instruction_class(bool(summary), **fields)
        return ask(**{**inputs, "dataset_description": summary})

    def _summarised(self, trainset: Any, batch_size: int) -> str | None:
        """DSPy's dataset summary; None if its requests fail, so that proposals are made without it."""
        try:
            with self._keep("summary"), _retrying(self._threads):
                return str(create_dataset_summary(trainset, batch_size, self.prompt_model))
        except Exception as error:
            if classify(error) is Verdict.STOP:
                raise
            check_stopped()
            logger.warning("There is no dataset summary; instructions are proposed without it: %s", error)
            return None


def _instruction(future: Future[str], failures: list[Exception]) -> str | None:
    """The instruction of a request; None if it failed, and then its error is added to ``failures``."""
    try:
        instruction = result_of(future)
        if not instruction.strip():
            raise EmptyInstructionError("The prompt model returned an empty instruction.")
    except Exception as error:
        if classify(error) is Verdict.STOP:
            raise
        failures.append(error)
        return None
    return instruction


def _check_failures(failures: list[Exception], requests: int) -> None:
    """Raise an error if all requests failed, or half of them because of the infrastructure; else warn."""
    outages = [error for error in failures if classify(error) in INFRASTRUCTURE]
    if failures and (len(failures) == requests or 2 * len(outages) >= requests):
        raise (outages or failures)[0]
    if failures:
        logger.warning(
            "%d of %d requests for an instruction failed (%s: %s); the student's own instruction is used "
            "instead.",
            len(failures),
            requests,
            type(failures[0]).__name__,
            failures[0],
        )


@contextmanager
def _retrying(threads: Threads) -> Iterator[None]:
    """A context in which requests of DSPy's modules are retried if another attempt may succeed."""
    with dspy.context(callbacks=[*dspy.settings.callbacks, _Retrying(threads)]):
        yield


class _Retrying(BaseCallback):
    """Retries each request in a chain of requests; DSPy itself continues without an answer if one fails.

    DSPy makes a module for each request; its ``forward`` is replaced when the module is called.
    """

    def __init__(self, threads: Threads) -> None:
        self._attempts = threads.attempts

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Replace ``forward`` of a module that is about to be called."""
        if isinstance(instance, dspy.Predict) and "forward" not in vars(instance):
            instance.forward = partial(self._forward, partial(type(instance).forward, instance))

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {name: encodable(value) for name, value in kwargs.items()}
        try:
            return self._attempts(partial(contained, forward, *args, **inputs))
        except Exception as error:
            if self._attempts.down is error:
                self._attempts.down = None  # one failed request does not show an outage
            raise
