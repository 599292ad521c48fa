"""The clock of an audit: its progress, the time left, and the share of a budget for each piece of work."""

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
    """A method's remaining work: data per block to come, seconds it may spend, and the error of its estimates so far."""

    blocks: list[int]
    credit: float = 0.0
    estimated: float = 0.0
    took: float = 0.0

    @property
    def factor(self) -> float:
        return self.took / self.estimated if self.estimated > 0 else 1.0


class Clock:
    """Shares a budget among blocks and methods, so that no block uses another's part.

    Each method receives time as credit: its part of the time left, block after block. It skips a block that it cannot start
    within its credit and keeps the credit for its next block. Credit that a method does not use returns to all methods.

    Args:
        plan: the plan of the audit.
        sizes: data in each block.
        deadline: value of `clock()` at which the budget ends; infinity for no budget.
        clock: returns the time in seconds.
    """

    def __init__(
        self, plan: Plan, sizes: list[int], deadline: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.deadline, self.clock = plan, deadline, clock
        self.costs = {"": plan.guide, **dict(zip(plan.names, plan.costs, strict=True))}
        self.pieces = {name: _Piece(list(sizes)) for name in self.costs}
        self.dropped: set[str] = set()
        if math.isfinite(deadline):
            self._drop()
        self.total = max(self._left(), 1e-9)

    def _drop(self) -> None:
        """Drop methods, worst first, whose whole part of the budget is too short for one block: others can use the time."""
        free = self.deadline - self.clock() - self._estimate("")
        while active := [name for name in self.plan.names if name not in self.dropped]:
            share = free / max(sum(self._estimate(name) for name in active), 1e-12)
            hopeless = [name for name in active if share * self._estimate(name) < self._least(name)]
            if not hopeless:
                return
            self.dropped.add(hopeless[-1])

    def _least(self, name: str) -> float:
        """Return the seconds below which the next piece of a method is not started."""
        cost, piece = self.costs[name], self.pieces[name]
        return TOLERANCE * cost.least * cost.of(piece.blocks[0]) * piece.factor

    @property
    def seconds_left(self) -> float:
        """Estimated seconds to the end, at most those left of the budget."""
        return max(0.0, min(self._left(), self.deadline - self.clock()))

    @property
    def done(self) -> float:
        """Share of the work that is done, by its estimated time."""
        return min(1.0, 1.0 - sum(self._estimate(name) for name in self.pieces) / self.total)

    def until(self, name: str) -> float | None:
        """Return when the next piece of a method must end; None where the time is too short to start it."""
        if math.isinf(self.deadline):
            return math.inf
        if name in self.dropped:
            return None
        now, cost, piece = self.clock(), self.costs[name], self.pieces[name]
        guide = self._estimate("") * self.pieces[""].factor
        references = self._left() - guide
        free = max(0.0, self.deadline - now - guide - sum(other.credit for other in self.pieces.values()))
        mine = cost.of(piece.blocks[0]) * piece.factor
        piece.credit += free * mine / max(references, 1e-12)
        if piece.credit < self._least(name) or now >= self.deadline:
            return None
        return now + piece.credit

    def spare(self) -> float | None:
        """Return when methods for left-over data must end: within half of what the others do not need; None without time."""
        if math.isinf(self.deadline):
            return math.inf
        free = self.deadline - self.clock() - self._left()
        return self.clock() + free / 2 if free > 0 else None

    def finished(self, name: str, took: float, *, whole: bool) -> None:
        """Remove the next piece of a method (empty for the guide) from the list.

        `took` are its seconds, 0 where it was left out; `whole` says that it ran to its end, so that its time corrects the
        estimates.
        """
        piece = self.pieces[name]
        n = piece.blocks.pop(0)
        if whole:
            piece.estimated += self.costs[name].of(n)
            piece.took += took
        piece.credit = 0.0 if whole or not piece.blocks else max(0.0, piece.credit - took)

    def also(self, name: str, took: float) -> None:
        """Add seconds of later shared work to a method's time, since its estimates include them."""
        if self.pieces[name].estimated > 0:
            self.pieces[name].took += took

    def _estimate(self, name: str) -> float:
        return 0.0 if name in self.dropped else sum(self.costs[name].of(n) for n in self.pieces[name].blocks)

    def _left(self) -> float:
        return sum(self._estimate(name) * piece.factor for name, piece in self.pieces.items())


PLANNED = "plan"
"""The first step of an audit."""
