"""A file with what earlier searches have learned about proposers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mpromptune.errors import InvalidArgumentError
from mpromptune.model.space import Gain

PathLike = str | os.PathLike[str]


def read_gains(path: PathLike) -> dict[str, Gain]:
    """The mean gain of the children of each proposer, in logits, by its name; nothing if there is no file.

    Raises:
        InvalidArgumentError: The file is not what `write_gains` writes, or its folder does not exist.
    """
    if not Path(path).parent.is_dir():
        raise InvalidArgumentError(
            f"gains_file={os.fspath(path)!r} is in a folder that does not exist. Create the folder, or pass "
            "another path."
        )
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        gains = {name: Gain(float(one["mean"]), float(one["deviation"])) for name, one in entries.items()}
        if not all(math.isfinite(gain.mean) and 0 < gain.deviation < math.inf for gain in gains.values()):
            raise ValueError("a number is out of range")
    except FileNotFoundError:
        return {}
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        raise InvalidArgumentError(
            f"gains_file={os.fspath(path)!r} cannot be read ({type(error).__name__}: {error}). Pass another "
            "path, or delete the file to begin with nothing learned."
        ) from error
    return gains


def write_gains(path: PathLike, gains: Mapping[str, Gain]) -> None:
    """Write the file, or replace it as a whole."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    text = json.dumps({name: gain._asdict() for name, gain in sorted(gains.items())}, indent=1)
    temporary.write_text(f"{text}\n", encoding="utf-8")
    temporary.replace(target)
