"""Refinement: lattices finer and finer, until their sums agree, for each datum by itself.

Even lattices in a box come in growing sizes. Two other kinds answer to one interface, `Lattices`: those that stretch with the
distance (`tails`), and those inside others around narrow peaks (`zoom`). A datum is closed when three lattices of one kind
agree on its evidence, little can lie beyond them, and no landmark rises above what they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from elbowroom.inference.references.grid.landmarks import Landmarks
from elbowroom.inference.references.grid.lattice import NO_SHIFT, Box, Quadrature, quadrature
from elbowroom.inference.references.grid.tails import bend
from elbowroom.inference.references.grid.zoom import focus
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting

FINAL = {1: 65, 2: 27, 3: 19}  # points per axis of the first lattice
SPACING = 1.0  # largest useful spacing of a lattice, in posterior scales
ORDINARY = {1: 4, 2: 3, 3: 2}  # sizes of the even lattice before narrow peaks get lattices of their own
WIDE = 40.0  # posterior scales across a box: wider ones are tried with stretched lattices
HELD = 100_000  # points of the other kinds of lattice, for the number of data that are held at once
SHIFTS = ((0.5, 0.27, 0.13), (0.23, 0.41, 0.09))
GOLDEN = {1: (0.618,), 2: (0.755, 0.57), 3: (0.819, 0.671, 0.55)}  # turns that no harmonic of low order takes for a whole one
PHASES = 2  # lattices that confirm the last, each a turn further
SAFETY = 3.0
GROWTH = 1.5  # of a box beyond which too much may lie
CLEAR = 0.01  # of the tolerance: lattices that agree so well do not agree by luck
WITHIN = 15.0  # nats below the peak within which a lattice must have seen all that is known
NUMBERS = ("evidence", "error", "border", "beyond", "unseen")


class Lattices(Protocol):
    """Another kind of lattice for some data, in sizes that grow by `factors`; `marks` are what it must see."""

    box: Box
    marks: Landmarks

    @property
    def factors(self) -> Sequence[float]:
        """Factors on the points per axis, one after the other."""

    @property
    def applies(self) -> Tensor:
        """The data that have such a lattice, (N,)."""

    def sums(self, log_joint: LogJoint, factor: float, shift: Sequence[float] = NO_SHIFT) -> Quadrature:
        """Sum over the lattice with `factor` times as many points per axis as the first."""

    def resolves(self, z: Tensor) -> Tensor:
        """Return which of the points z (S, N, d) it resolves, whatever their neighbours say, (S, N)."""


class Found:
    """Results so far, per datum: moments, draws, and `NUMBERS`."""

    mean: Tensor
    covariance: Tensor
    draws: Tensor
    evidence: Tensor
    error: Tensor
    border: Tensor
    beyond: Tensor
    unseen: Tensor

    def __init__(self, box: Box, keep: int) -> None:
        n, d = box.centre.shape
        self.mean, self.covariance = torch.full_like(box.centre, torch.nan), torch.full_like(box.root, torch.nan)
        for name in NUMBERS:
            setattr(self, name, torch.full_like(box.low[:, 0], torch.nan))
        self.draws = torch.zeros(keep, n, d, dtype=box.centre.dtype, device=box.centre.device)

    def take(self, rows: Tensor | slice, local: Tensor | slice, lattices: Sequence[Quadrature], unseen: Tensor) -> Quadrature:
        """Store the sums over three lattices of the data `rows`, in the lattices the rows `local`; return the last lattice."""
        first, moved, last = lattices
        mean, covariance = last.moments()
        self.mean[rows], self.covariance[rows] = mean[local], covariance[local]
        value = last.log_evidence
        change = torch.maximum((value - first.log_evidence).abs(), (value - moved.log_evidence).abs())
        rounding = 4 * torch.finfo(value.dtype).eps * value.abs()
        self.evidence[rows], self.error[rows] = value[local], (SAFETY * change + rounding)[local]
        self.border[rows], self.beyond[rows] = last.border_mass[local], last.beyond[local]
        self.unseen[rows] = unseen[local]
        return last

    def doubt(self, rows: Tensor | slice, value: Tensor) -> None:
        """Let another lattice's evidence of the data `rows` speak against theirs."""
        self.error[rows] = torch.maximum(self.error[rows], SAFETY * (self.evidence[rows] - value).abs())

    def adopt(self, rows: Tensor, other: Found, places: Tensor) -> None:
        """Take the values of other results."""
        for name in ("mean", "covariance", *NUMBERS):
            getattr(self, name)[rows] = getattr(other, name)[places]
        self.draws[:, rows] = other.draws[:, places]


@dataclass
class Refinement:
    """The data that are refined, each with its box and landmarks; the draws kept per datum; and what was found so far.

    Attributes:
        tolerance: largest error of log p(x), in nats, of a closed datum.
        limit: largest number of points per axis.
    """

    log_joint: LogJoint
    box: Box
    marks: Landmarks
    keep: int
    generator: torch.Generator
    tolerance: float
    limit: int
    found: Found = field(init=False)

    def __post_init__(self) -> None:
        self.found = Found(self.box, self.keep)

    def run(self) -> Found:
        """Refine until every datum is closed, or its limit is reached."""
        found, d = self.found, self.log_joint.dim
        needed = ((self.box.high - self.box.low).amax(-1) / SPACING).clamp_max(self.limit)
        self._try((needed > WIDE).nonzero().squeeze(-1), bend)
        everyone = torch.arange(self.log_joint.n_obs, device=needed.device)
        todo, size = everyone[self._open(found, everyone)], FINAL[d]
        zoom = lambda part, box, marks: focus(part, box, marks, FINAL[d])
        for turn in count():
            if turn == ORDINARY[d]:
                self._try(todo, zoom)
                todo = todo[self._open(found, todo)]
            if not len(todo):
                break
            ready = todo[needed[todo] <= size] if size < self.limit else todo
            self._even(ready, size)
            small = ready[found.beyond[ready] > self.tolerance]
            self.box.low[small], self.box.high[small] = GROWTH * self.box.low[small], GROWTH * self.box.high[small]
            needed[small] = (GROWTH * needed[small]).clamp_max(self.limit)
            todo = todo[self._open(found, todo)]
            if size >= self.limit:
                if turn < ORDINARY[d]:
                    self._try(todo, zoom)
                break
            size = min(int(1.7 * size), self.limit)
        return found

    def _even(self, rows: Tensor, size: int) -> None:
        """Sum over even lattices of `size` points per axis, and somewhat finer ones."""
        finer = int(1.4 * size) + 1
        for some in self._blocks(rows, finer**self.log_joint.dim):
            part, used, at = self.log_joint.some(some)
            box = self.box.rows(used)
            lattices = (
                quadrature(part, box, size),
                quadrature(part, box, size, SHIFTS[0]),
                quadrature(part, box, finer, SHIFTS[1]),
            )
            last = self.found.take(some, at, lattices, _unseen(lattices[-1], self.marks.rows(used)))
            self.found.draws[:, some] = last.draw(self.keep, self.generator)[:, at]
        for some in self._blocks(self._doubtful(self.found, rows), finer**self.log_joint.dim):
            part, used, at = self.log_joint.some(some)
            for phase in _phases(part.dim):
                self.found.doubt(some, quadrature(part, self.box.rows(used), finer, phase).log_evidence[at])

    def _try(self, rows: Tensor, kind: Callable[[LogJoint, Box, Landmarks], Lattices | None]) -> None:
        """Sum over another kind of lattice, where there is one for a datum; adopt what closes it."""
        for some in self._blocks(rows, HELD):
            part, used, at = self.log_joint.some(some)
            made = kind(part, self.box.rows(used), self.marks.rows(used))
            if made is None:
                continue
            for factor in made.factors:
                trial = self._trial(part, made, factor, at)
                good = ~self._open(trial, at) & made.applies[at]
                self.found.adopt(some[good], trial, at[good])
                if bool(good.all()):
                    break

    def _trial(self, part: LogJoint, kind: Lattices, factor: float, at: Tensor) -> Found:
        sizes = (factor, NO_SHIFT), (factor, SHIFTS[0]), (1.4 * factor, SHIFTS[1])
        lattices = [kind.sums(part, size, shift) for size, shift in sizes]
        trial, everyone = Found(kind.box, self.keep), slice(None)
        last = trial.take(everyone, everyone, lattices, _unseen(lattices[-1], kind.marks, kind.resolves))
        trial.draws[:] = last.draw(self.keep, self.generator)
        for phase in _phases(part.dim) if len(self._doubtful(trial, at)) else ():
            trial.doubt(everyone, kind.sums(part, 1.4 * factor, phase).log_evidence)
        return trial

    def _blocks(self, rows: Tensor, points: int) -> Sequence[Tensor]:
        return rows.split(fitting(points, ARRAY)) if len(rows) else ()

    def _open(self, found: Found, rows: Tensor) -> Tensor:
        settled = (found.error[rows] <= self.tolerance) & (found.beyond[rows] <= self.tolerance)
        return ~settled | (found.unseen[rows] > 0)

    def _doubtful(self, found: Found, rows: Tensor) -> Tensor:
        """Return the rows that are closed by an agreement that may be luck."""
        return rows[~self._open(found, rows) & (found.error[rows] > CLEAR * self.tolerance)]


def _phases(dim: int) -> list[tuple[float, ...]]:
    """Return shifts of lattices that confirm the one at the last of `SHIFTS`, in cells, between -1/2 and 1/2."""
    return [
        tuple((start + turn * golden + 0.5) % 1 - 0.5 for start, golden in zip(SHIFTS[-1], GOLDEN[dim], strict=False))
        for turn in range(1, PHASES + 1)
    ]


def _unseen(found: Quadrature, marks: Landmarks, resolves: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return how far a landmark or point of the pool rises above the lattice points around it, (N,); 0 if all are covered."""
    allowed = 1.0 + 2.0 * marks.z.shape[-1] * SPACING**2 / 8  # a quadratic peak between lattice points
    worst = []
    for z, log_p in ((marks.z, marks.log_p), marks.pool):
        peak = torch.maximum(found.log_p.amax(0), log_p.amax(0))
        drop = (log_p - found.nearby(z)).nan_to_num(0.0, torch.inf, 0.0)
        matters = (log_p > peak - WITHIN) & (drop > allowed)
        if resolves is not None:
            matters &= ~resolves(z)
        worst.append(torch.where(matters, drop, 0.0).amax(0))
    return torch.maximum(*worst)
