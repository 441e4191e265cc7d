"""Instruction proposals: DSPy's proposer with its LM calls at the same time."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import dspy
from dspy.propose import GroundedProposer
from dspy.propose.grounded_proposer import GenerateModuleInstruction, generate_instruction_class
from dspy.teleprompt.mipro_optimizer_v2 import BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT
from dspy.teleprompt.utils import get_signature
from dspy.utils.callback import BaseCallback

from mpromptune.errors import EmptyInstructionError
from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.interrupts import contained, result_of
from mpromptune.lms.errors import classify
from mpromptune.lms.kept import Keeping, keep_nothing
from mpromptune.lms.threads import Threads
from mpromptune.mipro.demos import encodable

logger = logging.getLogger(__name__)

# Everything that one proposal draws, in all versions of DSPy so far.
_DRAW = "self.rng.randint(0, 10**9)"
# All that one proposal does with the dataset summary, in all versions of DSPy so far.
_USE = "dataset_description=data_summary"
# What decides, besides the summary, which fields the request for an instruction has.
_FIELDS = ("program_aware", "use_task_demos", "use_instruct_history", "use_tip")


def is_supported() -> bool:
    """Whether this DSPy draws and reads for one proposal exactly what `ConcurrentProposer` counts on."""
    try:
        source = inspect.getsource(GroundedProposer.propose_instruction_for_predictor)
        steps = inspect.getsource(GenerateModuleInstruction.forward)
        own = dict.fromkeys(("prompt_model", "verbose", "rng", "init_temperature"))
        inspect.signature(GroundedProposer).bind(**_arguments_of(None, None, {}), **own)
        inspect.signature(generate_instruction_class).bind(False, **dict.fromkeys(_FIELDS))
    except (AttributeError, OSError, TypeError):
        return False
    used = steps.split("):", 1)[-1]  # after the parameters, of which the summary is one
    draws_once = source.count("rng") == source.count(_DRAW) == 1
    return draws_once and used.count("data_summary") == used.count(_USE) == 1


class ConcurrentProposer(GroundedProposer):
    """Draws all that is random first, in DSPy's order, and then asks for all instructions at once.

    Args:
        threads: Run the proposals.
        summary: A proposer to be, whose dataset summary is taken for this one's.
        keep: Of the proposals, each named by its draw, and of the "summary".
        **arguments: As ``GroundedProposer``; with a ``summary``, ``use_dataset_summary`` is that one's.
    """

    def __init__(
        self,
        threads: Threads,
        summary: Future[GroundedProposer] | None = None,
        keep: Keeping = keep_nothing,
        **arguments: Any,
    ) -> None:
        self._threads = threads
        self._keep = keep
        self._summary = summary
        if summary is not None:
            arguments["use_dataset_summary"] = False
        super().__init__(**arguments)

    def propose_instructions_for_program(
        self,
        trainset: Any,
        program: Any,
        *args: Any,
        on_instruction: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> dict[int, list[str]]:
        """As ``GroundedProposer``; ``on_instruction`` is called after every instruction, in order.

        A request that gives no instruction costs its predictor that one candidate: its own instruction,
        which is a candidate in any case, takes its place.
        """
        propose: Callable[..., dict[int, list[Future[str]]]] = super().propose_instructions_for_program
        started = propose(trainset, program, *args, **kwargs)
        own = [get_signature(predictor).instructions for predictor in program.predictors()]
        failures: list[Exception] = []
        proposed: dict[int, list[str]] = {i: [] for i in started}
        for i, future in ((i, future) for i, futures in started.items() for future in futures):
            text = _instruction(future, failures)
            proposed[i].append(own[i] if text is None else text)
            on_instruction()
        _check_failures(failures, sum(map(len, proposed.values())))
        return proposed

    def propose_instruction_for_predictor(self, *args: Any, **kwargs: Any) -> Future[str]:
        """Starts a proposal, with the tip that has just been drawn and a rollout that is drawn here."""
        drawn = copy.copy(self)
        drawn.rng = _Drawn(self.rng.randint(0, 10**9))
        return self._threads.submit(drawn._ask, *args, **kwargs)

    def _ask(self, *args: Any, **kwargs: Any) -> str:
        ask: Callable[..., str] = super().propose_instruction_for_predictor
        late = [] if self._summary is None else [_LateSummary(self._summary)]
        with self._keep(self.rng.number), _patience(self._threads, *late):
            return ask(*args, **kwargs)


def _instruction(future: Future[str], failures: list[Exception]) -> str | None:
    """What a request gave; None where it gave none, which is added to ``failures``."""
    try:
        instruction = result_of(future)
        if not instruction.strip():
            raise EmptyInstructionError("The prompt model answered with an empty instruction.")
    except Exception as error:
        if classify(error) is Verdict.STOP:
            raise
        failures.append(error)
        return None
    return instruction


def _check_failures(failures: list[Exception], requests: int) -> None:
    """Raises an error where all requests have failed, or half of them for the infrastructure; else warns."""
    outages = [error for error in failures if classify(error) in INFRASTRUCTURE]
    if failures and (len(failures) == requests or 2 * len(outages) >= requests):
        raise (outages or failures)[0]
    if failures:
        logger.warning(
            "%d of %d requests for an instruction gave none (%s: %s); the student's own instruction takes "
            "their place.",
            len(failures),
            requests,
            type(failures[0]).__name__,
            failures[0],
        )


class _LateSummary(BaseCallback):
    """Has a proposal wait for the dataset summary at its last call, the only one that mentions it."""

    def __init__(self, summary: Future[GroundedProposer]) -> None:
        self._summary = summary

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Replaces the last step of DSPy's module, which was made without knowing of a summary."""
        if isinstance(instance, GenerateModuleInstruction):
            # Read now: a failure to describe the program changes the module, but not its last request.
            fields = {name: getattr(instance, name) for name in _FIELDS}
            instance.generate_module_instruction = partial(self._generate, fields)

    def _generate(self, fields: Mapping[str, Any], **inputs: Any) -> Any:
        has_summary, text = self._summarised()
        return generate_instruction_class(has_summary, **fields)(**{**inputs, "dataset_description": text})

    def _summarised(self) -> tuple[bool, str | None]:
        """Whether there is a summary, and what it says; an outage shows in the proposals themselves."""
        try:
            proposer = self._summary.result()
        except Exception as error:
            if classify(error) is Verdict.STOP:
                raise
            return False, None
        return proposer.use_dataset_summary and bool(proposer.data_summary), proposer.data_summary


class _Hopeless(BaseException):
    """An error that ends a chain of requests; DSPy would ask for the next thing."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _patience(
    threads: Threads, *callbacks: BaseCallback, before_second: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """With these callbacks, has requests made again; raises what ends them for good."""
    try:
        with dspy.context(callbacks=[*dspy.settings.callbacks, *callbacks, _Patient(threads, before_second)]):
            yield
    except _Hopeless as hopeless:
        raise hopeless.error from None


class _Patient(BaseCallback):
    """Has the requests of DSPy's proposer made again where another attempt may succeed.

    DSPy makes an object for each of them, and goes on without the answer, or not at all, when it fails.
    That is left to it unless no LM can be asked: after an error that stops everything, or when two
    requests of one chain in a row have failed for the infrastructure in all of their attempts.
    """

    def __init__(self, threads: Threads, before_second: Callable[[], None]) -> None:
        self._attempts = threads.attempts
        self._before_second = before_second
        self._has_asked = self._was_given_up = False

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Replaces what the object is about to do."""
        if isinstance(instance, dspy.Predict) and "forward" not in vars(instance):
            instance.forward = partial(self._forward, partial(type(instance).forward, instance))

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._has_asked:
            self._before_second()
        self._has_asked = True
        inputs = {name: encodable(value) for name, value in kwargs.items()}
        try:
            answer = self._attempts(partial(contained, forward, *args, **inputs))
        except Exception as error:
            verdict, again = classify(error), self._was_given_up
            if verdict is Verdict.STOP or (again and verdict in INFRASTRUCTURE):
                raise _Hopeless(error) from error
            self._was_given_up = verdict in INFRASTRUCTURE
            if self._attempts.down is error:
                self._attempts.down = None  # no outage, as far as one request can tell
            raise
        self._was_given_up = False
        return answer


class _Drawn:
    """A generator whose only number is known."""

    def __init__(self, number: int) -> None:
        self.number = number

    def randint(self, low: int, high: int) -> int:
        return self.number


class _Watched(list[Any]):
    """The trainset; reading a slice of it, as every call for the dataset summary does, may end the chain."""

    def __init__(self, items: list[Any], threads: Threads) -> None:
        super().__init__(items)
        self._threads = threads

    def __getitem__(self, key: Any) -> Any:
        self._threads.check()
        return super().__getitem__(key)


class Proposals:
    """The proposals of one run, whose dataset summary is written while the demo sets are bootstrapped.

    Args:
        optimizer: The ``dspy.MIPROv2`` that they are made for.
        threads: Run the LM calls.
        keep: As in `ConcurrentProposer`.
        before_second: Called before every request for the summary but the first; may wait, or end them.
    """

    def __init__(
        self, optimizer: Any, threads: Threads, keep: Keeping, before_second: Callable[[], None]
    ) -> None:
        self._optimizer = optimizer
        self._threads = threads
        self._keep = keep
        self._before_second = before_second
        self._early: tuple[dict[str, Any], Future[GroundedProposer]] | None = None

    def start(self, program: Any, trainset: list[Any], flags: Mapping[str, Any]) -> None:
        """Begins with what needs no demos.

        Args:
            program: The student.
            trainset: Summarised for the proposer.
            flags: ``view_data_batch_size``, ``program_aware_proposer``, ``data_aware_proposer``, ...
                of ``dspy.MIPROv2.compile``.
        """
        arguments = _arguments_of(program, trainset, flags)
        self._early = arguments, self._threads.submit(self._summarised, arguments)

    def instructions(
        self,
        program: Any,
        trainset: list[Any],
        demo_candidates: Any,
        number: int,
        flags: Mapping[str, Any],
        on_instruction: Callable[[], None],
    ) -> dict[int, list[str]]:
        """Per predictor, ``number`` instructions (or as many as it has demo sets, if fewer)."""
        arguments = _arguments_of(program, trainset, flags)
        if self._early is None or self._early[0] != arguments:
            self.start(program, trainset, flags)
        assert self._early is not None
        proposer = ConcurrentProposer(self._threads, self._early[1], self._keep, **arguments, **self._own())
        return proposer.propose_instructions_for_program(
            trainset=trainset,
            program=program,
            demo_candidates=demo_candidates,
            N=number,
            trial_logs={},
            on_instruction=on_instruction,
        )

    def _summarised(self, arguments: Mapping[str, Any]) -> GroundedProposer:
        """DSPy's proposer, which writes the summary as it is made, and is asked for nothing else."""
        trainset = arguments["trainset"]
        if type(trainset) is list:  # anything else would read differently as a list
            trainset = _Watched(trainset, self._threads)
        with self._keep("summary"), _patience(self._threads, before_second=self._before_second):
            return GroundedProposer(
                **{**arguments, **self._own(), "program_aware": False, "trainset": trainset}
            )

    def _own(self) -> dict[str, Any]:
        """What MIPROv2 passes to ``GroundedProposer`` from itself."""
        names = ("prompt_model", "verbose", "rng", "init_temperature")
        return {name: getattr(self._optimizer, name) for name in names}


def _arguments_of(program: Any, trainset: Any, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What MIPROv2 passes to ``GroundedProposer``, but for what it takes from itself."""
    tips = flags.get("tip_aware_proposer")
    return {
        "program": program,
        "trainset": trainset,
        "view_data_batch_size": flags.get("view_data_batch_size"),
        "program_aware": flags.get("program_aware_proposer"),
        "use_dataset_summary": flags.get("data_aware_proposer"),
        "use_task_demos": flags.get("fewshot_aware_proposer"),
        "num_demos_in_context": BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
        "use_tip": tips,
        "set_tip_randomly": tips,
        "use_instruct_history": False,
        "set_history_randomly": False,
    }
