"""A small finished search, written by hand: four examples, three configurations, four trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from mpromptune import PromptSpace, SearchResult
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.storage.attributes import EXAMPLES, PLANNED, SCORES, SETTINGS
from mpromptune.storage.findings import Measured

INSTRUCTION, DEMOS = "0_predictor_instruction", "0_predictor_demos"
SPACE = PromptSpace(
    {
        INSTRUCTION: ["Answer <b>briefly</b>.", "Answer <b>slowly</b>."],
        DEMOS: [[], ["</pre><script>alert(1)</script>"]],
    }
)
# Every configuration fails on example 1.
BASELINE = Measured({INSTRUCTION: 0, DEMOS: 0}, {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}, 0.3, 0.03, True)
WINNER = Measured({INSTRUCTION: 1, DEMOS: 0}, {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}, 0.7, 0.03, True)
OTHER = Measured({INSTRUCTION: 0, DEMOS: 1}, {0: 1.0, 1: 0.0}, 0.5, 0.1, False)


def study_of(
    trials: Sequence[tuple[Measured, Mapping[int, float]]], lost: Sequence[int] = ()
) -> optuna.Study:
    """A study of trials with these scores; with ``lost`` examples the last one has failed."""
    study = optuna.create_study(direction="maximize")
    arguments = {"baseline": BASELINE.params, "block_size": 2, "seed": 8}
    study.set_user_attr(SETTINGS, {"arguments": arguments})
    for number, (measured, scores) in enumerate(trials):
        failed = bool(lost) and number == len(trials) - 1
        attributes: dict[str, Any] = {EXAMPLES: list(scores), SCORES: list(scores.values())}
        if failed:
            attributes[PLANNED] = [*scores, *lost]
        trial = create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            value=None if failed else sum(scores.values()) / len(scores),
            params=measured.params,
            distributions={name: CategoricalDistribution(range(2)) for name in measured.params},
            user_attrs=attributes,
        )
        study.add_trial(trial)
    return study


TRIALS = (
    (BASELINE, {0: 0.0, 1: 0.0}),
    (OTHER, {0: 1.0, 1: 0.0}),
    (WINNER, WINNER.scores),
    (BASELINE, {2: 1.0, 3: 0.0}),
)


def findings(**changes: Any) -> SearchResult:
    """The result of that search, or one that differs in some attributes."""
    result = SearchResult(
        best_params=WINNER.params,
        best_score=0.75,
        baseline_score=0.25,
        calls=10,
        n_examples=4,
        configurations=(WINNER, OTHER, BASELINE),
        study=study_of(TRIALS),
        usage=StepUsage(search=Usage(program_calls=10, cost=1.5), bootstrap=Usage(lm_calls=7)),
        space=SPACE,
        distances={INSTRUCTION: np.array([[0.0, 4.0], [4.0, 0.0]]), DEMOS: 1.0 - np.eye(2)},
    )
    return replace(result, **changes)
