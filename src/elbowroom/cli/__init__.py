"""The command line."""

from elbowroom.cli.app import main

__all__ = ["main"]
