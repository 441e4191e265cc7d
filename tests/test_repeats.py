"""Warnings that are repeated in a compile appear once, and models are loaded in silence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from mpromptune.model.loading import quiet_loading
from mpromptune.show.repeats import repeats_hidden


class Shown(logging.Handler):
    """Keeps the messages that it is to show."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(params=["dspy", "transformers"])
def shown(request: pytest.FixtureRequest) -> Iterator[Shown]:
    """A handler of a library."""
    handler, logger = Shown(), logging.getLogger(request.param)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("shown", ["dspy"], indirect=True)
def test_a_warning_of_the_log_appears_once(shown: Shown) -> None:
    """The same text of the same module; errors and messages appear each time, and so does all afterwards."""
    log, other = logging.getLogger("dspy.predict"), logging.getLogger("dspy.other")
    with repeats_hidden:
        for _ in range(3):
            log.warning("fields %s", "a")
        log.warning("fields %s", "b")
        other.warning("fields %s", "a")
        log.error("no")
        log.error("no")
        assert shown.messages == ["fields a", "fields b", "fields a", "no", "no"]
    log.warning("fields %s", "a")
    assert (len(shown.messages), shown.filters) == (6, [])


@pytest.mark.parametrize("shown", ["dspy"], indirect=True)
def test_a_warning_that_cannot_be_formatted_is_left_to_its_handler(shown: Shown) -> None:
    """As without a compile, the handler reports it, and the call that logs goes on."""
    record = logging.LogRecord("dspy.predict", logging.WARNING, "", 0, "%d fields", ("no",), None)
    with repeats_hidden:
        assert shown.filter(record)


@pytest.mark.parametrize("shown", ["dspy"], indirect=True)
def test_every_handler_shows_it_once(shown: Shown) -> None:
    """A warning that has appeared in one place is not kept from another."""
    root, log = Shown(), logging.getLogger("mpromptune.engine")
    logging.getLogger("mpromptune").addHandler(shown)
    logging.root.addHandler(root)
    try:
        with repeats_hidden, repeats_hidden:
            for _ in range(2):
                log.warning("late")
    finally:
        logging.getLogger("mpromptune").removeHandler(shown)
        logging.root.removeHandler(root)
    assert shown.messages == root.messages == ["late"]


def test_a_warning_of_python_appears_once() -> None:
    """Whatever the filters; the hook of the caller gets it, and is back in the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        seen: list[str] = []
        warnings.showwarning = hook = lambda message, *more: seen.append(str(message))
        with repeats_hidden:
            for text in ("old", "old", "older"):
                warnings.warn(text, DeprecationWarning, stacklevel=1)
            assert seen == ["old", "older"]
            ours = warnings.showwarning
            with warnings.catch_warnings(record=True) as recorded:
                warnings.warn("old", DeprecationWarning, stacklevel=1)
        assert warnings.showwarning is hook
        assert len(recorded) == 1
        for _ in range(2):  # put back by somebody later, ours hides nothing
            ours("old", DeprecationWarning, "file", 1)
        assert seen[2:] == ["old", "old"]


@pytest.mark.parametrize("shown", ["transformers"], indirect=True)
def test_models_are_loaded_in_silence(shown: Shown) -> None:
    """No bars and no report of superfluous weights; one of missing weights is shown, and all is restored."""
    settings = pytest.importorskip("transformers.utils.logging")
    log, had_bars = logging.getLogger("transformers.loading"), settings.is_progress_bar_enabled()
    with quiet_loading:
        assert not settings.is_progress_bar_enabled()
        log.warning("BertModel LOAD REPORT: UNEXPECTED")
        log.warning("BertModel LOAD REPORT: MISSING")
    assert shown.messages == ["BertModel LOAD REPORT: MISSING"]
    assert (settings.is_progress_bar_enabled(), shown.filters) == (had_bars, [])
