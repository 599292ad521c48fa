"""The clock of an audit: its progress, the time left, and how long each piece of work may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from elbowroom.analysis.audit.plan import Plan

TOLERANCE = 0.8  # share of an estimate: with less time, work that cannot be interrupted is not started


class Progress(str):
    """The argument of `progress`: a few words on the current work, as a string with attributes.

    Attributes:
        done: share of the work that is done, 0 to 1.
        seconds_left: estimated seconds to the end.
        plan: what the audit does.
    """

    done: float
    seconds_left: float
    plan: Plan

    @classmethod
    def of(cls, text: str, pace: Clock) -> Progress:
        """Return a step at the present time."""
        step = cls(text)
        step.done, step.seconds_left, step.plan = pace.done, pace.seconds_left, pace.plan
        return step


@dataclass
class _Piece:
    """A method's data per block to come, whether it is left out of the present block, and the error of its estimates so far."""

    blocks: list[int]
    dropped: bool = False
    estimated: float = 0.0
    took: float = 0.0

    @property
    def factor(self) -> float:
        return self.took / self.estimated if self.estimated > 0 else 1.0


class Clock:
    """Shares the time of a block of data among the methods, and learns from each block what the next will take.

    Blocks are drawn at random, and one after the other is done whole: a method may use all the time that the methods after it
    do not need. Where the time is too short for all, it is shared in proportion; a method that could not even begin with its
    share is left out.

    Args:
        plan: the plan of the audit.
        sizes: data in each block; none where `begin` draws them one after the other.
        deadline: value of `clock()` at which the budget ends; infinity for no budget.
        clock: returns the time in seconds.
    """

    def __init__(
        self, plan: Plan, sizes: list[int], deadline: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.deadline, self.clock = plan, deadline, clock
        self.costs = {"": plan.guide, **dict(zip(plan.names, plan.costs, strict=True))}
        self.pieces = {name: _Piece(list(sizes)) for name in self.costs}
        self.started = clock()
        self.total = max(self._left(), 1e-9)

    def begin(self, n: int) -> None:
        """Make a block of n data the next one, the only one that is known."""
        for piece in self.pieces.values():
            piece.blocks = [n]

    def seconds(self, n: int) -> float:
        """Estimated seconds of a block of n data, by the guide and all methods."""
        return sum(cost.of(n) * self.pieces[name].factor for name, cost in self.costs.items())

    def fitting(self, seconds: float) -> int:
        """Return how many data a block of so many seconds has; 0 where not even one fits."""
        fixed = self.seconds(0)
        return max(0, int((seconds - fixed) / max(self.seconds(1) - fixed, 1e-12)))

    @property
    def seconds_left(self) -> float:
        """Estimated seconds to the end, at most those left of the budget."""
        left = self.deadline - self.clock()
        return max(0.0, left if self.plan.sampling else min(self._left(), left))

    @property
    def done(self) -> float:
        """Share of the work that is done, by its estimated time; of the budget, where that ends the work."""
        if self.plan.sampling:
            return min(1.0, (self.clock() - self.started) / max(self.deadline - self.started, 1e-9))
        return min(1.0, 1.0 - sum(self._estimate(name) for name in self.pieces) / self.total)

    def until(self, name: str) -> float | None:
        """Return when a method must end with the present block; None where the time is too short to start it."""
        if math.isinf(self.deadline):
            return math.inf
        now, later = self.clock(), self.plan.names[self.plan.names.index(name) :]
        if name == later[0] == self.plan.names[0]:
            self._drop()
        if self.pieces[name].dropped or now >= self.deadline:
            return None
        free, mine = self.deadline - now, self._next(name)
        rest = sum(self._next(other) for other in later[1:] if not self.pieces[other].dropped)
        share = free - rest if mine + rest <= free else free * mine / max(mine + rest, 1e-12)
        return None if share < self._least(name) else now + share

    def _drop(self) -> None:
        """Drop methods, worst first, whose part of the time left is too short for the present block: others can use it."""
        free = self.deadline - self.clock()
        active = list(self.plan.names)
        while active:
            share = min(1.0, free / max(sum(self._next(name) for name in active), 1e-12))
            hopeless = [name for name in active if share * self._next(name) < self._least(name)]
            if not hopeless:
                break
            active.remove(hopeless[-1])
        for name in self.plan.names:
            self.pieces[name].dropped = name not in active

    def _next(self, name: str) -> float:
        """Return the estimated seconds of a method's next block."""
        piece = self.pieces[name]
        return self.costs[name].of(piece.blocks[0]) * piece.factor if piece.blocks else 0.0

    def _least(self, name: str) -> float:
        """Return the seconds below which the next block of a method is not started."""
        return TOLERANCE * self.costs[name].least * self._next(name)

    def spare(self, began: float) -> float | None:
        """Return when methods for left-over data must end, of a block that began at `began`; None without time.

        They may take as long again as the block has taken so far, and half of what all others do not need.
        """
        if math.isinf(self.deadline):
            return math.inf
        now = self.clock()
        free = self.deadline - now
        rest = 0.0 if self.plan.sampling else self._left()
        return now + min(free, max(now - began, (free - rest) / 2)) if free > 0 else None

    def finished(self, name: str, took: float, *, whole: bool) -> None:
        """Remove the next block of a method (empty for the guide) from the list.

        `took` are its seconds, 0 where it was left out; `whole` says that it ran to its end, so that its time corrects the
        estimates.
        """
        piece = self.pieces[name]
        n = piece.blocks.pop(0)
        if whole:
            piece.estimated += self.costs[name].of(n)
            piece.took += took

    def also(self, name: str, took: float) -> None:
        """Add seconds of later shared work to a method's time, since its estimates include them."""
        if self.pieces[name].estimated > 0:
            self.pieces[name].took += took

    def _estimate(self, name: str) -> float:
        return sum(self.costs[name].of(n) for n in self.pieces[name].blocks)

    def _left(self) -> float:
        return sum(self._estimate(name) * piece.factor for name, piece in self.pieces.items())


PLANNED = "plan"
"""The first step of an audit."""
