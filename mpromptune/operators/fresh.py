"""The operator *fresh*: one more instruction of DSPy's grounded proposer, whatever the search has found."""

from __future__ import annotations

import logging
import random
from typing import Any

import dspy
from dspy.propose.dataset_summary_generator import create_dataset_summary
from dspy.propose.grounded_proposer import TIPS, GenerateModuleInstruction
from dspy.propose.utils import get_dspy_source_code, strip_prefix
from dspy.teleprompt.mipro_optimizer_v2 import BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT

from mpromptune.engine.proposers import Brief
from mpromptune.operators.base import InstructionOperator, Setting, asking, demos_of, predictor_of

logger = logging.getLogger(__name__)


class Fresh(InstructionOperator):
    """A proposal as before the search, with another tip, other demos, and a summary of other examples.

    Requests are those of DSPy: two for a summary of one batch of training examples, two that describe the
    program, and the last.
    """

    name = "fresh"
    keeps_parent = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._code = _source_code(setting.program) if setting.program_aware_proposer else None
        self._summary = setting.data_aware_proposer and bool(setting.trainset)
        self.calls = 1 + 2 * (self._code is not None) + 2 * self._summary

    @property
    def lm(self) -> Any:
        """The language model that writes new instructions."""
        return self.setting.prompt_model or dspy.settings.lm

    def propose(self, brief: Brief) -> str:
        """See `mpromptune.engine.proposers.Proposer`."""
        setting, rng = self.setting, random.Random(int(brief.rng.integers(2**32)))
        tip = rng.choice([*TIPS.values()]) if setting.tip_aware_proposer else ""
        predictor = predictor_of(brief.component)
        sets = [demos for demos in setting.known(brief, demos_of(predictor)).values() if demos]
        rng.shuffle(sets)
        batch = rng.sample(list(setting.trainset), min(setting.view_data_batch_size, len(setting.trainset)))
        with asking(self.lm, setting.temperature, brief) as lm:
            summary = create_dataset_summary(batch, len(batch), lm) if self._summary else None
            generate = GenerateModuleInstruction(
                program_code_string=self._code,
                use_dataset_summary=bool(summary),
                program_aware=self._code is not None,
                use_task_demos=setting.fewshot_aware_proposer and bool(sets),
                use_instruct_history=False,
                use_tip=bool(tip),
            )
            made = generate(
                demo_candidates={predictor: [[], *sets]},
                pred_i=predictor,
                demo_set_i=1,  # with 0, DSPy shows no demos
                program=setting.program,
                previous_instructions="",
                data_summary=summary,
                num_demos_in_context=BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
                tip=tip,
            )
        return str(strip_prefix(made.proposed_instruction))


def _source_code(program: Any) -> str | None:
    """The program's code as DSPy shows it; None if it cannot be read, as in DSPy."""
    try:
        return str(get_dspy_source_code(program))
    except Exception as error:  # noqa: BLE001 - reading code may raise any error
        logger.warning("New proposals are made without the program's code: %s", error)
        return None
