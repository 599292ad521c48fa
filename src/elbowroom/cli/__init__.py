"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an interruption while it is being imported is said in one line, too."""
    try:
        from elbowroom.cli import app
    except KeyboardInterrupt:
        print("elbowroom: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    app.main(arguments)
