"""Demo sets of labelled examples only, which DSPy cannot build."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from dspy.teleprompt import LabeledFewShot

from mpromptune.mipro.demos import DemoSets


def is_labelled_only(given: Mapping[str, Any]) -> bool:
    """Demo sets without a bootstrap, and so without a call of the metric."""
    return given.get("max_bootstrapped_demos") == 0 and given.get("max_labeled_demos", 0) > 0


def labelled_demo_sets(
    program: Any, trainset: list[Any], num_sets: int, k: int, rng: random.Random
) -> DemoSets:
    """Demo sets of labelled examples only, where DSPy draws from an empty range and crashes.

    Args:
        program: The student.
        trainset: Where demos are drawn from.
        num_sets: Sets wanted; the first is empty (zero-shot), as in DSPy.
        k: Demos per set.
        rng: Shuffles the trainset for every further set.

    Returns:
        Per predictor, ``num_sets`` demo sets.
    """
    versions = [program.reset_copy()]
    for _ in range(num_sets - 1):
        shuffled = list(trainset)
        rng.shuffle(shuffled)
        versions.append(LabeledFewShot(k=k).compile(program, trainset=shuffled))
    predictors = [version.predictors() for version in versions]
    return {i: [list(p[i].demos) for p in predictors] for i in range(len(predictors[0]))}
