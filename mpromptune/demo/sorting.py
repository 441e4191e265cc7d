"""The demo's tasks for a real small language model: sort words, questions and reviews."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from importlib import resources
from typing import Any

import dspy

from mpromptune.demo.run import Task
from mpromptune.local.adapter import CompletionAdapter
from mpromptune.local.lm import LocalLM

_TRAIN, _VALIDATION, _TEST = 50, 100, 200
# NOTE: fixed, so that every run has the same examples; --seed is for the compile.
_SEED = 21
# NOTE: with these, DSPy's own search makes 900 program calls: about a minute on two cores.
_SIZES = {"num_trials": 15, "minibatch_size": 25, "minibatch_full_eval_steps": 5}
_MAX_TOKENS = 8


@dataclass(frozen=True)
class Sorting:
    """A task with one short text as input and one of a few words as the answer.

    Attributes:
        given: Name of the input field.
        answer: Name of the output field.
        instructions: Written by hand; the first is the student's own.
    """

    given: str
    answer: str
    instructions: tuple[str, ...]


SORTINGS = {
    "words": Sorting(
        "word",
        "category",
        (
            "Name the category of the word.",
            "Is the word an animal, food, clothing, vehicle or tool? Answer with one word.",
            "Say what kind of thing the word names: animal, food, clothing, vehicle, tool.",
            "Choose from: animal, food, clothing, vehicle, tool.",
            "You are a librarian. Put each word on the right shelf.",
            "Animals are alive. Food is eaten. Clothing is worn. Vehicles carry us. We do work with tools.",
            "Decide whether you can eat it, wear it, ride it, work with it, or whether it is alive.",
            "Reply with a single lowercase word.",
            "You will be paid 100 dollars for each correct answer.",
            "This is a vocabulary test for children.",
            "A dictionary with pictures has five chapters: animal, food, clothing, vehicle, tool.",
            "Think about where you would find the thing, then name its category.",
        ),
    ),
    "questions": Sorting(
        "question",
        "type",
        (
            "Name the type of the question.",
            "Does the question ask for a person, place, time or number? Answer with one word.",
            "Say what kind of answer is wanted: person, place, time or number.",
            "Who means person, where means place, when means time, how many means number.",
            "You are a quiz master. Sort the questions.",
            "Choose from: person, place, time, number.",
            "Do not answer the question. Write only its type: person, place, time or number.",
            "Somebody is a person. A city or a river is a place. A date is a time. An amount is a number.",
            "Send each question to the right expert. Experts: person, place, time, number.",
            "Reply with a single lowercase word.",
            "Answer the question.",
            "Look at the first words of the question and decide what it wants to know.",
        ),
    ),
    "reviews": Sorting(
        "review",
        "sentiment",
        (
            "Name the sentiment of the review.",
            "Is the review positive or negative? Answer with one word.",
            "Say positive if the reviewer is happy and negative if the reviewer is unhappy.",
            "You are a critic. Decide whether the opinion is good or bad.",
            "Think carefully about negation. Then write positive or negative.",
            "Choose from: positive, negative.",
            "Reply with a single lowercase word.",
            "Would the reviewer come back? If so, write positive, otherwise negative.",
            "Send happy customers to positive and angry customers to negative.",
            "What is it about?",
            "Read the review twice, then label it.",
            "Praise is positive. A complaint is negative. No complaint is positive.",
        ),
    ),
}


def sorting_task(name: str, model: str, prompt_model: str | None = None) -> Task:
    """A task for a model that runs in this process.

    Args:
        name: A key of `SORTINGS`.
        model: The model, as in `LocalLM`.
        prompt_model: LiteLLM's name of a model that proposes instructions; None takes those written by hand.
    """
    sorting, lm = SORTINGS[name], LocalLM(model, max_tokens=_MAX_TOKENS)
    trainset, valset, testset = splits(name)
    labels = sorted({str(example[sorting.answer]) for example in trainset})
    n = len(sorting.instructions)
    proposer = (
        f"proposed by {prompt_model}" if prompt_model else f"{n}, written by hand: no model proposes them"
    )
    sizes = f"{len(trainset)} for training, {len(valset)} for validation, {len(testset)} for the test"
    return Task(
        title=f"m-promptune demo: {name}",
        notes=[
            ("Task", f"{sorting.given} -> {sorting.answer}: {', '.join(labels)}; examples: {sizes}"),
            ("Model", f"{lm.model}, in this process; it continues a text, and its answers are real"),
            ("Instructions", proposer),
            ("Demos", "drawn by DSPy's bootstrap"),
        ],
        program=dspy.Predict(dspy.Signature(f"{sorting.given} -> {sorting.answer}", sorting.instructions[0])),
        trainset=trainset,
        valset=valset,
        testset=testset,
        metric=_Same(sorting.answer),
        lm=lm,
        prompt_model=dspy.LM(prompt_model) if prompt_model else None,
        adapter=CompletionAdapter(),
        instructions=() if prompt_model else sorting.instructions[1:],
        proposers=None if prompt_model else ("demos",),
        arguments={
            "auto": None,
            "num_candidates": n,
            "max_bootstrapped_demos": 2,
            "max_labeled_demos": 8,
        },
        compile_arguments=_SIZES,
    )


@dataclass(frozen=True)
class _Same:
    """Metric: whether the answer is the expected word, whatever its case."""

    field: str

    def __call__(self, example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        answer, expected = str(prediction[self.field]), str(example[self.field])
        return answer.strip(" .").lower() == expected


def splits(name: str) -> tuple[list[dspy.Example], list[dspy.Example], list[dspy.Example]]:
    """The training, validation and test examples of a task."""
    with (resources.files("mpromptune.demo") / "data" / f"{name}.json").open(encoding="utf-8") as file:
        data = json.load(file)
    pairs = _filled(**data) if "templates" in data else _words(data)
    random.Random(_SEED).shuffle(pairs)
    given, answer = SORTINGS[name].given, SORTINGS[name].answer
    made = [dspy.Example({given: text, answer: label}).with_inputs(given) for text, label in pairs]
    first, second = _TRAIN, _TRAIN + _VALIDATION
    return made[:first], made[first:second], made[second : second + _TEST]


def _words(data: dict[str, str]) -> list[tuple[str, str]]:
    return [(word, label) for label, words in data.items() for word in words.split()]


def _filled(templates: dict[str, list[str]], fillers: dict[str, str]) -> list[tuple[str, str]]:
    """Each template with each of the words that it has room for."""
    pairs = []
    for label, texts in templates.items():
        for text, (kind, words) in itertools.product(texts, fillers.items()):
            if f"{{{kind}}}" in text:
                pairs += [(text.format(**{kind: word}), label) for word in words.split()]
    return pairs
