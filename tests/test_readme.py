"""The README: short, in short sentences, and its first commands are the demo and the tests."""

from __future__ import annotations

import re

from pages import README

PROSE = re.sub(r"^```.*?^```|<!--.*?-->", "", README, flags=re.MULTILINE | re.DOTALL)
# Links without their addresses; a row of dashes is no text.
WORDS = re.sub(r"^[|\s:-]+$", "", re.sub(r"\]\([^)]*\)", "]", PROSE), flags=re.MULTILINE)


def words(text: str) -> list[str]:
    """Whatever has a letter or a digit, between spaces."""
    return [word for word in text.split() if re.search(r"\w", word)]


def test_it_is_read_in_five_minutes() -> None:
    """At most 900 words beside the code, and no sentence, cell or item of more than 30."""
    assert len(words(WORDS)) <= 900
    sentences = re.split(r"(?<=[.!?])\s|\n\n|\n[-#] |\n?\|", WORDS)
    assert max(len(words(sentence)) for sentence in sentences) <= 30


def test_the_table_of_figures_is_short() -> None:
    """At most eight rows, each with the command that reproduces it."""
    table = README.split("## What you get", 1)[1].split("\n## ", 1)[0]
    _, _, *rows = re.findall(r"^\|.*\|$", table, flags=re.MULTILINE)
    assert 0 < len(rows) <= 8
    assert all(re.search(r"\| `benchmarks\.\w+[\w -]*` \|$", row) for row in rows)


def test_the_first_commands_are_the_demo_and_the_tests() -> None:
    """`make demo` and `make test` come first."""
    first = README.split("```console", 1)[1].split("```", 1)[0]
    assert re.findall(r"^make (\w+) ", first, flags=re.MULTILINE) == ["demo", "test"]
