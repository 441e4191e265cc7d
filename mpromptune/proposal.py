"""Instruction proposals: DSPy's proposer with its LM calls at the same time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from dspy.propose import GroundedProposer
from dspy.teleprompt.mipro_optimizer_v2 import BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT

from mpromptune.threads import Threads

# Everything that one proposal draws, in all versions of DSPy so far.
_DRAW = "self.rng.randint(0, 10**9)"


def is_supported() -> bool:
    """Whether this DSPy draws for one proposal exactly what `ConcurrentProposer` draws beforehand."""
    try:
        source = inspect.getsource(GroundedProposer.propose_instruction_for_predictor)
        own = dict.fromkeys(("prompt_model", "verbose", "rng", "init_temperature"))
        inspect.signature(GroundedProposer).bind(**_arguments_of(None, None, {}), **own)
    except (AttributeError, OSError, TypeError):
        return False
    return source.count("rng") == source.count(_DRAW) == 1


class ConcurrentProposer(GroundedProposer):
    """Draws all that is random first, in DSPy's order, and then asks for all instructions at once.

    Args:
        threads: Run the proposals.
        **arguments: As ``GroundedProposer``.
    """

    def __init__(self, threads: Threads, **arguments: Any) -> None:
        self._threads = threads
        super().__init__(**arguments)

    def propose_instructions_for_program(
        self, *args: Any, on_instruction: Callable[[], None] = lambda: None, **kwargs: Any
    ) -> dict[int, list[str]]:
        """As ``GroundedProposer``; ``on_instruction`` is called after every instruction, in order."""

        def result(future: Future[str]) -> str:
            instruction = future.result()
            on_instruction()
            return instruction

        started: dict[int, list[Future[str]]] = super().propose_instructions_for_program(*args, **kwargs)
        return {i: [result(future) for future in futures] for i, futures in started.items()}

    def propose_instruction_for_predictor(self, *args: Any, **kwargs: Any) -> Future[str]:
        """Starts a proposal, with the tip that has just been drawn and a rollout that is drawn here."""
        drawn = copy.copy(self)
        drawn.rng = _Drawn(self.rng.randint(0, 10**9))
        ask = super(ConcurrentProposer, drawn).propose_instruction_for_predictor
        return self._threads.submit(ask, *args, **kwargs)


class _Drawn:
    """A generator whose only number is known."""

    def __init__(self, number: int) -> None:
        self._number = number

    def randint(self, low: int, high: int) -> int:
        return self._number


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
    """

    def __init__(self, optimizer: Any, threads: Threads) -> None:
        self._optimizer = optimizer
        self._threads = threads
        self._early: tuple[dict[str, Any], Future[ConcurrentProposer]] | None = None

    def start(self, program: Any, trainset: list[Any], flags: Mapping[str, Any]) -> None:
        """Begins with what needs no demos.

        Args:
            program: The student.
            trainset: Summarised for the proposer.
            flags: ``view_data_batch_size``, ``program_aware_proposer``, ``data_aware_proposer``, ...
                of ``dspy.MIPROv2.compile``.
        """
        arguments = _arguments_of(program, trainset, flags)
        self._early = arguments, self._threads.submit(self._proposer, arguments)

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
        return (
            self._early[1]
            .result()
            .propose_instructions_for_program(
                trainset=trainset,
                program=program,
                demo_candidates=demo_candidates,
                N=number,
                trial_logs={},
                on_instruction=on_instruction,
            )
        )

    def _proposer(self, arguments: Mapping[str, Any]) -> ConcurrentProposer:
        trainset = arguments["trainset"]
        if type(trainset) is list:  # anything else would read differently as a list
            trainset = _Watched(trainset, self._threads)
        own = {
            "prompt_model": self._optimizer.prompt_model,
            "verbose": self._optimizer.verbose,
            "rng": self._optimizer.rng,
            "init_temperature": self._optimizer.init_temperature,
        }
        return ConcurrentProposer(self._threads, **{**arguments, **own, "trainset": trainset})


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
