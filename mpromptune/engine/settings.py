"""The settings of a search: the arguments that its trials depend on; a study of other settings is refused."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.study import Study

from mpromptune import __version__
from mpromptune.engine.growth import Growth
from mpromptune.engine.plan import Plan, Task
from mpromptune.errors import StudyMismatchError
from mpromptune.model.space import PromptSpace
from mpromptune.sampling.encoding import Encoding
from mpromptune.storage.attributes import GEOMETRY, N_EXAMPLES, SETTINGS
from mpromptune.storage.damage import named, readable

logger = logging.getLogger(__name__)

Settings = dict[str, Any]

# NOTE: distances are divided by their median. On that scale, the same model on another machine differs by
# 1e-6, another model by 0.1 or more.
_TOLERANCE = 1e-2


def settings_of(space: PromptSpace, task: Task, schedule: str, plan: Plan, growth: Growth) -> Settings:
    """The settings of a search, with hashes instead of texts."""
    arguments = {
        "n_examples": task.n_examples,
        "baseline": space.params(task.baseline),
        "seed": task.seed,
        "schedule": schedule,
        **plan.arguments,
        **({"proposers": sorted(growth.proposers)} if growth.proposers else {}),
    }
    listed = None if space.combinations is None else _sha256(space.combinations.tolist())
    candidates = {name: [len(texts), _sha256(texts)] for name, texts in space.components.items()}
    return {
        "version": __version__,
        "components": list(space.names),
        "candidates": candidates,
        "arguments": {**arguments, "combinations": listed},
        "batch_size": plan.batch_size,
        "batches_in_flight": plan.batches_in_flight,
        **({"capacity": dict(growth.capacity), "gains": dict(growth.gains)} if growth.proposers else {}),
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def recorded_settings(study: Study) -> Settings:
    """The settings of the search that a study belongs to; empty for a study without trials."""
    settings = study.user_attrs.get(SETTINGS)
    return dict(settings) if settings and study.get_trials(deepcopy=False) else {}


def require_same(study: Study, before: Settings, now: Settings) -> None:
    """Require that the settings of a study have not changed.

    Raises:
        StudyMismatchError: They have; the message lists the old and new values.
    """
    if not before:
        return
    changes = _changed_candidates(before, now)
    without: Settings = {"proposers": []}  # a search without any has no such setting
    then, current = ({**without, **settings["arguments"]} for settings in (before, now))
    for name, value in current.items():
        if (old := then.get(name, value)) != value:
            changes.append(_change(name, old, value))
    if changes:
        raise StudyMismatchError(
            f"The study {study.study_name!r} belongs to a search with other arguments: {'; '.join(changes)}. "
            "Pass the same arguments as before to continue it, or another study_name or storage to start a "
            "new search. No call was made."
        )


def _changed_candidates(before: Settings, now: Settings) -> list[str]:
    if before.get("components") != now["components"]:
        return [_change("the components", before.get("components"), now["components"])]
    changes = []
    for name, (count, digest) in now["candidates"].items():
        old_count, old_digest = before["candidates"][name]
        if old_count != count:
            changes.append(_change(f"the number of candidates of {name!r}", old_count, count))
        elif old_digest != digest:
            changes.append(f"the texts of the candidates of {name!r} have changed")
    return changes


def _change(what: str, before: Any, now: Any) -> str:
    if what == "combinations":
        return "the combinations that exist have changed"
    verb = "were" if what in ("the components", "proposers") else "was"
    return f"{what} {verb} {before!r} and now {now!r}"


def write_settings(study: Study, settings: Settings, encoding: Encoding) -> None:
    """Save the settings and the distances between candidates in the study.

    Raises:
        StorageError: The distances saved in the study are damaged.
    """
    with readable(f"What {named(study)} says of its candidates"):
        _compare_geometry(study, encoding)
    if settings != study.user_attrs.get(SETTINGS):
        study.set_user_attr(N_EXAMPLES, settings["arguments"]["n_examples"])
        study.set_user_attr(SETTINGS, settings)


def _compare_geometry(study: Study, encoding: Encoding) -> None:
    """Warn if the embedder gives other distances between candidates than in the earlier run.

    The scores are still valid, so the study is not refused, but further trials will differ from those of an
    uninterrupted search.
    """
    now = _geometry(encoding)
    before = study.user_attrs.get(GEOMETRY)
    if now is None or (before is not None and _is_close(before, now)):
        return
    if before is not None:
        logger.warning(
            "The embedder gives other vectors than in the earlier run of study %r. The scores are still "
            "valid, but further trials will differ from those of an uninterrupted search.",
            study.study_name,
        )
    study.set_user_attr(GEOMETRY, now)


def _geometry(encoding: Encoding) -> dict[str, list[list[float]]] | None:
    """Mean distance of each candidate to the others, by component and view; None without texts."""
    found = {
        name: [[round(float(d), 4) for d in view.mean(dim=1)] for view in geometry.views]
        for name, geometry in zip(encoding.names, encoding.geometries, strict=True)
    }
    return found if any(found.values()) else None


def _is_close(before: Mapping[str, Any], now: Mapping[str, list[list[float]]]) -> bool:
    if {name: np.shape(views) for name, views in before.items()} != {n: np.shape(v) for n, v in now.items()}:
        return False
    return all(np.allclose(before[name], views, atol=_TOLERANCE) for name, views in now.items())
