"""Profiles of where the time goes: `--profile`, and `elbowroom.profile` in Python.

    with er.profile("runs/digits/profile") as profile:
        er.fit("digits.yaml").audit()
    print(profile)

Time is measured at each `with stage("name")` in the code (see `stages`), which costs a few microseconds, so that the seconds
are those of an unprofiled run. Times of single functions and operators cost time to measure: Python's `cProfile` and torch's
profiler run only for `functions=True`, and the files then say so.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbowroom.errors import UserError
from elbowroom.system import stages
from elbowroom.system.archive import amount
from elbowroom.system.durations import words
from elbowroom.system.files import atomic, refuse_link, write_text
from elbowroom.system.stages import UNNAMED, Node, Stages, stage

FOLDER = "profile"
TABLE, LINES, PROGRAM, FUNCTIONS, OPERATORS = "stages.txt", "stages.csv", "profile.prof", "functions.txt", "operators.txt"
FILES = (TABLE, LINES, FUNCTIONS, OPERATORS, PROGRAM)
HEAD = ("stage", "calls", "seconds", "share", "cores", "peak", "raised")
SHOWN, SHOWN_REST = 0.01, 0.005  # least share of the total time for a line on the terminal: of a stage, of unattributed time
TOP = 40  # functions
LOOKS, TOP_OPERATORS = (1, 4), 20  # numbers of the calls that torch's profiler records, and operators shown of each
MOST = 10.0  # seconds in torch's profiler, after which it records no more
OVERHEAD = (
    "Taken with cProfile on, which slows Python code and not torch's operators: the seconds include that. Those of the table "
    "without it are the true ones."
)


@dataclass(eq=False)
class Profile:
    """Result of a profile: print it, or read `root`.

    Attributes:
        root: the tree of stages, complete when the context has ended.
        folder: the folder of the files; None where none were written.
        ended: why the profile ended early; empty where it did not.
        files: names of the files.
        functions: whether cProfile was on.
    """

    root: Node
    folder: Path | None = None
    files: Sequence[str] = ()
    ended: str = ""
    functions: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per stage, with its place in the tree, in the order of first calls: the rows of `stages.csv`."""
        found: list[dict[str, Any]] = []
        path: list[str] = []
        for depth, node in self.root.walk():
            path = [*path[:depth], node.name]
            found.append(
                {
                    "stage": " / ".join(path),
                    "depth": depth,
                    "calls": node.calls or "",
                    "wall_seconds": round(node.wall, 6),
                    "share": round(self._share(node), 6),
                    "cpu_seconds": round(node.cpu, 6),
                    "cpu_per_wall": round(node.cpu / node.wall, 3) if node.wall else "",
                    "peak_memory_bytes": node.memory,
                    "peak_raised_bytes": node.raised,
                }
            )
        return found

    def __str__(self) -> str:
        root = self.root
        said = (
            f"{root.name}: {words(root.wall)}, {_cores(root)} cores busy of {os.cpu_count()}, peak memory {amount(root.memory)}"
        )
        lines = [said + _gpu() + (f"; ended early by {self.ended}" if self.ended else "")]
        table = [HEAD, *(self._cells(name, node) for name, node in self._shown(root, 0))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *cells in table:
            right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        lines.append("cores: processor time over time; peak: most memory of the process until then; raised: by the stage")
        return "\n".join([*lines, *([OVERHEAD] if self.functions else [])])

    def _cells(self, name: str, node: Node) -> tuple[str, ...]:
        return (
            name,
            f"{node.calls:,}" if node.calls else "",
            f"{node.wall:.2f}",
            f"{self._share(node):.1%}",
            _cores(node),
            amount(node.memory) if node.memory and node.calls else "",
            amount(node.raised) if node.raised >= 1e6 else "",
        )

    def _share(self, node: Node) -> float:
        return node.wall / self.root.wall if self.root.wall else 0.0

    def _shown(self, node: Node, depth: int) -> Iterator[tuple[str, Node]]:
        """Yield the printed stages; short stages share one line, unattributed time has its own."""
        yield "  " * depth + node.name, node
        if not node.children:
            return
        short = [child for child in node.children.values() if self._share(child) < SHOWN]
        long = [child for child in node.children.values() if child not in short]
        for child in long:
            yield from self._shown(child, depth + 1)
        if short and self._share(total := _sum(short)) >= SHOWN_REST:
            yield "  " * (depth + 1) + total.name, total
        rest = node.rest()
        if depth == 0 or self._share(rest) >= SHOWN_REST:
            yield "  " * (depth + 1) + UNNAMED, rest


@contextmanager
def profile(folder: str | Path | None = None, *, functions: bool = False, command: str | None = None) -> Iterator[Profile]:
    """Measure where the time goes while the context is open; write the profile when it ends, also after an exception.

    The results of the program do not change. On a GPU each stage waits for the work that it started, which can cost some speed;
    training steps and gradients, which come in thousands, do not wait.

    Args:
        folder: folder for `stages.csv` and `stages.txt` (the tree of stages: calls, seconds, share, processor time, peak
            memory); files of an earlier profile are replaced. None writes nothing.
        functions: also write `profile.prof` (for pstats or snakeviz) and `functions.txt`, by Python's cProfile, and
            `operators.txt`, by torch's profiler over a few training steps and gradients. This slows Python code.
        command: name of the command of the command line. If no folder is given, the files go to `profile/<command>` in the
            output folder.

    Yields:
        The profile, to print once the context has ended.

    Raises:
        UserError: a profile is already on, or another tool profiles this process.
    """
    if stages.current() is not None:
        raise UserError("profile: one is on already; they do not nest")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"{folder}: this is a file; name a folder for the profile")
    counter = _counter() if functions else None
    tree = Stages("profile" if command is None else f"elbowroom {command}")
    found = Profile(tree.root, functions=functions)
    watch = tree.watch = _Operators(counter) if functions else None
    token = stages.switch(tree)
    try:
        yield found
    except BaseException as error:
        found.ended = type(error).__name__
        _end(tree, counter)
        found.folder = _place(folder, command, tree)
        with suppress(OSError):  # report the first error, not this one
            _write(found, counter, watch)
        raise
    else:
        _end(tree, counter)
        found.folder = _place(folder, command, tree)
        _write(found, counter, watch)
    finally:
        stages.reset(token)


def _counter() -> Any:
    import cProfile

    if sys.getprofile() is not None:
        raise UserError("profile: another tool profiles this process; use functions=False (--profile)")
    counter = cProfile.Profile()
    try:
        counter.enable()
    except ValueError:  # from Python 3.12 on
        raise UserError("profile: another tool profiles this process; use functions=False (--profile)") from None
    return counter


def _end(tree: Stages, counter: Any) -> None:
    tree.close()
    if counter is not None:
        counter.disable()


def _place(folder: str | Path | None, command: str | None, tree: Stages) -> Path | None:
    if folder is not None:
        return Path(folder)
    if command is None or tree.output is None:
        return None
    refuse_link(tree.output / FOLDER)
    refuse_link(tree.output / FOLDER / command)
    return tree.output / FOLDER / command


def _write(found: Profile, counter: Any, watch: _Operators | None) -> None:
    """Write the files, each atomically, after those of an earlier profile are removed."""
    folder = found.folder
    if folder is None:
        return
    for old in FILES:
        (folder / old).unlink(missing_ok=True)
    rows = found.rows()
    with atomic(folder / LINES) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if counter is not None:
        with atomic(folder / PROGRAM) as temporary:
            counter.dump_stats(temporary)
        write_text(folder / FUNCTIONS, _functions(counter))
    if watch is not None and watch.found:
        write_text(folder / OPERATORS, "\n".join(watch.found.values()))
    write_text(folder / TABLE, f"{found}\n")
    found.files = [name for name in FILES if (folder / name).exists()]


def _functions(counter: Any) -> str:
    """Return the slowest functions as text, by own time and by cumulative time."""
    import pstats

    parts = [f"{OVERHEAD}\nMore: python -m pstats {PROGRAM}, or snakeviz {PROGRAM}.\n"]
    for key, said in (("tottime", "by own time"), ("cumulative", "by time with all that they call")):
        text = io.StringIO()
        pstats.Stats(counter, stream=text).sort_stats(key).print_stats(TOP)
        parts.append(f"== {said} ==\n{text.getvalue().strip()}\n")
    return "\n".join(parts)


class _Operators:
    """Runs torch's profiler on two calls of each frequent stage, so that memory and time stay bounded.

    The first call is recorded because it may be the only one. The fourth replaces it: it no longer allocates or compiles.
    """

    def __init__(self, counter: Any) -> None:
        self.found: dict[str, str] = {}
        self._counter = counter
        self._calls: Counter[str] = Counter()
        self._spent = 0.0
        self._asked: Any = None
        self._frame: object = None
        self._path = ""

    def begin(self, path: str) -> None:
        """Count a call of a stage; start the profiler for some calls."""
        self._calls[path] += 1
        if self._asked is not None or self._calls[path] not in LOOKS or self._spent > MOST:
            return
        with stage("torch's profiler"), self._counted():
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps its messages on start and stop off stderr
            from torch import profiler

            self._asked, self._path, self._frame = profiler.profile(), path, None
            self._asked.start()

    def begun(self, frame: object) -> None:
        """Remember the frame of the recorded call."""
        if self._frame is None:
            self._frame = frame

    def end(self, frame: object) -> None:
        """Stop the profiler, and keep the table of operators."""
        if self._asked is None or frame is not self._frame:
            return
        asked, self._asked = self._asked, None
        with stage("torch's profiler"), self._counted():
            import torch

            asked.stop()
            key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = asked.key_averages().table(sort_by=key, row_limit=TOP_OPERATORS, max_name_column_width=60)
        self.found[self._path] = f"== {self._path}: call {self._calls[self._path]} ==\n{table}"

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.perf_counter()
        self._counter.disable()  # do not count the profiler's own functions
        try:
            yield
        finally:
            self._counter.enable()
            self._spent += time.perf_counter() - began


def _sum(nodes: list[Node]) -> Node:
    total = Node(f"({len(nodes)} shorter)" if len(nodes) > 1 else nodes[0].name)
    for node in nodes:
        total.calls += node.calls
        total.wall += node.wall
        total.cpu += node.cpu
        total.memory = max(total.memory, node.memory)
        total.raised += node.raised
    return total


def _cores(node: Node) -> str:
    return f"{node.cpu / node.wall:.1f}" if node.wall > 0 else ""


def _gpu() -> str:
    """Return a phrase with the peak memory of the GPU, empty where none was used."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return ""
    return f", of the GPU's {amount(cuda.max_memory_allocated())}"
