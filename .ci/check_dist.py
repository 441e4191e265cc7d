"""Checks a built wheel and sdist: ``python .ci/check_dist.py dist``.

The wheel is installed alone into an empty environment, which finds what it requires in the environment of
this interpreter, and used there from another folder. A wheel built from the source tree must equal the one
that was built from the sdist.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (
    "examples/rag.py",
    "examples/data/library.json",
    "tests/conftest.py",
    "docs/conf.py",
    "CHANGELOG.md",
    ".github/ISSUE_TEMPLATE/bug.yml",
)
INSTALLED = """
from importlib.metadata import version
from importlib.resources import files
import mpromptune, sys
from mpromptune import MIPROv2, PromptSpace, qEISampler, search

package = files("mpromptune")
assert str(package).startswith(sys.prefix), f"{package} is not the installed wheel"
assert mpromptune.__version__ == version("m-promptune")
for name in "py.typed", "show/page.html", "demo/data/words.json", "demo/data/gsm8k_llama33_70b_s43.npz":
    assert (package / name).is_file(), f"the wheel lacks {name}"
"""


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_contents(wheel: Path, sdist: Path, folder: Path) -> None:
    """Nothing but the package is in the wheel, the sources are in the sdist, and both give the same wheel."""
    files = contents(wheel)
    strangers = {name for name in files if not name.startswith(("mpromptune/", "m_promptune-"))}
    assert not strangers, f"the wheel has {strangers}"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*SOURCES}, f"the sdist lacks {sorted({*SOURCES} - names)}"
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert contents(folder / wheel.name) == files, "the wheels of the source tree and of the sdist differ"


def check_installed(wheel: Path, folder: Path) -> None:
    """The installed wheel is complete, and its commands work."""
    environment = folder / "venv"
    venv.create(environment)
    own = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # Of a folder named in a .pth file no other .pth file is read: an editable installation there is not seen.
    Path(own, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = str(environment / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    for command in (
        (*pip, str(wheel.absolute())),
        (python, "-c", INSTALLED),
        (python, "-m", "mpromptune", "--help"),
        (str(environment / "bin" / "mpromptune"), "demo", "--replay", "--latency", "0", "--calls", "800"),
    ):
        subprocess.run(command, check=True, cwd=folder, env=variables, stdout=subprocess.DEVNULL)


def main() -> None:
    """Command line."""
    (wheel,), (sdist,) = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        check_contents(wheel, sdist, Path(folder))
        check_installed(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} are complete.")


if __name__ == "__main__":
    main()
