"""What the benchmarks share: options, contestants timed in turn, medians with ranges, the machine, fresh processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parents[1]
T = TypeVar("T")

# -- the command line -------------------------------------------------------------------------------------------------------


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every part of `python -m benchmarks` takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}".removesuffix("."), description=description)
    parser.add_argument("--quick", action=_Quick, help="small sizes show that everything runs; RESULTS.md stays as it is")
    parser.add_argument("--ours", action="store_true", help="without the peers' packages (.venv will do)")
    parser.add_argument("--print", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument("--threads", type=int, default=2, help="cores that everyone may use")
    return parser


class _Quick(argparse.Action):
    """A switch that throws `--print` too: figures of a quick look are none to keep."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        namespace.quick = namespace.print = True


def use(threads: int) -> None:
    """Hold this process, and the thread pools that it will start, to so many cores."""
    if hasattr(os, "sched_setaffinity"):  # jax's pool has a thread per core that it sees
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


# -- seconds ----------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """Time one call, which has to wait for its device itself."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(contestants: Sequence[Callable[[int], T]], repeats: int) -> list[list[T]]:
    """Call contestant(repeat) one after the other, `repeats` rounds of it: a machine that slows down slows all."""
    found: list[list[T]] = [[] for _ in contestants]
    for repeat in range(repeats):
        for contestant, results in zip(contestants, found, strict=True):
            results.append(contestant(repeat))
    return found


def span(values: Sequence[float], form: str = ".3g") -> str:
    """Return `median (least .. largest)`, or the value alone where there is one."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} .. {max(values):{form}})"


def ratio(ours: Sequence[float], theirs: Sequence[float], form: str = ".2f") -> str:
    """Return the median of the ratios of the rounds, ours over theirs, with their range."""
    return span([a / b for a, b in zip(ours, theirs, strict=True)], form)


# -- memory and processes ---------------------------------------------------------------------------------------------------


def peak() -> float:
    """Return the largest resident memory of this process so far, or since `forget_peak`, in MiB (Linux)."""
    # not getrusage's: a child inherits its parent's peak there
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    """Let the peak start anew from what is resident now, where Linux lets a process do so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def fresh(module: str, *words: object) -> dict[str, Any]:
    """Run `python -m benchmarks.MODULE WORDS` in a process of its own; return the JSON object of its last line."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(out.stdout.splitlines()[-1])


TURN = "== turn "  # begins the line by which a worker ends its turn


class Worker:
    """`python -m benchmarks.MODULE WORDS` in a process of its own, which works when it is its turn and else waits."""

    def __init__(self, module: str, *words: object) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def turn(self) -> str:
        """Let it work until its turn ends; returns what it says then.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(TURN):
                return line.removeprefix(TURN).strip()
        raise RuntimeError(f"{self.process.args} ended before its turn did")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def end_turn(said: object) -> None:
    """Say something to the parent, and wait for the next turn; there is none after the last one."""
    print(f"{TURN}{said}", file=sys.__stdout__, flush=True)  # trainers may keep sys.stdout quiet
    await_turn()


def await_turn() -> None:
    """Wait until the parent gives a turn."""
    sys.stdin.readline()


# -- what a section says first ----------------------------------------------------------------------------------------------


def processor() -> str:
    """Return the processor's own name (Linux), else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def circumstances(args: argparse.Namespace, packages: Sequence[str], command: str) -> list[str]:
    """Return the lines that say where, with what, when and how a section was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"{processor()}, {args.threads} cores used, Python {platform.python_version()}, {versions}"
    lines = [
        f"{machine}; {datetime.now(UTC):%Y-%m-%d}.",
        f"`{command}`, one run.",
    ]
    if args.quick:
        lines.append("**A quick look (`--quick`): sizes and repeats too small for its figures to mean anything.**")
    return lines


def paragraph(text: str) -> list[str]:
    """Return a text in lines of the width that the file has."""
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a markdown table.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells for {len(columns)} columns: {row}")
    return [_line(columns), "|" + "---|" * len(columns), *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
