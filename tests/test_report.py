"""The HTML page of a search: complete, self-contained, and safe to open."""

from __future__ import annotations

import pickle
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from embedders import letters
from handmade import BASELINE, OTHER, SPACE, TRIALS, WINNER, findings, study_of

from mpromptune import PromptSpace, qEISampler, search
from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.show.page import render, write_report

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checked(HTMLParser):
    """Fails on a page whose elements are not properly nested, and notes what they are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name.split(":")[-1] in ("href", "src")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name.split(":")[-1] in ("href", "src")]


def test_page_is_well_formed_and_refers_to_nothing() -> None:
    """No script, no address; links lead to parts of the page itself, or hold what they link to."""
    page = render(findings())
    checked = Checked(page)
    assert not {"script", "link", "img", "iframe"} & set(checked.tags)
    assert all(link.startswith(("#", "data:")) for link in checked.links)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_figures_are_in_the_page() -> None:
    """Six of them, where everything that they show is known."""
    pytest.importorskip("matplotlib")
    assert Checked(render(findings())).tags.count("svg") == 6
    assert Checked(render(findings(distances=None))).tags.count("svg") == 5


def test_without_matplotlib_the_page_says_how_to_have_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and texts need no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = render(findings())
    assert "m-promptune[plots]" in page
    assert "svg" not in Checked(page).tags


def test_texts_are_escaped() -> None:
    """What prompts and demos hold is shown, not obeyed."""
    page = render(findings(best_params=OTHER.params), notes=["<i>a note</i>"])
    assert "<script" not in page
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;briefly&lt;/b&gt;" in page
    assert "&lt;i&gt;a note&lt;/i&gt;" in page


def test_changes_are_marked_word_by_word() -> None:
    """From the baseline's instruction to the winner's, one word goes and one comes."""
    page = render(findings())
    assert "&gt;<del>briefly</del><ins>slowly</ins>&lt;" in page
    assert "Predictor 0, demos (unchanged)" in page


def test_demos_are_marked_as_wholes() -> None:
    """A demo that only the winner has was added."""
    added = render(findings(best_params=OTHER.params))
    assert re.search(r"<pre><ins>&lt;/pre&gt;.*?</ins></pre>", added)


def test_texts_with_little_in_common_stand_one_after_the_other() -> None:
    """Words that happen to occur in both do not tear them to pieces."""
    texts = ["Answer the question.", "Think about the sum, step by step."]
    page = render(findings(space=PromptSpace({**SPACE.components, "0_predictor_instruction": texts})))
    assert f"<pre><del>{texts[0]}</del>\n\n<ins>{texts[1]}</ins></pre>" in page


def test_long_texts_are_not_compared_word_by_word() -> None:
    """Which would take the square of their length."""
    texts = ["one " * 20_000, "two " * 20_000]
    page = render(findings(space=PromptSpace({**SPACE.components, "0_predictor_instruction": texts})))
    assert f"<del>{texts[0]}</del>\n\n<ins>{texts[1]}</ins>" in page


def test_headline_has_scores_calls_and_cost() -> None:
    """Baseline, winner, calls and dollars, as the result has them."""
    page = render(findings())
    assert "0.25 → <strong>0.75</strong>" in page
    assert "10 program calls on 4 validation examples, $1.5; 3 configurations measured." in page
    assert "not measured → <strong>" in render(findings(baseline_score=float("nan")))


def test_winner_is_marked_in_the_table() -> None:
    """Its row, and only its, is set apart."""
    page = render(findings())
    assert re.findall(r"<tr class=winner><td>(.*?)</td>", page) == ["0: instr. 1, demos 0 — winner"]
    assert "<td>0: instr. 0, demos 0 — baseline</td>" in page


def test_unsolved_examples_are_listed() -> None:
    """Example 1, on which three configurations were measured."""
    assert "measured on it): 1 (3).</p>" in render(findings())


@pytest.mark.parametrize(
    "changes",
    [
        {"space": None},
        {"configurations": (), "study": study_of(())},
        {"configurations": (BASELINE,), "best_params": BASELINE.params},
        {"configurations": (OTHER, BASELINE), "best_params": OTHER.params, "space": None},
        {"study": study_of(TRIALS, lost=[0, 1])},
        {"best_params": WINNER.params, "configurations": (BASELINE,)},
    ],
)
def test_whatever_is_missing_the_page_is_made(changes: dict[str, Any]) -> None:
    """Texts, configurations, a winner that was measured, trials that did not fail."""
    Checked(render(findings(**changes)))


def _small(n_examples: int = 12, **options: Any) -> Any:
    """A search by identity or letters, of a metric that is far from 0..1."""

    def score(params: dict[str, int], example: int) -> float:
        return -500.0 - 100.0 * ((params["style"] * 7 + example) % 3)

    space = options.pop("space", PromptSpace({"style": ["aa", "bbb", "c < d"]}))
    arguments = {"n_examples": n_examples, "max_calls": 40, "num_threads": 2, "block_size": 4, **options}
    return search(space, score, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "random"},
        {"sampler": "random", "confirm": False},
        {"sampler": qEISampler(embedder=letters, batch_size=2, n_batches=2)},
        {"sampler": "random", "space": PromptSpace({"style": ["only"]})},
        {"sampler": "random", "schedule": "mipro", "minibatch_size": 4, "block_size": None},
    ],
    ids=["random", "unconfirmed", "qei", "one", "mipro"],
)
def test_report_of_real_searches(tmp_path: Path, options: dict[str, Any]) -> None:
    """A result, also one that was pickled, writes its page; the texts come from the search."""
    result = _small(**options)
    assert (result.distances is not None) == isinstance(options["sampler"], qEISampler)
    loaded = pickle.loads(pickle.dumps(result))
    page = loaded.report(tmp_path / "page.html").read_text(encoding="utf-8")
    Checked(page)
    assert result.space.components["style"][result.best_params["style"]].replace("<", "&lt;")[:2] in page


def test_failing_searches_are_reported(tmp_path: Path) -> None:
    """A search with trials that failed, and one that an outage stopped, have results with a page."""

    def score(params: dict[str, int], example: int) -> float:
        if params["style"] == 2 and example == 5:
            raise ConnectionError("down")
        if outage.is_set():
            raise ConnectionError("all down")
        return float(params["style"])

    outage = threading.Event()
    space = PromptSpace({"style": ["a", "b", "c"]})
    arguments = {"n_examples": 20, "max_calls": 60, "sampler": "random", "block_size": 3, "num_threads": 1}
    result = search(space, score, retry=RetryPolicy(attempts=1), **arguments)
    page = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    Checked(page)
    assert "Trials that failed or were cut off: " in page
    with pytest.raises(SearchStoppedError) as stopped:
        search(space, score, retry=RetryPolicy(attempts=1), callbacks=[lambda *_: outage.set()], **arguments)
    Checked(stopped.value.result.report(tmp_path / "page.html").read_text(encoding="utf-8"))


def test_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error says where and why."""
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        write_report(findings(), tmp_path / "nowhere" / "page.html")
