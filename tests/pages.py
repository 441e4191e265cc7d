"""The pages of the documentation, the README among them: their text, and their Python blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FILES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_tables" not in path.parts)]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]


def python_blocks(page: str) -> list[str]:
    """The Python code of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


# Each begins with the import of a tool that need not be installed, and stands for itself.
TOOLS = {block.split()[1]: block for block in python_blocks("docs/guides/tools.md")}


def run(page: str, code: str, names: dict[str, Any]) -> None:
    """Run what a page shows, as it is printed."""
    exec(compile(code, page, "exec"), names)


def run_tool(tool: str, names: dict[str, Any]) -> Any:
    """Run what is shown of another tool; return the program compiled."""
    run(f"docs/guides/tools.md, {tool}", TOOLS[tool], names)
    return names["best"]
