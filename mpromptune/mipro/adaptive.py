"""Candidates that are written while the search of a compile runs: the proposers, and what they know."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mpromptune.engine.proposers import Brief, Proposer, ProposerWrapper, visible_examples
from mpromptune.errors import InvalidArgumentError
from mpromptune.execution.limits import SEARCH
from mpromptune.execution.usage import current_meter
from mpromptune.lms.metering import measured
from mpromptune.mipro.configurations import ProgramSpace
from mpromptune.mipro.run import Run
from mpromptune.model.lineage import for_another_search
from mpromptune.model.space import Gain
from mpromptune.operators.base import Setting
from mpromptune.operators.registry import OPERATORS, made
from mpromptune.storage.gains import read_gains, write_gains

logger = logging.getLogger(__name__)

# Arguments of a compile that proposers need too.
_ARGUMENTS = (
    "program_aware_proposer",
    "data_aware_proposer",
    "tip_aware_proposer",
    "fewshot_aware_proposer",
    "view_data_batch_size",
)


def proposers_of(run: Run, programs: ProgramSpace, valset: Sequence[Any]) -> list[Proposer]:
    """The proposers of a compile; none if all candidates are written before the search.

    Args:
        run: The compile.
        programs: The candidates, which grow as the proposers write.
        valset: The validation examples.

    Raises:
        InvalidArgumentError: A name is unknown, or an object is no proposer.
    """
    if not run.options.is_adaptive:
        return []
    given = list(OPERATORS) if run.options.proposers is None else run.options.proposers
    proposers = made(given, _setting(run, programs, valset))
    path = run.options.gains_file
    known = {} if path is None else read_gains(path)
    return [_Counted(proposer, run, known.get(proposer.name)) for proposer in proposers]


def keep_gains(run: Run, gains: Mapping[str, Gain]) -> None:
    """Update the file with what is known of proposers, if one was given; an error is logged."""
    if (path := run.options.gains_file) is None:
        return
    ours = {name: for_another_search(gain) for name, gain in gains.items()}
    try:
        write_gains(path, {**read_gains(path), **ours})
    except (InvalidArgumentError, OSError) as error:  # the program, which is paid for, must not be lost
        logger.warning("What was learned about proposers was not saved (%s): %s", error, ours)


def _setting(run: Run, programs: ProgramSpace, valset: Sequence[Any]) -> Setting:
    optimizer, arguments = run.optimizer, run.arguments
    return Setting(
        program=programs.program,
        candidates=programs.candidates,
        trainset=run.trainset,
        valset=valset,
        visible=visible_examples(len(valset), run.seed),
        metric=optimizer.metric,
        prompt_model=optimizer.prompt_model,
        reflection_lm=run.options.reflection_lm,
        instruction_proposer=run.options.instruction_proposer,
        task_model=optimizer.task_model,
        temperature=optimizer.init_temperature,
        **run.demo_limits,
        **{name: arguments[name] for name in _ARGUMENTS},
    )


class _Counted(ProposerWrapper):
    """A proposer whose LM requests are counted for its proposal, and whose answers are saved."""

    def __init__(self, proposer: Proposer, run: Run, gain: Gain | None) -> None:
        super().__init__(proposer)
        self.gain = gain or self.gain
        self._run = run

    def propose(self, brief: Brief) -> Any:
        """See `mpromptune.engine.proposers.Proposer`."""
        # As in `ProgramRunner`: DSPy's settings have the meter of the whole compile.
        with measured(current_meter()), self._run.keeping(SEARCH, "proposal", brief.number):
            return super().propose(brief)
