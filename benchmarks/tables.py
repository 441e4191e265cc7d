"""Recorded tables as search problems: a pool of prompts, a validation set, and the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpromptune import PromptSpace
from mpromptune.model.space import FloatArray, IndexArray, Row

PER_EXAMPLE = (
    "gsm8k_llama33_70b_s42",
    "gsm8k_llama33_70b_s43",
    "agnews_llama33_70b_s42",
    "subj_llama33_70b_s42",
    "subj_qwen25_32b_s42",
)
MEANS_ONLY = ("means_subj_qwen25_32b",)
# Made by benchmarks.record. Nothing in the package was chosen on them.
OWN = ("words_smollm2_135m", "questions_smollm2_135m", "reviews_smollm2_135m")
HERE = Path(__file__).parent / "tables"


@dataclass(frozen=True, eq=False)
class Table:
    """One recorded pool: scores ``P x N`` (or None), true means ``P``, and how prompts are made."""

    name: str
    scores: FloatArray | None
    truth: FloatArray
    instruction_of: IndexArray
    demo_set_of: IndexArray
    instruction_emb: FloatArray
    demo_emb: FloatArray
    demo_sets: IndexArray


@lru_cache(maxsize=8)
def load(name: str) -> Table:
    """Reads a table by name."""
    path = HERE / f"{name}.npz"
    if not path.exists():
        path = Path(str(resources.files("mpromptune.demo") / "data" / f"{name}.npz"))
    with np.load(path) as z:
        arrays = {key: z[key] for key in z.files}
    scores = None
    if "scores" in arrays:
        scores = np.unpackbits(arrays["scores"], axis=1)[:, : int(arrays["n_examples"])].astype(float)
    return Table(
        name=name,
        scores=scores,
        truth=arrays["test_mean"].astype(float) if scores is None else scores.mean(axis=1),
        instruction_of=arrays["instruction_of"].astype(int),
        demo_set_of=arrays["demo_set_of"].astype(int),
        instruction_emb=arrays["instruction_emb"].astype(float),
        demo_emb=arrays["demo_emb"].astype(float),
        demo_sets=arrays["demo_sets"].astype(int),
    )


class Task(Protocol):
    """What a method may know: the configurations, their texts, and scores that it pays for."""

    @property
    def space(self) -> PromptSpace:
        """The configurations."""

    @property
    def baseline(self) -> dict[str, int]:
        """The program as it came."""

    @property
    def n_examples(self) -> int:
        """Size of the validation set."""

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Vectors of texts of the space."""

    def score(self, params: Mapping[str, int], example: int) -> float:
        """One program call."""


@dataclass(frozen=True)
class Problem:
    """A pool of prompts and a validation set drawn from a table.

    Attributes:
        space: The pool, as MIPROv2 would name its components; texts are keys into the table.
        scores: ``size of the space x n_examples``, in the order of ``space.combinations``.
        truth: True mean score of every configuration, same order.
        baseline: A configuration drawn at random.
        vectors: Text key to recorded embedding.
    """

    space: PromptSpace
    scores: FloatArray
    truth: FloatArray
    baseline: dict[str, int]
    vectors: Mapping[str, FloatArray]

    @property
    def n_examples(self) -> int:
        """Size of the validation set."""
        return int(self.scores.shape[1])

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """The recorded embeddings of text keys."""
        return np.stack([self.vectors[text] for text in texts])

    def index(self, params: Mapping[str, int]) -> int:
        """Position of a configuration in the pool."""
        return self._positions()[self.space.row(params)]

    def score(self, params: Mapping[str, int], example: int) -> float:
        """The recorded score of a configuration on a validation example."""
        return float(self.scores[self.index(params), example])

    def regret(self, params: Mapping[str, int]) -> float:
        """Best true mean in the pool minus that of ``params``, in percentage points."""
        return float(100.0 * (self.truth.max() - self.truth[self.index(params)]))

    def exhaustive_regret(self) -> float:
        """Regret of measuring every prompt on every validation example."""
        return float(100.0 * (self.truth.max() - self.truth[self.scores.mean(axis=1).argmax()]))

    def _positions(self) -> dict[Row, int]:
        positions: dict[Row, int] | None = self.__dict__.get("_cached")
        if positions is None:
            assert self.space.combinations is not None
            rows = self.space.combinations.tolist()
            positions = {tuple(row): i for i, row in enumerate(rows)}
            object.__setattr__(self, "_cached", positions)
        return positions


def draw(
    table: Table, seed: int, pool: int = 72, n_val: int = 200, few_shot: bool = False, shuffled: bool = False
) -> Problem:
    """Draws a pool and a validation set.

    Args:
        table: Where from.
        seed: Same seed, same problem.
        pool: Prompts in the pool (all there are, in a smaller table).
        n_val: Validation examples.
        few_shot: Only prompts with at least one demo.
        shuffled: Permute the embedding rows, so that texts say nothing.
    """
    rng = np.random.default_rng(seed)
    chosen = draw_prompts(table, pool, rng, few_shot)
    scores = _validation(table, chosen, n_val, rng)
    space, order = _space(table, chosen)
    baseline = space.params(space.rows()[int(rng.integers(space.size))])
    vectors = _vectors(table, np.random.default_rng(seed + 10**6) if shuffled else None)
    return Problem(space, scores[order], table.truth[chosen][order], baseline, vectors)


def draw_prompts(table: Table, pool: int, rng: np.random.Generator, few_shot: bool = False) -> IndexArray:
    """Numbers of the prompts of a pool, in order."""
    known = np.flatnonzero(np.isfinite(table.truth))
    if few_shot:
        known = known[table.demo_sets[table.demo_set_of[known]].max(axis=1) >= 0]
    return np.sort(rng.choice(known, min(pool, len(known)), replace=False))


def draw_examples(table: Table, n_val: int, rng: np.random.Generator) -> IndexArray:
    """Numbers of the validation examples."""
    assert table.scores is not None
    return rng.choice(table.scores.shape[1], n_val, replace=False)


def _validation(table: Table, chosen: IndexArray, n_val: int, rng: np.random.Generator) -> FloatArray:
    if table.scores is None:  # means only: independent examples with the recorded mean
        return (rng.random((len(chosen), n_val)) < table.truth[chosen, None]).astype(float)
    validation: FloatArray = table.scores[np.ix_(chosen, draw_examples(table, n_val, rng))]
    return validation


def _space(table: Table, chosen: IndexArray) -> tuple[PromptSpace, list[int]]:
    """The pool as components, and the position in ``chosen`` of each combination."""
    instructions, i_of = np.unique(table.instruction_of[chosen], return_inverse=True)
    sets, d_of = np.unique(table.demo_set_of[chosen], return_inverse=True)
    pairs = list(zip(i_of.tolist(), d_of.tolist(), strict=True))
    components: dict[str, Sequence[Any]] = {
        "0_predictor_instruction": [f"i{i}" for i in instructions],
        "0_predictor_demos": [[f"d{j}" for j in table.demo_sets[s] if j >= 0] for s in sets],
    }
    space = PromptSpace(components, combinations=pairs)
    position = {pair: p for p, pair in enumerate(pairs)}
    return space, [position[tuple(row)] for row in space.rows().tolist()]


def _vectors(table: Table, rng: np.random.Generator | None) -> dict[str, FloatArray]:
    named = {"i": table.instruction_emb, "d": table.demo_emb}
    if rng is not None:
        named = {kind: rng.permutation(rows) for kind, rows in named.items()}
    return {f"{kind}{k}": row for kind, rows in named.items() for k, row in enumerate(rows)}
