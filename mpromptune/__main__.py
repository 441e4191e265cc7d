"""``python -m mpromptune``: the same as the ``mpromptune`` command."""

from __future__ import annotations

import sys

from mpromptune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
