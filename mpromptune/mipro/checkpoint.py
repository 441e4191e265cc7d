"""What a compile keeps in its study besides the search: who it is, and what its first steps ended with."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mpromptune.errors import StorageError, StudyMismatchError
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.pool import as_score
from mpromptune.execution.usage import Usage
from mpromptune.lms.errors import classify
from mpromptune.lms.kept import Answer
from mpromptune.mipro.demos import DemoSets, from_json, require_same_prompts, to_json
from mpromptune.mipro.fingerprint import Part, differences
from mpromptune.storage.attributes import ANSWERS, DEMOS, EXAMPLES, INSTRUCTIONS, RUN, SCORES, STUDENT, USED
from mpromptune.storage.damage import CRASHES, list_from, named, readable, usage_from
from mpromptune.storage.lease import Lease
from mpromptune.storage.storage import reported

logger = logging.getLogger(__name__)

Instructions = dict[int, list[str]]
T = TypeVar("T")

# NOTE: characters of one attribute: MySQL takes 65,535 bytes, and a character may take twelve of them.
_PIECE = 5000


class Checkpoint:
    """The steps of one compile before its search, in the attributes of its study.

    A step is there as a whole or not at all: its parts are written first, and what they are last.

    Args:
        lease: Of its study; once that is lost, nothing is written any more.
        run: What identifies the run (see `fingerprint`).

    Attributes:
        study: The study.

    Raises:
        StorageError: The storage cannot be read and written.
        StudyMismatchError: The study belongs to another run.
    """

    def __init__(self, lease: Lease, run: Mapping[str, Part]) -> None:
        self.study = lease.study
        self._lease = lease
        with reported():
            self._kept: dict[str, Any] = self.study.user_attrs
        self._require_same(run)
        self._earlier = {key.split(":")[-2]: answer for key, answer in self._answers().items()}
        if self._kept.get(RUN) != run:
            self._set(RUN, dict(run))

    def demo_sets(self, rng: random.Random) -> DemoSets | None:
        """Those of the bootstrap, if it has ended; ``rng`` is then left as it was at that time."""

        def read(head: dict[str, Any], parts: dict[str, Any]) -> DemoSets:
            version, state, gauss = head["rng"]
            numbers = enumerate(head["numbers"])
            demos = {i: [from_json(parts[f"{i}:{j}"]) for j in range(number)] for i, number in numbers}
            rng.setstate((version, tuple(state), gauss))
            return demos

        return self._read(DEMOS, "The demo sets", read)

    def keep_demo_sets(self, program: Any, demos: DemoSets, rng: random.Random) -> DemoSets:
        """Keeps what the bootstrap ended with; returns it as it will be loaded.

        Should that give other prompts, a warning says that nothing was kept.
        """
        try:
            plain = {f"{i}:{j}": to_json(one) for i, sets in demos.items() for j, one in enumerate(sets)}
            loaded = {
                i: [from_json(plain[f"{i}:{j}"]) for j, _ in enumerate(sets)] for i, sets in demos.items()
            }
            require_same_prompts(program, demos, loaded)
        except Exception as error:  # noqa: BLE001 - of adapters, of types of fields: the demos are paid for
            logger.warning(
                "The demo sets cannot be kept in the study (%s: %s): a run that goes on after an "
                "interruption bootstraps them again.",
                type(error).__name__,
                error,
            )
            return demos
        version, state, gauss = rng.getstate()
        numbers = [len(demos[i]) for i in range(len(demos))]
        self._keep(DEMOS, {"numbers": numbers, "rng": [version, list(state), gauss]}, plain)
        return loaded

    @property
    def has_instructions(self) -> bool:
        """Whether the proposal has ended."""
        return self._load(INSTRUCTIONS) is not None

    def instructions(self) -> Instructions | None:
        """Those of the proposal, if it has ended."""

        def read(head: dict[str, Any], parts: dict[str, Any]) -> Instructions:
            return {int(i): [str(text) for text in list_from(i, texts)] for i, texts in parts.items()}

        return self._read(INSTRUCTIONS, "The instructions", read)

    def keep_instructions(self, instructions: Instructions) -> None:
        """Keeps what the proposal ended with."""
        texts = {str(i): [str(text) for text in texts] for i, texts in instructions.items()}
        self._keep(INSTRUCTIONS, {}, texts)

    def answer(self, scope: str, digest: str, number: int, cached: bool) -> Answer | None:
        """As `mpromptune.lms.kept.Answers`."""
        own = self._answer(f"{ANSWERS}:{scope}:{digest}:{number}")
        # An equal request of another scope, which found the answer in the cache of a process that is gone.
        return own or (self._earlier.get(digest) if cached else None)

    def keep_answer(self, scope: str, digest: str, number: int, answer: Answer) -> None:
        """As `mpromptune.lms.kept.Answers`; what is no JSON is not kept."""
        parts = {"usage": answer.usage.as_dict(), "total": answer.total.as_dict()}
        try:
            text = json.dumps({"outputs": answer.outputs, **parts}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            return
        key = f"{ANSWERS}:{scope}:{digest}:{number}"
        first, *more = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        try:
            for i, piece in enumerate(more):
                self._set(f"{key}/{i}", piece)
            self._set(key, {"text": first, "more": len(more)})
        except StorageError as error:  # which the search cannot do without, and will report
            logger.warning("An answer of a language model could not be kept: %s", error)

    def _answer(self, key: str) -> Answer | None:
        kept: Any = self._kept.get(key)
        try:
            more = [self._kept[f"{key}/{i}"] for i in range(kept["more"])]
            answer = json.loads("".join([kept["text"], *more]))
            outputs = list_from("an answer", answer["outputs"])
            return Answer(outputs, *(usage_from(answer[name]) for name in ("usage", "total")))
        except CRASHES:  # there is none, or it is damaged
            return None

    def _answers(self) -> dict[str, Answer]:
        """What is kept now, by key."""
        keys = [key for key in self._kept if key.startswith(f"{ANSWERS}:") and "/" not in key]
        return {key: answer for key in keys if (answer := self._answer(key)) is not None}

    def usage(self) -> dict[str, Usage]:
        """What the steps before the search have used so far, in interrupted runs too."""
        if not self._has_steps():  # nothing that another run could go on with, so this may be another
            return {}
        kept = {key: value for key, value in self._kept.items() if key.startswith(f"{USED}:")}
        used = {key.removeprefix(f"{USED}:"): usage_from(value) for key, value in kept.items()}
        for key, answer in self._answers().items():  # of a run that was killed, which has kept nothing else
            step = key.removeprefix(f"{ANSWERS}:").partition(":")[0]
            if answer.total != Usage():
                used[step] = used.get(step, Usage()).at_least(answer.total)
        return used

    def keep_usage(self, step: str, usage: Usage) -> None:
        """Keeps what a step has used."""
        self._set(f"{USED}:{step}", usage.as_dict())

    def student_outcomes(self) -> dict[int, tuple[float | Exception, Usage]]:
        """Per validation example, the student's score or what it failed with, and what it used."""
        outcomes = {}
        for key, value in self._kept.items():
            if key.startswith(f"{STUDENT}:"):
                try:
                    outcomes[int(key.removeprefix(f"{STUDENT}:"))] = _outcome(value)
                except CRASHES as error:
                    _warn_of_damage(f"A score of the student ({key})", error)
        return outcomes

    def keep_student_outcome(self, example: int, outcome: float | Exception, usage: Usage) -> None:
        """Keeps it, unless it says nothing about the student; may be called by any thread."""
        kept: dict[str, Any] = {"usage": usage.as_dict()}
        if not isinstance(outcome, Exception):
            kept["score"] = outcome
        elif classify(outcome) is Verdict.CANDIDATE:
            kept["error"] = type(outcome).__name__  # not its message: nobody knows what is in it
        else:
            return
        try:
            self._set(f"{STUDENT}:{example}", kept)
        except StorageError as error:  # which the search cannot do without, and will report
            logger.warning("The student's score on example %d could not be kept: %s", example, error)

    def measured(self, params: Mapping[str, int]) -> set[int]:
        """Validation examples of which the search has a score for a configuration."""
        with reported(), readable(f"A trial of {named(self.study)}"):
            trials = [t for t in self.study.get_trials(deepcopy=False) if t.params == params]
        told = (t.user_attrs.get(EXAMPLES, ()) for t in trials if SCORES in t.user_attrs)
        return {example for some in (*told, *(t.intermediate_values for t in trials)) for example in some}

    def _require_same(self, run: Mapping[str, Part]) -> None:
        then = self._kept.get(RUN)
        if then is not None and not isinstance(then, dict):
            raise StorageError(f"What {named(self.study)} says of its run is damaged: {then!r}.")
        name = f"The study {self.study.study_name!r}"
        advice = "Give a new run another study_name or storage"
        if then is None and self._has_trials() and not self._has_steps():
            raise StudyMismatchError(f"{name} was made by search(), not by MIPROv2.compile. {advice}.")
        changed = differences(then, run) if then is not None else []
        if changed and (self._has_trials() or self._has_steps()):
            raise StudyMismatchError(
                f"{name} belongs to another run, which differs in: {', '.join(changed)}. {advice}, or go "
                "on with what that one was given."
            )

    def _has_trials(self) -> bool:
        with reported():
            return bool(self.study.get_trials(deepcopy=False))

    def _has_steps(self) -> bool:
        """Whether anything has been paid for before a search."""
        return any(key.startswith((DEMOS, INSTRUCTIONS, STUDENT, ANSWERS)) for key in self._kept)

    def _read(self, step: str, what: str, read: Callable[[dict[str, Any], dict[str, Any]], T]) -> T | None:
        """What a step ended with; None, after a warning, where it is damaged."""
        kept = self._load(step)
        try:
            return None if kept is None else read(*kept)
        except CRASHES as error:
            _warn_of_damage(what, error)
            return None

    def _load(self, step: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        head = self._kept.get(step)
        try:
            return None if head is None else (head, {p: self._kept[f"{step}:{p}"] for p in head["parts"]})
        except CRASHES:  # a part that was lost
            return None

    def _keep(self, step: str, head: Mapping[str, Any], parts: Mapping[str, Sequence[Any]]) -> None:
        for part, value in parts.items():
            self._set(f"{step}:{part}", value)
        self._set(step, {**head, "parts": list(parts)})

    def _set(self, key: str, value: Any) -> None:
        if self._lease.lost is None:
            with reported():
                self.study.set_user_attr(key, value)
        self._kept[key] = value


def _warn_of_damage(what: str, error: Exception) -> None:
    logger.warning("%s cannot be read in the study (%s: %s): made again.", what, type(error).__name__, error)


def _outcome(kept: Mapping[str, Any]) -> tuple[float | Exception, Usage]:
    usage = usage_from(kept["usage"])
    if "score" in kept:
        return as_score(kept["score"]), usage
    return RuntimeError(f"the student failed with {kept['error']} before the run was interrupted"), usage
