"""Runs the command line: `python -m elbowroom`."""

from elbowroom.cli import main

main()
