"""Programs of 2 and 3 predictors, composed from recorded tables: `python -m benchmarks.pipelines`.

An example is right when every stage is right. Each stage has 72 prompts, of its own table or of its own share
of one, as a single component; its examples are aligned with the other stages' at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.runner import RESULTS, Cell, run_cells
from benchmarks.tables import FloatArray, Table, load
from mpromptune import PromptSpace
from mpromptune.engine.minibatches import stock_calls
from mpromptune.model.space import IndexArray

Scores = np.ndarray[Any, np.dtype[np.float32]]

_GSM8K, _OTHER_GSM8K, _NEWS = "gsm8k_llama33_70b_s43", "gsm8k_llama33_70b_s42", "agnews_llama33_70b_s42"
PROGRAMS = (
    (_OTHER_GSM8K, _GSM8K),
    (_GSM8K, _NEWS),
    (_OTHER_GSM8K, _GSM8K, _NEWS),
    (_GSM8K, _GSM8K, _GSM8K),
)
POOL, N_VAL = 72, 200
# Trials of DSPy's medium run by the number of predictors: 2380 and 3505 program calls.
STOCK_TRIALS = {2: 28, 3: 43}
COMPARED = ("stock-tpe", "stock-random", "search-random", "search-qei-index", "search-qei")
COST = """\
CPU seconds of a run: search-qei and search-qei-index 9 with 2 stages and 20 with 3, the others under 5. With
40 seeds that makes 0.4 CPU hours for 2 stages and 0.9 for 3. Finished cells are kept."""


@dataclass(frozen=True)
class Pipeline:
    """A program of several stages as a search problem.

    Attributes:
        space: One component for each stage.
        stages: For each stage, the scores of its prompts on all examples, ``P x N``.
        validation: The examples that may be measured.
        baseline: A configuration drawn at random.
        vectors: Text key to the recorded embeddings of instruction and demos.
    """

    space: PromptSpace
    stages: tuple[Scores, ...]
    validation: IndexArray
    baseline: dict[str, int]
    vectors: Mapping[str, FloatArray]

    @property
    def n_examples(self) -> int:
        """Size of the validation set."""
        return len(self.validation)

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """The recorded embeddings of text keys."""
        return np.stack([self.vectors[text] for text in texts])

    def score(self, params: Mapping[str, int], example: int) -> float:
        """Whether every stage is right."""
        column = self.validation[example]
        row = self.space.row(params)
        return float(all(stage[i, column] for stage, i in zip(self.stages, row, strict=True)))

    def truth(self, row: Sequence[int]) -> float:
        """Mean over all examples of the product of the stages' scores."""
        chosen = [stage[i] for stage, i in zip(self.stages, row, strict=True)]
        return float(np.prod(chosen, axis=0).mean(dtype=np.float64))

    def regret(self, params: Mapping[str, int]) -> float:
        """Best true mean of the whole product minus that of ``params``, in percentage points."""
        return 100.0 * (self.truth(best(self.stages)) - self.truth(self.space.row(params)))

    def exhaustive_regret(self) -> float:
        """Regret of measuring every configuration on every validation example."""
        measured = tuple(stage[:, self.validation] for stage in self.stages)
        return self.regret(self.space.params(best(measured)))


def best(stages: Sequence[Scores]) -> tuple[int, ...]:
    """The configuration with the highest mean, exactly: scores of all but one stage, times that one's.

    Numbers of examples are small integers, which float32 adds without error.
    """
    sizes = [len(stage) for stage in stages]
    prefixes = reduce(_pairs, stages[:-1])
    counts = prefixes @ stages[-1].T
    return tuple(int(i) for i in np.unravel_index(int(counts.argmax()), sizes))


def _pairs(first: Scores, second: Scores) -> Scores:
    """Products of every row of one with every row of the other, in lexicographic order."""
    products: Scores = (first[:, None] * second[None]).reshape(-1, first.shape[1])
    return products


def compose(tables: Sequence[Table], seed: int, pool: int = POOL, n_val: int = N_VAL) -> Pipeline:
    """Draws the stages' pools (disjoint where a table is used twice), alignment and validation set."""
    rng = np.random.default_rng(seed)
    prompts = {table.name: rng.permutation(len(table.truth)).tolist() for table in tables}
    n_all = min(_scores(table).shape[1] for table in tables)
    stages: list[Scores] = []
    components: dict[str, Sequence[str]] = {}
    vectors: dict[str, FloatArray] = {}
    for i, table in enumerate(tables):
        chosen = [prompts[table.name].pop() for _ in range(pool)]
        columns = rng.permutation(_scores(table).shape[1])[:n_all]
        stages.append(_scores(table)[np.ix_(chosen, columns)].astype(np.float32))
        components[f"{i}_predictor_instruction"] = [f"{i}.{prompt}" for prompt in chosen]
        vectors.update({f"{i}.{prompt}": vector_of(table, prompt) for prompt in chosen})
    space = PromptSpace(components)
    validation = rng.choice(n_all, n_val, replace=False)
    baseline = space.params([int(rng.integers(pool)) for _ in tables])
    return Pipeline(space, tuple(stages), validation, baseline, vectors)


def _scores(table: Table) -> FloatArray:
    assert table.scores is not None
    return table.scores


def vector_of(table: Table, prompt: int) -> FloatArray:
    """The instruction's embedding and the mean of the demos' (zero without any), side by side."""
    demos = [d for d in table.demo_sets[table.demo_set_of[prompt]] if d >= 0]
    instruction = table.instruction_emb[table.instruction_of[prompt]]
    pooled = table.demo_emb[demos].mean(axis=0) if demos else np.zeros_like(instruction)
    return np.concatenate([instruction, pooled])


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Regret, and that of exhaustive evaluation, of one run."""
    problem = compose([load(name) for name in cell["program"].split("+")], seed)
    params = METHODS[cell["method"]](problem, cell["calls"], seed, cell["q"])
    exhaustive, regret = problem.exhaustive_regret(), problem.regret(params)
    return {"regret": regret, "excess": regret - exhaustive, "exhaustive": exhaustive}


def cells(methods: Sequence[str], stages: Sequence[int]) -> Iterator[Cell]:
    """Every method on every program, for the calls that DSPy's MIPROv2 would spend."""
    for tables, method in product(PROGRAMS, methods):
        n = len(tables)
        if n in stages:
            calls = stock_calls(STOCK_TRIALS[n], N_VAL)
            yield {"program": "+".join(tables), "stages": n, "method": method, "calls": calls, "q": 4}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=COST)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--methods", nargs="*", default=list(COMPARED), choices=list(METHODS))
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3], choices=[2, 3])
    parser.add_argument("--output", default="pipelines.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    wanted = cells(arguments.methods, arguments.stages)
    run_cells(wanted, measure, arguments.seeds, RESULTS / arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
