"""Named stages of a computation, which are timed only while a profile is on (see `profiling`).

    from elbowroom.system.stages import stage

    with stage("compile"):
        ...

    @stage("survey")
    def survey(...): ...

Stages nest: their names form a tree. Stages of equal name in the same place are counted together. While no profile is on, a
stage only reads one context variable. Compiled functions must not contain stages. Only the thread that profiles is recorded.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RARELY = 5e-3  # seconds between reads of the memory, each of which takes some 30 microseconds
UNNAMED = "(unattributed)"


class stage(ContextDecorator):
    """A part of a computation that a profile counts and times: a context manager, or a decorator of a function.

    Args:
        name: name of the stage.
        often: the stage comes in thousands: it does not wait for the GPU, and torch's profiler may record some of its calls.
    """

    def __init__(self, name: str, *, often: bool = False) -> None:
        self.name, self.often = name, often

    def __enter__(self) -> None:
        self._on = on = _on.get()
        if on is not None:
            self._frame = on.enter(self.name, self.often)

    def __exit__(self, *error: object) -> None:
        if self._on is not None:
            self._on.leave(self._frame)

    def _recreate_cm(self) -> stage:
        """Return a new stage for each call, since a decorated function may call itself."""
        return stage(self.name, often=self.often)


@dataclass(eq=False)
class Node:
    """The totals of a stage at one place in the tree, over all its calls.

    Attributes:
        name: name of the stage.
        calls: number of calls.
        wall: seconds.
        cpu: seconds of processor time, over all threads of this process.
        memory: peak resident bytes of the process up to the end of the last call.
        raised: increase of that peak during its calls.
        children: the stages inside it.
    """

    name: str
    calls: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    raised: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def rest(self) -> Node:
        """Return the time and memory that belong to none of its children."""
        wall = self.wall - sum(child.wall for child in self.children.values())
        cpu = self.cpu - sum(child.cpu for child in self.children.values())
        raised = self.raised - sum(child.raised for child in self.children.values())
        return Node(UNNAMED, 0, max(0.0, wall), max(0.0, cpu), self.memory, max(0, raised))

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """Yield (depth, stage) for this stage and all inside it; unattributed time comes last."""
        yield depth, self
        for child in self.children.values():
            yield from child.walk(depth + 1)
        if self.children:
            yield depth + 1, self.rest()


@dataclass(eq=False)
class _Frame:
    """A stage that has begun and not ended."""

    node: Node
    often: bool
    wall: float
    cpu: float
    memory: int


class Stages:
    """The tree of stages while it grows.

    Args:
        name: name of the root.
        wall: returns the time, seconds.
        cpu: returns the processor time of the process, seconds.
        memory: returns the peak resident bytes.
    """

    def __init__(
        self,
        name: str,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
        memory: Callable[[], int] | None = None,
    ) -> None:
        self._wall, self._cpu, self._memory = wall, cpu, memory or peak_memory
        self.root = Node(name)
        self._open: list[_Frame] = []
        self._looked, self._peak = -math.inf, 0
        self.output: Path | None = None
        self.watch: Any = None  # is called at the begin and end of frequent stages, where operators are profiled
        self._frame = self._begin(self.root)

    def enter(self, name: str, often: bool = False) -> _Frame:
        """Begin a stage inside the open one; return the frame for `leave`."""
        inside = self._open[-1].node.children if self._open else self.root.children
        if (node := inside.get(name)) is None:
            node = inside[name] = Node(name)
        if not often:
            _wait_for_gpu()
        elif self.watch is not None:
            self.watch.begin(" / ".join([*(frame.node.name for frame in self._open[1:]), name]))
        frame = self._begin(node, often)
        if often and self.watch is not None:
            self.watch.begun(frame)
        return frame

    def leave(self, frame: _Frame) -> None:
        """End a stage and all open stages inside it; a stage that has ended already is ignored."""
        if frame not in self._open:
            return
        if not frame.often:
            _wait_for_gpu()
        wall, cpu = self._wall(), self._cpu()
        while True:
            last = self._open.pop()
            node = last.node
            node.calls += 1
            node.wall += wall - last.wall
            node.cpu += cpu - last.cpu
            node.memory = self._look(wall)
            node.raised += node.memory - last.memory
            if last.often and self.watch is not None:
                self.watch.end(last)
            if last is frame:
                return

    def close(self) -> Node:
        """End the root and return it."""
        self._looked = -math.inf
        self.leave(self._frame)
        return self.root

    def _begin(self, node: Node, often: bool = False) -> _Frame:
        memory = self._look(self._wall())
        frame = _Frame(node, often, self._wall(), self._cpu(), memory)
        self._open.append(frame)
        return frame

    def _look(self, now: float) -> int:
        """Return the peak memory, at most `RARELY` seconds old."""
        if now - self._looked >= RARELY:
            self._looked, self._peak = now, self._memory()
        return self._peak


_on: ContextVar[Stages | None] = ContextVar("elbowroom_profile", default=None)


def current() -> Stages | None:
    """Return the profile that is on, or None."""
    return _on.get()


def switch(on: Stages) -> Token[Stages | None]:
    """Turn a profile on; return the token for `reset`."""
    return _on.set(on)


def reset(token: Token[Stages | None]) -> None:
    """Turn the profile off."""
    _on.reset(token)


def into(folder: Path) -> None:
    """Set the output folder, where the profile may go too; only the first call counts."""
    on = _on.get()
    if on is not None and on.output is None:
        on.output = folder


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 where the system does not report it."""
    try:  # unlike getrusage, this does not include the parent process
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait_for_gpu() -> None:
    """Wait until the GPU has finished, so that its time is counted in the stage that started the work."""
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized() and not cuda.is_current_stream_capturing():
        cuda.synchronize()
