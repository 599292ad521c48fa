"""`python -m elbowroom` is the command line."""

from elbowroom.cli import main

main()
