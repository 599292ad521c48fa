"""Pyro programs as people write them, each audited: `python -m examples.programs` writes docs/programs.md."""
