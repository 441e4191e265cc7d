"""The checkpoint of a compile in its study: the identity of the run, and the results of the first steps.

Answers of LMs are saved as they come in (`lms.adapters`), so that an interrupted step is repeated from them.
Demo sets and instructions are saved too when they are complete, because the indices of the search refer to
exactly these, and because programs and metrics may also pay for other things than LMs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import dspy
from dspy.adapters.utils import serialize_for_json
from dspy.teleprompt.utils import get_signature

from mpromptune.errors import StorageError, StudyMismatchError
from mpromptune.execution.usage import Usage
from mpromptune.lms.adapters import Answer
from mpromptune.mipro.fingerprint import Part, differences
from mpromptune.storage.attributes import ANSWERS, DEMOS, INSTRUCTIONS, RUN, USED
from mpromptune.storage.damage import CRASHES, list_from, named, readable, reported, usage_from
from mpromptune.storage.lease import Lease
from mpromptune.storage.record import read_record

logger = logging.getLogger(__name__)

# The candidates of each predictor.
DemoSets = dict[int, list[list[Any]]]
Instructions = dict[int, list[str]]
T = TypeVar("T")

# NOTE: most characters of one attribute: MySQL allows 65,535 bytes, and a character may take twelve.
_PIECE = 5000


class Checkpoint:
    """The steps of a compile before its search, saved in the attributes of its ``study``.

    Args:
        lease: The lease of its study; when it is lost, nothing is written any more.
        run: The identity of the run (see `fingerprint`).

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
        self._saved = self._answers()  # by earlier runs
        self._earlier = {key.split(":")[-2]: answer for key, answer in self._saved.items()}
        if self._kept.get(RUN) != run:
            self._set(RUN, dict(run))

    # Candidates.

    def demo_sets(self) -> DemoSets | None:
        """The demo sets, if the bootstrap has ended."""
        return self._candidates(DEMOS, "The demo sets", demos_from_json)

    def keep_demo_sets(self, program: Any, demos: DemoSets) -> DemoSets:
        """Save the demo sets; return them as they will be loaded.

        If the loaded sets would give other prompts, nothing is saved and a warning is logged.
        """
        try:
            plain = {i: [*map(demos_to_json, sets)] for i, sets in demos.items()}
            loaded = {i: [*map(demos_from_json, sets)] for i, sets in plain.items()}
            require_same_prompts(program, demos, loaded)
        except Exception as error:  # noqa: BLE001 - adapters may raise any error; the demos are paid for
            logger.warning(
                "The demo sets cannot be kept in the study (%s: %s): after an interruption they are "
                "bootstrapped again.",
                type(error).__name__,
                error,
            )
            return demos
        self._keep_candidates(DEMOS, plain)
        return loaded

    def instructions(self) -> Instructions | None:
        """The instructions, if the proposal has ended."""
        return self._candidates(INSTRUCTIONS, "The instructions", _text)

    def keep_instructions(self, instructions: Instructions) -> None:
        """Save the instructions."""
        self._keep_candidates(INSTRUCTIONS, {i: [*map(str, texts)] for i, texts in instructions.items()})

    def _candidates(self, kind: str, what: str, read: Callable[[Any], T]) -> dict[int, list[T]] | None:
        if self._kept.get(kind) is None:
            return None
        try:
            return {i: [*map(read, some)] for i, some in read_candidates(self._kept, kind).items()}
        except CRASHES as error:
            _warn_of_damage(what, error)
            return None

    def _keep_candidates(self, kind: str, candidates: Mapping[int, Sequence[Any]]) -> None:
        """Save candidates; their numbers are written last, so that they are complete or missing."""
        for i, some in candidates.items():
            for j, candidate in enumerate(some):
                self._set(f"{kind}:{i}:{j}", candidate)
        self._set(kind, {"numbers": [len(candidates[i]) for i in range(len(candidates))]})

    # Answers of LMs, and what they took.

    def answer(self, scope: str, digest: str, number: int, cached: bool) -> Answer | None:
        """See `mpromptune.lms.adapters.Answers`."""
        own = self._answer(f"{ANSWERS}:{scope}:{digest}:{number}")
        # Otherwise an answer to an equal request of another scope, which an earlier process had in its cache.
        return own or (self._earlier.get(digest) if cached else None)

    def keep_answer(self, scope: str, digest: str, number: int, answer: Answer) -> None:
        """See `mpromptune.lms.adapters.Answers`; an answer that is not JSON is not saved."""
        parts = {"usage": answer.usage.as_dict(), "total": answer.total.as_dict()}
        try:
            text = json.dumps({"outputs": answer.outputs, **parts}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            return
        key = f"{ANSWERS}:{scope}:{digest}:{number}"
        first, *more = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        pieces = {
            **{f"{key}/{i}": piece for i, piece in enumerate(more)},
            key: {"text": first, "more": len(more)},
        }
        self._try_to_keep("An answer of a language model", pieces)

    def _answer(self, key: str) -> Answer | None:
        kept: Any = self._kept.get(key)
        try:
            more = [self._kept[f"{key}/{i}"] for i in range(kept["more"])]
            answer = json.loads("".join([kept["text"], *more]))
            outputs = list_from("an answer", answer["outputs"])
            return Answer(outputs, *(usage_from(answer[name]) for name in ("usage", "total")))
        except CRASHES:  # there is no answer, or it is damaged
            return None

    def _answers(self) -> dict[str, Answer]:
        """All saved answers, by key."""
        keys = [key for key in self._kept if key.startswith(f"{ANSWERS}:") and "/" not in key]
        return {key: answer for key in keys if (answer := self._answer(key)) is not None}

    def usage(self) -> dict[str, Usage]:
        """The usage of the steps before the search in earlier runs."""
        if not self._has_steps():  # an earlier run left nothing to continue, and may have been another one
            return {}
        used = kept_usage(self._kept)
        for key, answer in self._saved.items():  # a killed run has saved its usage only with answers
            step = key.removeprefix(f"{ANSWERS}:").partition(":")[0]
            if answer.total != Usage():
                used[step] = used.get(step, Usage()).at_least(answer.total)
        return used

    def keep_usage(self, step: str, usage: Usage) -> None:
        """Save the usage of a step."""
        self._set(f"{USED}:{step}", usage.as_dict())

    def n_scores(self) -> int:
        """Number of scores of the search."""
        with reported(), readable(f"A trial of {named(self.study)}"):
            return sum(len(recorded.scores) for recorded in read_record(self.study))

    # Identity of the run.

    def _require_same(self, run: Mapping[str, Part]) -> None:
        then = self._kept.get(RUN)
        if then is not None and not isinstance(then, dict):
            raise StorageError(
                f"What {named(self.study)} says of its run is damaged: {then!r}. Pass another storage or "
                "study_name."
            )
        name = f"The study {self.study.study_name!r}"
        advice = "Pass another study_name or storage for a new run"
        if then is None and self._has_trials() and not self._has_steps():
            raise StudyMismatchError(f"{name} was made by search(), not by MIPROv2.compile. {advice}.")
        changed = differences(then, run) if then is not None else []
        if changed and (self._has_trials() or self._has_steps()):
            raise StudyMismatchError(
                f"{name} belongs to another run, which differs in: {', '.join(changed)}. {advice}, or pass "
                "the arguments of that run to continue it."
            )

    def _has_trials(self) -> bool:
        with reported():
            return bool(self.study.get_trials(deepcopy=False))

    def _has_steps(self) -> bool:
        """Whether the study has results of steps before the search."""
        return any(key.startswith((DEMOS, INSTRUCTIONS, ANSWERS)) for key in self._kept)

    def _set(self, key: str, value: Any) -> None:
        if self._lease.lost is None:
            with reported():
                self.study.set_user_attr(key, value)
        self._kept[key] = value

    def _try_to_keep(self, what: str, values: Mapping[str, Any]) -> None:
        try:
            for key, value in values.items():
                self._set(key, value)
        except StorageError as error:  # the search needs the storage too, and will report its error
            logger.warning("%s could not be kept: %s", what, error)


def read_candidates(kept: Mapping[str, Any], kind: str) -> dict[int, list[Any]]:
    """The candidates of each predictor in the attributes of a study: `INSTRUCTIONS`, or `DEMOS` as JSON."""
    return {i: [kept[f"{kind}:{i}:{j}"] for j in range(n)] for i, n in enumerate(kept[kind]["numbers"])}


def kept_usage(kept: Mapping[str, Any]) -> dict[str, Usage]:
    """The usage of each step before the search, in the attributes of a study."""
    keys = [key for key in kept if key.startswith(f"{USED}:")]
    return {key.removeprefix(f"{USED}:"): usage_from(kept[key]) for key in keys}


def demos_to_json(demos: Sequence[Any]) -> list[dict[str, Any]]:
    """The fields of each demo, as in DSPy's saved programs; values that are not JSON as in prompts."""
    plain = [{str(name): serialize_for_json(value) for name, value in demo.items()} for demo in demos]
    loaded: list[dict[str, Any]] = json.loads(json.dumps(plain))
    return loaded


def demos_from_json(demos: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The demos from the result of `demos_to_json`."""
    return [dspy.Example(dict(fields)) for fields in demos]


def require_same_prompts(program: Any, demos: DemoSets, loaded: DemoSets) -> None:
    """Raise a ValueError if loaded demos give other prompts than the original ones."""
    for i, predictor in enumerate(program.predictors()):
        for own, other in zip(demos[i], loaded[i], strict=True):
            if not gives_same_prompt(predictor, own, other):
                raise ValueError("a demo would be formatted differently")


def gives_same_prompt(predictor: Any, own: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two demo sets are formatted alike."""
    adapter, signature = dspy.settings.adapter or dspy.ChatAdapter(), get_signature(predictor)
    try:
        return bool(adapter.format_demos(signature, own) == adapter.format_demos(signature, other))
    except NotImplementedError:  # the adapter has only `format`, as that of local models
        return bool(adapter.format(signature, own, {}) == adapter.format(signature, other, {}))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"an instruction is {value!r}")
    return value


def _warn_of_damage(what: str, error: Exception) -> None:
    logger.warning("%s cannot be read in the study (%s: %s): made again.", what, type(error).__name__, error)
