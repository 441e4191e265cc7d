"""What is learned about proposers: in a search, in its study, and in a file for other searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from writers import World, Writer, better, run

from mpromptune.engine.proposers import Brief
from mpromptune.errors import InvalidArgumentError
from mpromptune.model.space import UNKNOWN, Gain
from mpromptune.storage.attributes import SETTINGS
from mpromptune.storage.gains import read_gains, write_gains


def worse(brief: Brief) -> str:
    return f"0.10 by {brief.number}"


def asked(writers: list[Writer], **arguments: int) -> list[int]:
    run(World(), writers, max_calls=300, **arguments)
    return [len(writer.briefs) for writer in writers]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_who_writes_better_candidates_is_asked_more_often(seed: int) -> None:
    """Of two proposers, one improves its parents and the other writes worse texts."""
    good, poor = asked([Writer(better, "good"), Writer(worse, "poor")], seed=seed)
    assert good > poor


def test_a_result_has_the_gains() -> None:
    """In logits: above what was expected for better children, and below it for worse ones."""
    gains = run(World(), [Writer(better, "good"), Writer(worse, "poor")], max_calls=300).gains
    assert gains["good"].mean > UNKNOWN.mean > gains["poor"].mean


def test_a_proposer_says_what_other_searches_have_learned() -> None:
    """One that is known to be useless is not asked; the study has the prior for a run that continues it."""
    writer = Writer(better, "known")
    writer.gain = Gain(-5.0, 0.1)  # type: ignore[attr-defined]
    result = run(World(), [writer], max_calls=50)
    assert not writer.briefs
    assert result.study.user_attrs[SETTINGS]["gains"] == {"known": (-5.0, 0.1)}


def test_the_file_has_what_was_written(tmp_path: Path) -> None:
    """Nothing is known without a file; a new one replaces the old one."""
    path = tmp_path / "gains.json"
    assert read_gains(path) == {}
    write_gains(path, {"reflect": Gain(0.25, 0.125)})
    write_gains(path, {"reflect": Gain(0.5, 0.125), "fresh": Gain(-0.5, 0.25)})
    assert read_gains(path) == {"reflect": Gain(0.5, 0.125), "fresh": Gain(-0.5, 0.25)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["gains.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"mean": 0.0, "deviation": 0.0}}', '{"a": {"mean": "x"}}']
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    """The message names the option, the file and what to do."""
    path = tmp_path / "gains.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"gains_file=.*gains\.json.*delete the file"):
        read_gains(path)
