"""Stand-ins for language models, with which the recipes run offline, at once, without a key and for free.

They are not models. Each is a few rules for the data of one recipe: it knows the right answers, and has bad
habits, such as giving dates in words. A habit shows on most examples, but seldom if the instruction or a demo
says how to do it right. So there is something to optimise, and the figures say nothing about real models.

Stubs that write instructions draw from a few sentences. If they are shown feedback, they add those that
answer it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy

# DSPy 3.4 announces another interface for language models, which DSPy 3.2 does not have.
warnings.filterwarnings("ignore", message="Implementing custom LMs", category=DeprecationWarning)

# The chance of a bad habit, and if the prompt says how to do it right.
MOSTLY, SELDOM = 0.6, 0.1
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[ ##|\n\nRespond with|\Z)", re.DOTALL)

Row = dict[str, Any]
Rule = Callable[["Prompt"], str]


@cache
def data(name: str) -> list[Row]:
    """The rows of a file in the folder ``data``."""
    rows: list[Row] = json.loads((Path(__file__).parent / "data" / f"{name}.json").read_text("utf-8"))
    return rows


@dataclass(frozen=True)
class Prompt:
    """What a stub reads of a request.

    Attributes:
        told: The instruction and the demos.
        given: The input fields, in which the trajectory of an agent is opened.
        attempt: A number that differs between requests for different answers to one prompt.
    """

    told: str
    given: Mapping[str, str]
    attempt: object = None

    @classmethod
    def of(cls, messages: Sequence[Row], attempt: object) -> Prompt:
        """The prompt of a request of DSPy's chat or JSON adapter."""
        *before, last = (str(message["content"]) for message in messages)
        told = "\n\n".join(before).rpartition("your objective is:")[2]
        return cls(told, {name: value.strip() for name, value in _FIELD.findall(last)}, attempt)

    def draw(self, *about: object) -> float:
        """A number from 0 to 1 that is always the same for the same prompt."""
        key = repr((about, self.told, sorted(self.given.items()), self.attempt))
        return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8

    def slips(self, habit: str, cure: str) -> bool:
        """Whether a bad habit shows; ``cure`` is a pattern for what the prompt may say against it."""
        chance = SELDOM if re.search(cure, self.told, re.IGNORECASE) else MOSTLY
        return self.draw(habit) < chance


class StubLM(dspy.BaseLM):
    """Answers each requested field by its rule; about four letters count as a token.

    Args:
        name: Name of the model.
        rules: Field to a function of the prompt.
    """

    def __init__(self, name: str, rules: Mapping[str, Rule]) -> None:
        super().__init__(name, "chat", 0.0, 1000, False)
        self._rules = rules

    def forward(self, prompt: str | None = None, messages: Sequence[Row] = (), **kwargs: Any) -> Any:
        """One completion, in the shape of the OpenAI API."""
        messages = messages or [{"role": "user", "content": prompt}]
        asked = str(messages[-1]["content"]).rpartition("Respond with")[2]
        read = Prompt.of(messages, kwargs.get("rollout_id", self.kwargs.get("rollout_id")))
        names = [
            name for name in re.findall(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`", asked) if name != "completed"
        ]
        answers = {name: self._rules.get(name, _something)(read) for name in names}
        blocks = [f"[[ ## {name} ## ]]\n{text}" for name, text in answers.items()]
        text = json.dumps(answers) if "a JSON object" in asked else "\n\n".join(blocks)
        sent = sum(len(str(message["content"])) for message in messages)
        usage = {"prompt_tokens": sent // 4, "completion_tokens": len(text) // 4 + 1}
        usage["total_tokens"] = sum(usage.values())
        message = SimpleNamespace(content=text, tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
        return SimpleNamespace(choices=[choice], usage=usage, model=self.model)

    def copy(self, **kwargs: Any) -> StubLM:
        """The same stub with other settings, as DSPy makes them for another attempt."""
        twin = StubLM(self.model, self._rules)
        twin.kwargs = {**self.kwargs, **kwargs}
        return twin


def _something(prompt: Prompt) -> str:
    return "Nothing to add."


def writer(advice: Mapping[str, str], useless: Sequence[str] = ()) -> dict[str, Rule]:
    """Rules that write instructions: the given one, and more sentences.

    Args:
        advice: A pattern in the feedback to the sentence that answers it.
        useless: Sentences that change nothing.
    """

    def write(prompt: Prompt) -> str:
        names = "current_instruction", "basic_instruction"
        merged = prompt.given.get("first_instruction", "").partition("\n")[2]
        text = next((prompt.given[name] for name in names if name in prompt.given), merged)
        feedback = prompt.given.get("examples_with_feedback", "")
        called = [said for cue, said in advice.items() if re.search(cue, feedback) and said not in text]
        others = [said for said in (*advice.values(), *useless) if said not in text]
        added = called or others[int(prompt.draw("advice") * len(others)) :][:1]
        return " ".join([text if text.endswith(".") else f"{text}.", *added])

    return dict.fromkeys(("proposed_instruction", "new_instruction"), write)


def router() -> StubLM:
    """For `classify.py`: it names a team at random, and less often where a demo has the message's team."""
    teams = {row["message"]: row["team"] for row in data("messages")}

    def team(prompt: Prompt) -> str:
        right = teams[prompt.given["message"]]
        if prompt.slips("guesses", rf"\[\[ ## team ## \]\]\s+{right}"):
            return ("billing", "delivery", "technical")[int(3 * prompt.draw("team"))]
        return str(right)

    return StubLM("stub/router", {"team": team})


USELESS = ("Be friendly.", "Think about it.", "This matters to many people.", "Write as an expert would.")


def reader() -> StubLM:
    """For `rag.py`: answers from passages, and judges answers. It is vague, and adds what nobody wrote."""
    facts = {row["question"]: row["answer"] for row in data("library_questions")}
    added = "Ask at the desk and they will surely make an exception."

    def answer(prompt: Prompt) -> str:
        fact = facts[prompt.given["question"]]
        if fact not in prompt.given["context"]:
            return "The passages do not say."
        said = "That depends." if prompt.slips("vague", "exact|figure|number") else f"It is {fact}."
        return f"{said} {added}" if prompt.slips("adds", "only|nothing else|passage") else said

    def complete(prompt: Prompt) -> str:
        return str(prompt.given["reference"].lower() in prompt.given["answer"].lower())

    def faithful(prompt: Prompt) -> str:
        return str(added not in prompt.given["answer"])

    advice = {"incomplete": "Give the exact figure.", "not supported": "Say nothing else than the passages."}
    rules = {"answer": answer, "complete": complete, "faithful": faithful}
    return StubLM("stub/reader", {**rules, **writer(advice, USELESS)})


def agent() -> StubLM:
    """For `react_tools.py`: calls tools. It guesses the delivery, and does sums in its head, wrongly."""

    def steps(prompt: Prompt) -> list[tuple[str, dict[str, str]]]:
        """All steps for a question, as far as they can be said."""
        number, item, city = re.findall(r"(\d+) (\w+?)s? .*to (\w+)", prompt.given["question"])[0]
        seen = _observations(prompt)
        chosen: list[tuple[str, dict[str, str]]] = [("price", {"item": item})]
        if not _of_question(prompt).slips("guesses", "never guess"):
            chosen.append(("delivery", {"city": city}))
        if not _of_question(prompt).slips("sums", "for every sum"):
            cost, fee = seen.get("price", "0"), seen.get("delivery", "5")
            chosen.append(("calculate", {"expression": f"{number} * {cost} + {fee}"}))
        return [*chosen, ("finish", {})]

    def step(prompt: Prompt) -> tuple[str, dict[str, str]]:
        chosen = steps(prompt)
        return chosen[min(len(_observations(prompt)), len(chosen) - 1)]

    def answer(prompt: Prompt) -> str:
        seen = _observations(prompt)
        number = int(re.findall(r"\d+", prompt.given["question"])[0])
        in_head = number * int(seen.get("price", 0)) + int(seen.get("delivery", 5)) - 1
        return seen.get("calculate", str(in_head))

    advice = {
        "never looked up": "Look everything up, never guess.",
        "sum is wrong": "Use calculate for every sum.",
    }
    return StubLM(
        "stub/agent",
        {
            "next_thought": lambda prompt: f"Next: {step(prompt)[0]}.",
            "next_tool_name": lambda prompt: step(prompt)[0],
            "next_tool_args": lambda prompt: json.dumps(step(prompt)[1]),
            "answer": answer,
            **writer(advice, USELESS),
        },
    )


def _of_question(prompt: Prompt) -> Prompt:
    """The prompt without the trajectory, so that a habit is the same in all steps."""
    return Prompt(prompt.told, {"question": prompt.given["question"]})


def _observations(prompt: Prompt) -> dict[str, str]:
    """What each tool has returned so far."""
    given = prompt.given
    names = {name.rpartition("_")[2]: tool for name, tool in given.items() if name.startswith("tool_name_")}
    return {tool: given.get(f"observation_{i}", "") for i, tool in names.items()}


def detective() -> StubLM:
    """For `multi_hop.py`: it searches for its own question again, and answers in whole sentences."""
    facts = {row["question"]: row for row in data("office_questions")}

    def query(prompt: Prompt) -> str:
        row = facts[prompt.given["question"]]
        if row["between"] not in prompt.given.get("notes", ""):
            return str(row["first"])
        return str(
            row["first"] if prompt.slips("again", "name in the notes|name of the person") else row["between"]
        )

    def answer(prompt: Prompt) -> str:
        fact = facts[prompt.given["question"]]["answer"]
        if fact not in prompt.given["notes"]:
            return "unknown"
        return f"The answer is {fact}." if prompt.slips("sentence", "one word|only the") else str(fact)

    advice = {
        "does not contain": "Search for the name of the person that is in the notes.",
        "more than": "Answer with one word.",
    }
    rules = {"query": query, "answer": answer}
    return StubLM("stub/detective", {**rules, **writer(advice, USELESS)})


def clerk() -> StubLM:
    """For `cheap_and_strong.py`, the cheap model: it copies dates and amounts as they are written."""
    facts = {row["letter"]: row for row in data("invoices")}

    def due(prompt: Prompt) -> str:
        row = facts[prompt.given["letter"]]
        return str(row["written_due"] if prompt.slips("words", r"YYYY-MM-DD|\d{4}-\d\d-\d\d") else row["due"])

    def amount(prompt: Prompt) -> str:
        row = facts[prompt.given["letter"]]
        return str(
            row["written_amount"]
            if prompt.slips("currency", "digits only|without a currency")
            else row["amount"]
        )

    return StubLM("stub/cheap", {"due": due, "amount": amount})


def editor() -> StubLM:
    """For `cheap_and_strong.py`, the strong model: it writes instructions."""
    advice = {
        "date": "Write the date as YYYY-MM-DD.",
        "amount": "Write the amount in digits only, without a currency.",
    }
    return StubLM("stub/strong", writer(advice, USELESS))
