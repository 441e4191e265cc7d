"""What a proposed instruction or demo set must not be, or must keep, whoever made it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mpromptune.engine.proposers import Brief, Proposer, ProposerWrapper
from mpromptune.errors import ProposalRefusedError
from mpromptune.execution.attempts import FAILURES
from mpromptune.lms.errors import classify
from mpromptune.operators.base import Setting, demos_of, predictor_of
from mpromptune.operators.texts import (
    candidate_text,
    demo_text,
    encodable,
    encodable_demo,
    shortened,
    value_text,
    words,
)

# NOTE: words in a row that count as copied. GPT-3's training data were searched for 8 to 13 words in a row of
# test examples (Brown et al. 2020, appendix C); this is the least, because an example may be one sentence.
_COPIED = 8
# NOTE: characters of a shorter value that count as copied: most names and classes have fewer.
_COPIED_CHARS = 20
# The instruction of a signature without one; `dspy.ChainOfThought` adds a field and keeps it.
_BY_DSPY = re.compile("Given the fields .*, produce the fields .*")
_SHOWN = 80
# NOTE: most characters of the error of a proposal; an answer that cannot be parsed is part of its error.
_ERROR = 300


def rules(setting: Setting, component: str) -> str:
    """What a language model is told about what `checked` will refuse."""
    said = [
        f"The instruction itself is plain text of at most {setting.max_chars} characters.",
        "It is about the task in general, and never copies the text or the answer of an example.",
    ]
    if names := markers(setting, component):
        said.append(f"It contains these, by which the output is read: {', '.join(names)}")
    return " ".join(said)


class Guarded(ProposerWrapper):
    """A proposer whose candidates are checked.

    Args:
        proposer: Any proposer.
        setting: The compile.
    """

    def __init__(self, proposer: Proposer, setting: Setting) -> None:
        super().__init__(proposer)
        self._setting = setting

    def propose(self, brief: Brief) -> Any:
        """A new candidate that is fit to be one.

        Raises:
            ProposalRefusedError: It is not, an answer cannot be used, or the code of the proposer failed.
                Errors of the infrastructure, and those after which no other request can succeed, are passed
                on.
        """
        try:
            return checked(super().propose(brief), self._setting, brief)
        except Exception as error:
            if isinstance(error, ProposalRefusedError) or classify(error) not in FAILURES:
                raise
            said = shortened(error, _ERROR)
            raise ProposalRefusedError(f"The proposal failed with {type(error).__name__}: {said}") from error


def checked(written: Any, setting: Setting, brief: Brief) -> Any:
    """A new instruction or demo set that is fit to be a candidate.

    Raises:
        ProposalRefusedError: It is not; the message says why.
    """
    of_demos = brief.component == demos_of(predictor_of(brief.component))
    return (checked_demos if of_demos else checked_instruction)(written, setting, brief)


def checked_demos(written: Any, setting: Setting, brief: Brief) -> list[Any]:
    """A new demo set.

    Raises:
        ProposalRefusedError: It is no list of demos, is known already, or has a validation example.
    """
    is_set = isinstance(written, list | tuple) and all(hasattr(demo, "items") for demo in written)
    if not is_set:
        raise ProposalRefusedError(f"A demo set must be a list of demos; got {shortened(written, _SHOWN)}.")
    demos = [encodable_demo(demo) for demo in written]
    if held := next((demo for demo in demos if setting.is_held_out(demo)), None):
        said = shortened(demo_text(held), _SHOWN)
        raise ProposalRefusedError(f"The demo set has the inputs of a validation example: {said!r}.")
    for index, known in setting.known(brief, brief.component).items():
        if candidate_text(demos) == candidate_text(known):
            raise ProposalRefusedError(f"The demo set equals candidate {index}.")
    return demos


def checked_instruction(written: Any, setting: Setting, brief: Brief) -> str:
    """A new instruction, without what was wrapped around it.

    Raises:
        ProposalRefusedError: It is empty, too long, JSON, known already, lacks what the output is read by, or
            copies from an example.
    """
    if not isinstance(written, str):
        raise ProposalRefusedError(f"An instruction must be a text; got {shortened(repr(written), _SHOWN)}.")
    text: str = encodable(unwrapped(written))  # in this order, because JSON has escapes for lone surrogates
    if not text:
        raise ProposalRefusedError("The instruction is empty.")
    if len(text) > setting.max_chars:
        raise ProposalRefusedError(
            f"The instruction has {len(text):,} characters; at most {setting.max_chars:,} are allowed."
        )
    spaced = " ".join(text.split())
    for index, known in setting.known(brief, brief.component).items():
        if spaced == " ".join(known.split()):
            raise ProposalRefusedError(f"The instruction equals candidate {index}.")
    if lost := [name for name in markers(setting, brief.component) if name not in text.casefold()]:
        raise ProposalRefusedError(f"The instruction lacks {lost}, which the student's own names.")
    if (copy := copied(text, setting, brief.component)) is not None:
        raise ProposalRefusedError(f"The instruction copies from an example: {shortened(copy, _SHOWN)!r}.")
    return text


def unwrapped(text: str) -> str:
    """The text in a code block, or the only text in JSON; other texts are unchanged.

    Raises:
        ProposalRefusedError: The text is JSON with other contents, or a code block that does not end.
    """
    text = text.strip()
    if text.startswith("```"):
        if text.count("```") == 2 and text.endswith("```"):
            language, _, block = text[3:-3].partition("\n")
            return unwrapped(block if not language.strip() or language.isalnum() else text[3:-3])
        if text.count("```") % 2:
            raise ProposalRefusedError("The instruction is a code block that does not end.")
    return _from_json(text) if re.match(r'\{\s*["}]|\[|"', text) else text


def _from_json(text: str) -> str:
    """The only text in JSON; a text that is no JSON is unchanged."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        if text.startswith("{"):
            raise ProposalRefusedError("The instruction is JSON that cannot be read.") from None
        return text
    while isinstance(value, dict | list) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise ProposalRefusedError(f"The instruction is JSON without one text: {shortened(text, _SHOWN)}")
    return value.strip()


def markers(setting: Setting, component: str) -> list[str]:
    """Output fields as the student's own instruction writes them: in backticks, or before a colon.

    The instruction that DSPy writes for a signature without one has none.
    """
    signature = setting.signature(component)
    if _BY_DSPY.fullmatch(signature.instructions):
        return []
    own, names = signature.instructions.casefold(), [name.casefold() for name in signature.output_fields]
    forms = [form for name in names for form in (f"`{name}`", f"{name}:", f"{name.replace('_', ' ')}:")]
    return [form for form in dict.fromkeys(forms) if form in own]


def copied(text: str, setting: Setting, component: str) -> str | None:
    """Words of an example that are in ``text``, but not in the student's instruction or signature.

    Copied are `_COPIED` words in a row; or a whole value of fewer words and `_COPIED_CHARS` characters,
    unless several examples have it, as the names of classes.
    """
    said, known = words(text), words(_signature_text(setting.signature(component)))
    runs = _runs(said) - _runs(known)
    inside, outside = f" {' '.join(said)} ", f" {' '.join(known)} "
    holders: Counter[str] = Counter()
    for examples in (setting.valset, setting.trainset):
        short: Counter[str] = Counter()
        for example in examples:
            mine: set[str] = set()
            for value in map(words, _values(example)):
                if len(value) >= _COPIED:
                    if common := runs & _runs(value):
                        return " ".join(min(common))
                elif len(joined := " ".join(value)) >= _COPIED_CHARS and f" {joined} " in inside:
                    mine.add(joined)
            short.update(mine)
        holders |= short  # the larger number: an example may be in both
    found = (one for one, n in holders.items() if n == 1 and f" {one} " not in outside)
    return min(found, default=None)


def _runs(some: Sequence[str]) -> set[tuple[str, ...]]:
    return set(zip(*(some[i:] for i in range(_COPIED)), strict=False))


def _values(example: Any) -> Iterator[str]:
    fields = example.items() if hasattr(example, "items") else [("example", example)]
    return (value_text(value) for _, value in fields)


def _signature_text(signature: Any) -> str:
    """The instruction, and all that the signature says of its fields."""
    fields = [
        f"{name} {field.annotation} {field.json_schema_extra}" for name, field in signature.fields.items()
    ]
    return "\n".join([signature.instructions, *fields])
