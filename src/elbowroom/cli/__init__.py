"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; what cannot even be imported, and an interruption meanwhile, is said in one line."""
    try:
        from elbowroom.cli import app
    except KeyboardInterrupt:
        print("elbowroom: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from elbowroom.parts import trouble

        broken = trouble(error)
        if broken is None:
            raise
        print(f"elbowroom: {broken}", file=sys.stderr)
        sys.exit(2)
    app.main(arguments)
