"""The HTML page of a search: complete, self-contained, and safe to open."""

from __future__ import annotations

import pickle
import re
import sys
import threading
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy
import pytest
from embedders import hashed, letters
from handmade import BASELINE, INSTRUCTION, OTHER, SPACE, TRIALS, WINNER, findings, study_of
from lms import arithmetic_lm
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, Counted, Planner

from mpromptune import MIPROv2, PromptSpace, SearchResult, qEISampler, search
from mpromptune.errors import InvalidArgumentError, SearchStoppedError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.mipro.reading import read_result
from mpromptune.show import plots, words
from mpromptune.show.page import _svg, render, write_report


class Checked(HTMLParser):
    """Fails on a page whose elements are not properly nested, and notes what they are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "br", "hr", "img", "link", "input"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name.split(":")[-1], value) for name, value in attrs]

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def text_of(page: str) -> str:
    """What a reader sees, without figures and with single spaces."""
    plain = re.sub(r"<(svg|style).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+([.,:])", r"\1", " ".join(plain.replace("&nbsp;", " ").split()))


@pytest.fixture(scope="module")
def page() -> str:
    return render(findings())


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`render` without figures, which take time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return lambda notes=(), **changes: render(findings(**changes), notes)


def test_page_is_well_formed_and_refers_to_nothing(page: str) -> None:
    """No script, no address; links lead to parts of the page itself that exist."""
    checked = Checked(page)
    assert not {"script", "link", "img", "iframe"} & set(checked.tags)
    ids, links = checked.values("id"), checked.values("href", "src")
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} | set(
        checked.values("aria-labelledby")
    ) <= set(ids)
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_the_first_screen_answers_five_questions_in_order(page: str) -> None:
    """What did I get, is it real, what changed, what did it cost, what to do next."""
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page)[:5] == [
        "What did I get?",
        "Is it real?",
        "What changed?",
        "What did it cost?",
        "What to do next?",
    ]
    text = text_of(page)
    assert (
        "Baseline 25.0 % measured on 4 of 4 examples Winner 75.0 % measured on 4 of 4 examples "
        "Gain +50.0 points 2 more of 4 right" in text
    )
    # 0.7 ± 0.03 minus 0.3 ± 0.03: the deviation of the difference is 0.0424, 1.96 times which is 0.0832.
    assert "better than the baseline with a probability of over 99 %." in text
    assert "the model expects a gain of +31.7 to +48.3 points (95 % interval)." in text
    assert "it gains on 2 and loses on 0." in text
    assert "Risk of overfitting: the winner scored 75.0 % on the 4 examples that it was measured on" in text
    assert "on many new ones the model expects only 70.0 % ± 3.0 %" in text
    assert "What changed? instruction: “Answer &lt;b&gt;slowly&lt;/b&gt;.”" in text
    assert "10 program calls 7 LM calls 1.5000 US dollars" in text
    assert "Measure it on a test set." in text
    assert 'best.save("best.json")' in text


def test_the_programs_own_names_and_the_estimate_are_shown(tables: Any, tmp_path: Path) -> None:
    """Of a compile, also from its storage alone."""
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=4, **FEW_SHOT)
        run = {
            "trainset": TRAIN,
            "valset": VAL,
            "embedder": hashed,
            "storage": tmp_path / "run.log",
            **SMALL_RUN,
        }
        found = optimizer.compile(Planner(), **run).search_result
        usage = optimizer.compile(Planner(), **run, dry_run=True).usage.total
    for result in (found, read_result(tmp_path / "run.log")[0]):
        text = text_of(render(result))
        assert "plan: own instruction, no demos; solve: own instruction, no demos — baseline" in text
        assert f"program calls (estimate: at most {usage.program_calls})" in text
        assert f"LM calls (estimate: at most {usage.lm_calls})" in text


def test_estimates_are_marked_with_their_interval(tables: Any) -> None:
    """A score that was foreseen is never shown like one that was measured."""
    few = replace(BASELINE, scores={0: 0.0}, fully=False)
    text = text_of(
        tables(
            configurations=(WINNER, OTHER, few),
            best_params=OTHER.params,
            best_score=0.5,
            best_interval=(0.3, 0.7),
            baseline_interval=(0.1, 0.4),
        )
    )
    assert "Baseline 25.0 % estimate from 1 of 4 examples, 95 %: 10.0 to 40.0 %" in text
    assert "Winner 50.0 % estimate from 2 of 4 examples, 95 %: 30.0 to 70.0 % Gain +25.0 points a" in text
    assert "— winner 2 of 4 50.0 % 30.0 to 70.0 %" in text
    assert "— baseline 1 of 4 25.0 % 10.0 to 40.0 %" in text
    assert "4 of 4 75.0 % measured" in text


def test_other_metrics_keep_their_unit(tables: Any) -> None:
    """Scores that are no shares are shown as the metric gives them, everywhere."""
    scaled = tuple(
        replace(m, scores={e: 500.0 * s - 900.0 for e, s in m.scores.items()})
        for m in findings().configurations
    )
    text = text_of(tables(configurations=scaled, best_score=-525.0, baseline_score=-775.0))
    assert "Baseline -775 measured on 4 of 4 examples Winner -525 measured" in text
    assert "Gain +250 Is it real?" in text
    assert "Scores are means of the metric, not in percent" in text


def _contrast(*colours: str) -> float:
    """The contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read(page: str) -> None:
    """Light and dark: texts have a contrast of 4.5 to what is behind them, figures of 3."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in page.split("@media")[:2])
    assert _contrast("#000000", "#ffffff") == pytest.approx(21.0)
    for names in light, dark:
        for behind in ("paper", "card"):
            found = {
                ink: _contrast(names[ink], names[behind]) for ink in ("ink", "quiet", "link", "more", "less")
            }
            assert min(found.values()) >= 4.5, found
        assert min(_contrast(names["ink"], names[behind]) for behind in ("added", "removed")) >= 4.5
        drawn = plots.BLUE, plots.ORANGE, plots.GREY, plots.GREEN
        assert min(_contrast(colour, names["paper"]) for colour in drawn) >= 3.0


def test_structure_is_accessible(page: str) -> None:
    """Language and title; headings that skip no level; heads of all columns and rows; regions with names."""
    assert '<html lang="en">' in page
    assert "<title>Prompt search report</title>" in page
    levels = [int(tag[1]) for tag in Checked(page).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for table in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        head, *rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
        assert head.count('<th scope="col">') == head.count("<th")
        assert all(row.count('<th scope="row">') == 1 for row in rows)
    for tag in re.findall(r'<[^>]*(?:role="|tabindex)[^>]*>', page):
        assert "aria-label" in tag


def test_figures_are_in_the_page(page: str) -> None:
    """Five of them, where everything that they show is known, each with its reading as its name."""
    pytest.importorskip("matplotlib")
    checked = Checked(page)
    assert checked.tags.count("svg") == checked.values("role").count("img") == 5
    assert [value for value in checked.values("aria-labelledby") if value.startswith("caption-")] == [
        f"caption-{name}" for name in ("growth", "examples", "leaders", "effects", "map")
    ]
    text = text_of(page)
    assert "highest estimate was first measured after 8 of the 10 calls of the search." in text
    assert "No other configuration is within one standard deviation of the winner." in text
    assert "instruction matters most: 30.0 points from its worst candidate to its best." in text
    assert "1 of 4 examples is not solved by any configuration." in text
    assert "#000000" not in page  # which could not be read on a dark page
    assert Checked(render(findings(distances=None))).tags.count("svg") == 4


def test_without_matplotlib_the_page_says_how_to_have_figures(tables: Any) -> None:
    """Tables and texts need no matplotlib."""
    assert "m-promptune[plots]" in tables()
    assert "svg" not in Checked(tables()).tags


def test_texts_are_escaped(tables: Any) -> None:
    """What prompts and demos hold is shown, not obeyed."""
    page = tables(best_params=OTHER.params, notes=["<i>a note</i>"])
    assert "<script" not in page
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;briefly&lt;/b&gt;" in page
    assert "&lt;i&gt;a note&lt;/i&gt;" in page


def test_names_have_no_characters_that_act_or_cannot_be_drawn() -> None:
    """Escapes of terminals, halves of characters; others that the font of figures lacks raise no warning."""
    text = "指示😀 \x1b[31m \ud83d \u202e"
    changed = findings(space=PromptSpace({**SPACE.components, INSTRUCTION: ["Answer.", text]}))
    name = "“指示😀 \ufffd[31m \ufffd \ufffd”"
    assert words.label(changed, {INSTRUCTION: 1}) == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name in _svg(plots.plot_leaders(changed), "leaders")


def test_changes_are_marked(tables: Any) -> None:
    """Word by word, where one word goes and one comes; demos as whole cards."""
    page = tables()
    assert "&gt;<del>briefly</del><ins>slowly</ins>&lt;" in page
    assert "demos (unchanged)" in page
    card = re.search(r'<li class="added"><b>added</b><div.*?>(.*?)</div>', tables(best_params=OTHER.params))
    assert card is not None
    assert card[1].startswith("&lt;/pre&gt;")


@pytest.mark.parametrize(
    "texts",
    [["Answer the question.", "Think about the sum, step by step."], ["one " * 20_000, "two " * 20_000]],
    ids=["little in common", "long"],
)
def test_texts_that_are_not_compared_stand_one_after_the_other(tables: Any, texts: list[str]) -> None:
    """Words that happen to occur in both do not tear them to pieces; long ones would take too long."""
    page = tables(space=PromptSpace({**SPACE.components, INSTRUCTION: texts}))
    assert re.findall(r'<li class="\w+"><b>\w+</b><div.*?>(.*?)</div>', page)[:2] == texts


def test_winner_and_baseline_are_marked_in_the_table(tables: Any) -> None:
    """The winner's row, and only its, is set apart; the baseline's is named."""
    page = tables()
    (row,) = re.findall(r'<tr class="winner"><th scope="row">(.*?)</th>', page)
    assert row.startswith("“Answer &lt;b&gt;slowly&lt;/b&gt;.”, no demos — winner ")
    assert "own instruction, no demos — baseline" in page
    assert "Baseline not measured " in text_of(tables(baseline_score=float("nan")))


def test_unsolved_examples_are_listed(tables: Any) -> None:
    """Example 1, on which three configurations were measured."""
    assert "(configurations measured on it): 1 (3)." in text_of(tables())


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


def _small(**options: Any) -> SearchResult:
    """A search by identity or letters, of a metric that is far from 0..1."""

    def score(params: dict[str, int], example: int) -> float:
        return -500.0 - 100.0 * ((params["style"] * 7 + example) % 3)

    space = options.pop("space", PromptSpace({"style": ["aa", "bbb", "c < d"]}))
    arguments = {"n_examples": 12, "max_calls": 40, "num_threads": 2, "block_size": 4, **options}
    return search(space, score, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "random", "confirm": False},
        {"sampler": qEISampler(embedder=letters, batch_size=2, n_batches=2)},
        {"sampler": "random", "space": PromptSpace({"style": ["only"]})},
        {"sampler": "random", "schedule": "mipro", "minibatch_size": 4, "block_size": None},
    ],
    ids=["unconfirmed", "qei", "one", "mipro"],
)
def test_report_of_real_searches(tmp_path: Path, options: dict[str, Any]) -> None:
    """A result, also one that was pickled, writes its page; the texts come from the search."""
    result = _small(**options)
    assert (result.distances is not None) == isinstance(options["sampler"], qEISampler)
    loaded = pickle.loads(pickle.dumps(result))
    page = loaded.report(tmp_path / "page.html").read_text(encoding="utf-8")
    Checked(page)
    assert result.space is not None
    assert result.space.components["style"][result.best_params["style"]].replace("<", "&lt;")[:2] in page


@pytest.mark.usefixtures("tables")
def test_failing_searches_are_reported(tmp_path: Path) -> None:
    """A search with trials that failed, and one that an outage stopped, have results with a page."""

    def score(params: dict[str, int], example: int) -> float:
        if outage.is_set() or (params["style"] == 2 and example == 5):
            raise ConnectionError("down")
        return float(params["style"])

    outage = threading.Event()
    space = PromptSpace({"style": ["a", "b", "c"]})
    arguments = {"n_examples": 20, "max_calls": 60, "sampler": "random", "block_size": 3, "num_threads": 1}
    result = search(space, score, retry=RetryPolicy(attempts=1), **arguments)
    page = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    Checked(page)
    assert "Trials that failed or were cut short: " in page
    with pytest.raises(SearchStoppedError) as stopped:
        search(space, score, retry=RetryPolicy(attempts=1), callbacks=[lambda *_: outage.set()], **arguments)
    Checked(stopped.value.result.report(tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("tables")
def test_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error says where and why."""
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        write_report(findings(), tmp_path / "nowhere" / "page.html")
