"""The cost of a reference before it starts, from the time of one gradient or from a run on a few data.

    seconds of a block of n data = a calls + b (points per datum) n

a (seconds per call) and b (seconds per point) are measured for this model on this machine in a fraction of a second. The calls
and points that each method needs were counted on models with 2 to 50 latents. Other methods are timed on a few data.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elbowroom.inference.posterior import Reference
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.search.modes import RUNS
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import LARGE_ARRAY, fitting

log = logging.getLogger("elbowroom")

ROWS = 64  # data used to time a gradient
DRAWS = (4, 32)  # draws of each datum
FEW, SOME = 2, 8  # data used to time other methods
SEED = 777  # no other part uses these random numbers


@dataclass(frozen=True)
class Workload:
    """The evaluations of the model that a method needs.

    Attributes:
        calls: sequential evaluations per block of data.
        points: points per datum, over all calls.
        least: share of the work before the method first checks the clock; 1 where it never does.
    """

    calls: float
    points: float
    least: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds of a method: `fixed` per block and `each` per datum; `least` is the share that cannot be interrupted."""

    fixed: float
    each: float
    least: float = 1.0

    def of(self, n: int) -> float:
        """Return the seconds of a block of n data."""
        return self.fixed + self.each * n

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both; the other one cannot be interrupted."""
        both, mine = self.of(100) + other.of(100), self.of(100)
        return Cost(self.fixed + other.fixed, self.each + other.each, (self.least * mine + other.of(100)) / max(both, 1e-12))


UNKNOWN = Cost(1.0, 0.0)

SCOUTED = ("hmc", "importance", "ais")
"""Methods that share the search of q* and of the modes."""
HIGH = 25  # latents beyond which these numbers grow no more


def searching(d: int, runs: int) -> Workload:
    """Return the gradients of the mode search by so many runs, for d latents."""
    return Workload(calls=60 + 2 * min(d, HIGH), points=runs * (20 + 2.6 * min(d, HIGH)))


def refitting(d: int) -> Workload:
    """Return the gradients of q* and of the parts of the gap, for d latents."""
    return Workload(calls=20 + 3 * min(d, HIGH), points=1_100 + 210 * min(d, HIGH))


def sampling(name: str, d: int) -> Workload:
    """Return the gradients of a method of `SCOUTED` alone."""
    return {
        "hmc": Workload(calls=3_000, points=8_500 + 250 * min(d, HIGH), least=0.4),
        "ais": Workload(calls=3_200, points=60_000),  # includes the reverse chains of the upper bounds
        "importance": Workload(calls=150, points=600),
    }[name]


LATTICE = {1: 1_700, 2: 16_000, 3: 500_000}
"""Densities of a grid in 1, 2 or 3 dimensions, per datum."""
OWN_LATTICE = 40
"""What it does with each of them beside the model's work, in sorts of one number."""
DISTANCES = 100_000
"""The distances between a grid and the guide's draws, per datum, in sorts of one number."""
GUIDE = 1.5  # cost of a guide draw in densities
OWN_DENSITY, OWN_GRADIENT = 30, 60
"""What a method does with each point beside the model's work, in sorts of one number; measured with two latents."""
OWN_WEIGHT = 18
"""The same of importance sampling, per draw and latent: draws, densities of the proposal, moments."""
SINGLE = 0.6  # cost of a density in single precision, which importance sampling takes if no support has an edge
OTHERS = 5_000  # densities of importance sampling beside its draws: the pilots, and what it compares with the search


class Pilot:
    """Times a model once, and predicts each method's cost for `draws` guide draws and `keep` kept draws per datum."""

    def __init__(self, log_joint: LogJoint, *, draws: int, keep: int) -> None:
        self.log_joint, self.draws, self.keep = log_joint, draws, keep
        self._gradient: Cost | None = None
        self._density: Cost | None = None
        self._sort = 0.0

    @staticmethod
    def _runs(method: Reference) -> int:
        return method.runs if isinstance(method, ImportanceSampling) else RUNS

    @property
    def sort(self) -> float:
        """Seconds per number of a sort."""
        if not self._sort:
            numbers = torch.linspace(1, 0, DRAWS[1] * ROWS, device=self.log_joint.device).view(DRAWS[1], ROWS)
            self._sort = min(self._seconds(lambda: numbers.sort(0)) for _ in range(3)) / numbers.numel()
        return self._sort

    def guide(self) -> Cost:
        """Return the cost of the guide's own pass."""
        return self._model(Workload(calls=10, points=GUIDE * self.draws), self.density)

    def reference(self, method: Reference, before: Sequence[str]) -> Cost:
        """Return the cost of a method that runs after those named in `before` on the same data."""
        d = self.log_joint.dim
        if type(method).name in SCOUTED and d:
            cost = self._model(sampling(method.name, d), self.gradient)
            laplace = False
            if isinstance(method, ImportanceSampling):
                draws, laplace = method.draws + OTHERS, method.start == "laplace"
                single = 1.0 if self.log_joint.has_edges else SINGLE
                cost = (
                    cost
                    + self._model(Workload(4, single * draws), self.density)
                    + Cost(0.0, OWN_WEIGHT * d * draws * self.sort)
                )
            if set(SCOUTED) & set(before):
                return cost
            first = Workload(4, 10 * d) if laplace else refitting(d)
            return cost + self._model(first, self.gradient) + self._model(searching(d, self._runs(method)), self.gradient)
        if isinstance(method, Grid):
            own = Cost(0.0, (OWN_LATTICE * LATTICE[d] + DISTANCES) * self.sort)
            lattice, parts = Workload(calls=120, points=LATTICE[d] + 5_000), Workload(calls=160, points=500 + 600 * d)
            return own + self._model(lattice, self.density) + self._model(parts, self.gradient)  # of the gap, and the survey
        if isinstance(method, ClosedForm | Enumeration):
            return self._model(Workload(calls=10, points=2 * self.keep), self.density)
        return self._timed(method)

    @property
    def gradient(self) -> Cost:
        """Cost of one call, by its points, of log p(x, z) with its gradient."""
        if self._gradient is None:
            self._gradient = self._measured(lambda part, z: part.grad(z), OWN_GRADIENT)
        return self._gradient

    @property
    def density(self) -> Cost:
        """Cost of one call, by its points, of log p(x, z)."""
        if self._density is None:
            self._density = self._measured(lambda part, z: part(z), OWN_DENSITY)
        return self._density

    @staticmethod
    def _model(work: Workload, call: Cost) -> Cost:
        return Cost(call.fixed * work.calls, call.each * work.points, work.least)

    def _part(self, n: int) -> LogJoint:
        """Return the first n data; all data where they cannot be subset."""
        return self.log_joint.some(torch.arange(min(n, self.log_joint.n_obs), device=self.log_joint.device))[0]

    def _measured(self, call: Callable[[LogJoint, torch.Tensor], object], own: int) -> Cost:
        """Fit seconds = fixed + each x points to two sizes of a call, and add `own` sorts per point."""
        part = self._part(ROWS)
        found = []
        most = fitting(part.n_obs * part.dim, LARGE_ARRAY)  # draws of very many latents
        for draws in (DRAWS[0], max(2 * DRAWS[0], min(DRAWS[1], most))):
            z = part.probe_points[:1].expand(draws, -1, -1).contiguous()
            with torch.no_grad():
                call(part, z)  # the first call of a shape is slower
                found.append((draws * part.n_obs, min(self._seconds(lambda z=z: call(part, z)) for _ in range(3))))  # type: ignore[misc]
        (few, fast), (many, slow) = found
        each = max(slow - fast, 0.2 * slow) / (many - few)
        return Cost(max(fast - each * few, 0.05 * fast), each + own * self.sort)

    def _timed(self, method: Reference) -> Cost:
        """Fit seconds = fixed + each x data to two small subsets, after a warm-up run."""
        parts = [self._part(n) for n in (FEW, SOME)]
        if parts[1].n_obs > SOME or self.log_joint.n_obs < 4 * SOME:
            return UNKNOWN
        try:
            method(parts[0], keep=self.keep, seed=SEED, until=math.inf)
            fast, slow = (self._seconds(lambda p=p: method(p, keep=self.keep, seed=SEED, until=math.inf)) for p in parts)  # type: ignore[misc]
        except Exception as error:  # the audit itself reports the error, with the data concerned
            log.debug("pilot of %s: %s", method.name, error)
            return UNKNOWN
        each = max(slow - fast, 0.1 * slow) / (SOME - FEW)
        return Cost(max(fast - each * FEW, 0.0), each)

    def _seconds(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        if self.log_joint.device.type == "cuda":
            torch.cuda.synchronize(self.log_joint.device)
        return time.perf_counter() - started
