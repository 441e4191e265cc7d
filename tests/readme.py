"""The README's examples, and what they call the reader's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from embedders import hashed

from mpromptune import MIPROv2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# These begin with the import of a tool that need not be installed.
TOOLS = {
    block.split()[1]: block
    for block in PYTHON
    if block.startswith(("import mlflow", "import wandb", "from optuna_dashboard"))
}
BLOCKS = [block for block in PYTHON if block not in TOOLS.values()]


def run_block(tool: str, names: dict[str, Any]) -> Any:
    """Runs what the README shows of another tool, as it is printed; returns the program compiled."""
    settings = {"auto": "light", "num_threads": 4, "embedder": hashed, "max_calls": 60}
    names = {**names, "optimizer": MIPROv2(metric=names["metric"], **settings)}
    exec(compile(TOOLS[tool], f"README.md, {tool}", "exec"), names)
    return names["best"]
