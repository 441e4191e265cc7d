"""Tables of the demo's tasks, recorded with a real language model: `python -m benchmarks.record`.

A pool is every instruction with every demo set. Demos are training examples that the model answers right, as
in DSPy's bootstrap; scores are of the validation and the test examples. Each prompt is kept as soon as it is
scored, and is not scored again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import numpy as np
from dspy.utils.exceptions import AdapterParseError

from benchmarks.tables import HERE, OWN
from mpromptune.demo.sorting import SORTINGS, sorting_task
from mpromptune.local.decoding import Decoder, Request
from mpromptune.local.lm import local_model
from mpromptune.model.embedding import as_embedder
from mpromptune.operators.texts import demo_text

# NOTE: two of each size that DSPy's bootstrap makes, and larger ones; as in the demo, at most eight.
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8)
_LABELLED = 8
_SEED = 22
# NOTE: on one core, calls per second with batches of 24, 48 and 100 are as 3, 3.4 and 3.9; larger batches
# take more time for attention than they save.
_BATCH = 100


class Recorder:
    """Scores prompts of a task.

    Args:
        name: A key of `SORTINGS`.
        model: The model, as in `LocalLM`.

    Attributes:
        examples: What prompts are scored on.
        instructions: The pool's.
        calls: Number of scores so far.
    """

    def __init__(self, name: str, model: str = "smollm2") -> None:
        task = sorting_task(name, model)
        self.train = task.trainset
        self.examples = task.valset + task.testset
        self.instructions = SORTINGS[name].instructions
        self.calls = 0
        self._signature, self._answer = task.program.signature, SORTINGS[name].answer
        self._adapter, self._metric = task.adapter, task.metric
        self._model = local_model(model)
        self._decoder: Decoder = self._model.decoder()
        self._max_tokens = int(task.lm.kwargs["max_tokens"])

    def prompt(self, instruction: str, demos: Sequence[dspy.Example]) -> str:
        """What all calls of a prompt have in common."""
        return str(self._messages(instruction, demos, self.train[0])[0]["content"])

    def scores(
        self, instruction: str, demos: Sequence[dspy.Example], examples: Sequence[dspy.Example]
    ) -> list[bool]:
        """Which examples a prompt gets right."""
        requests = [self._request(instruction, demos, example) for example in examples]
        order = sorted(range(len(examples)), key=lambda i: requests[i].rest)  # equal beginnings together
        found = [False] * len(examples)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            answers = self._decoder.complete([requests[i] for i in batch])
            for i, answer in zip(batch, answers, strict=True):
                found[i] = self._is_right(examples[i], answer.text)
        self.calls += len(examples)
        return found

    def _messages(
        self, instruction: str, demos: Sequence[dspy.Example], example: dspy.Example
    ) -> list[dict[str, Any]]:
        shown = [dict(demo) for demo in demos]
        signature = self._signature.with_instructions(instruction)
        return self._adapter.format(signature, shown, dict(example.inputs()))

    def _request(self, instruction: str, demos: Sequence[dspy.Example], example: dspy.Example) -> Request:
        texts = [str(message["content"]) for message in self._messages(instruction, demos, example)]
        made = self._model.request(texts, self._max_tokens, ("\n",))
        return replace(made, is_worth=partial(may_be, str(example[self._answer])))

    def _is_right(self, example: dspy.Example, text: str) -> bool:
        try:
            fields = self._adapter.parse(self._signature, text)
        except AdapterParseError:
            return False
        return bool(self._metric(example, dspy.Prediction(**fields)))


def may_be(expected: str, text: str) -> bool:
    """Whether an answer that begins with a text can still be the expected one by the metric of the tasks.

    One that repeats the label before it counts as wrong: no more than 4 of 1440 answers without demos.
    """
    found = text.strip(" .").lower()
    return expected.startswith(found)


def demo_pool(recorder: Recorder) -> list[dspy.Example]:
    """The training examples that the model answers right after eight others, which change every ten."""
    rng, right = random.Random(_SEED), []
    for start in range(0, len(recorder.train), 10):
        asked = recorder.train[start : start + 10]
        others = recorder.train[:start] + recorder.train[start + 10 :]
        shown = rng.sample(others, _LABELLED)
        scores = recorder.scores(recorder.instructions[0], shown, asked)
        right += [example for example, score in zip(asked, scores, strict=True) if score]
    return right


def record(recorder: Recorder, path: Path) -> None:
    """Score the pool, and write the table to a file.

    Args:
        recorder: Of the task.
        path: The .npz file; finished prompts are kept beside it until it is written.
    """
    demos = demo_pool(recorder)
    rng = random.Random(_SEED)
    sets = [rng.sample(range(len(demos)), size) for size in SIZES]
    pairs = [(i, s) for i in range(len(recorder.instructions)) for s in range(len(sets))]
    kept = path.with_suffix(".jsonl")
    known = dict(_kept(kept))
    prompts = {
        (i, s): recorder.prompt(recorder.instructions[i], [demos[d] for d in sets[s]]) for i, s in pairs
    }
    missing = [pair for pair in pairs if prompts[pair] not in known]
    print(f"{path.stem}: {len(pairs)} prompts, {len(pairs) - len(missing)} of them known", flush=True)
    clocks, recorder.calls = (time.perf_counter(), time.process_time()), 0
    for n, (i, s) in enumerate(missing, 1):
        right = recorder.scores(recorder.instructions[i], [demos[d] for d in sets[s]], recorder.examples)
        bits = "".join(str(int(score)) for score in right)
        _keep(kept, prompts[i, s], bits)
        known[prompts[i, s]] = bits
        _report(clocks, recorder.calls, n, len(missing), np.mean(right))
    scores = np.array([[int(bit) for bit in known[prompts[pair]]] for pair in pairs], dtype=np.uint8)
    _write(recorder, path, pairs, sets, demos, scores)
    kept.unlink()


def _kept(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts and their scores; a line that was not finished is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            found = json.loads(line)
            yield found["prompt"], found["right"]


def _keep(path: Path, prompt: str, bits: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"prompt": prompt, "right": bits}) + "\n")  # half a line may precede
        file.flush()
        os.fsync(file.fileno())


def _report(clocks: tuple[float, float], calls: int, done: int, total: int, accuracy: float) -> None:
    wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    minutes = wall / done * (total - done) / 60
    print(
        f"{done} of {total} prompts, the last right on {accuracy:.0%}; {calls / cpu:.1f} calls per CPU "
        f"second, {calls / wall:.1f} per second; about {minutes:.0f} minutes left",
        flush=True,
    )


def _write(
    recorder: Recorder,
    path: Path,
    pairs: list[tuple[int, int]],
    sets: list[list[int]],
    demos: list[dspy.Example],
    scores: np.ndarray[Any, Any],
) -> None:
    """The table in the format of the others, with texts."""
    embed = as_embedder(None)
    texts = [demo_text(dict(demo)) for demo in demos]
    padded = np.full((len(sets), max(SIZES)), -1)
    for row, of in zip(padded, sets, strict=True):
        row[: len(of)] = of
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        scores=np.packbits(scores, axis=1),
        n_examples=np.int32(scores.shape[1]),
        test_mean=scores.mean(axis=1).astype(np.float32),
        test_n=np.int32(scores.shape[1]),
        instruction_of=np.array([i for i, _ in pairs], dtype=np.int16),
        demo_set_of=np.array([s for _, s in pairs], dtype=np.int16),
        demo_sets=padded.astype(np.int16),
        instruction_emb=embed(recorder.instructions).astype(np.float16),
        demo_emb=embed(texts).astype(np.float16),
        instructions=np.array(recorder.instructions),
        demos=np.array(texts),
        examples=np.array([json.dumps(dict(example)) for example in recorder.examples]),
    )
    os.replace(temporary, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="*", default=list(SORTINGS), choices=list(SORTINGS))
    for name in parser.parse_args().task:
        path = HERE / f"{next(table for table in OWN if table.startswith(name))}.npz"
        if not path.exists():
            record(Recorder(name), path)
        print(f"{path}: done")


if __name__ == "__main__":
    main()
