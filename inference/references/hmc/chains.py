"""The chains of batched HMC: warm-up, then fixed step sizes and jittered trajectories, in buckets of similar step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import DualAveraging, State, transition
from elbowroom.inference.mcmc.normals import safe_cholesky
from elbowroom.inference.references.hmc.certificate import Chains
from elbowroom.inference.search.scout import Scout
from elbowroom.inference.target.log_joint import LogJoint

# a tenth more than a quarter of a standard normal's period: successive states are slightly anti-correlated (with the jitter
# E cos = -0.15), so that a draw of a normal posterior counts as 1.36 independent ones for its mean, 0.88 for its variance
LENGTH = 1.1 * math.pi / 2
JITTER = (0.8, 1.2)
ACCEPTANCE = 0.7  # target; rounding up to whole leapfrogs raises it above 0.9
WARMUP = (60, 50)  # trajectories before and after the metric is re-estimated
SMALLEST = 1e-9  # smallest step size; a chain that needs a smaller one cannot move
WARM_LEAPFROGS, MAX_LEAPFROGS = 8, 64
JITTERS = tuple(JITTER[0] + (JITTER[1] - JITTER[0]) * (i + 0.5) / 6 for i in range(6))  # lengths that represent the jitter
OVERHEAD = 500  # fixed cost of a gradient call, in units of chains x data
CUTS = 24  # quantiles of the step sizes at which buckets may be cut
PRIOR_DRAWS_WORTH = 5  # weight of q*'s covariance, in draws per dimension


@dataclass
class Sampler:
    """Chains of some data with their fixed metric and step sizes.

    Attributes:
        log_joint: the data's densities.
        state: of the chains.
        root: metric roots, (N, d, d).
        step: step sizes in whitened coordinates, (N,).
        generator: of all randomness.
    """

    log_joint: LogJoint
    state: State
    root: Tensor
    step: Tensor
    generator: torch.Generator

    @classmethod
    def warmed_up(cls, log_joint: LogJoint, known: Scout, chains: int, generator: torch.Generator) -> Sampler:
        """Start half of the chains from q* and half from annealed draws of the prior, and adapt metric and step sizes."""
        half, dtype = chains // 2, log_joint.probe_points.dtype
        ends = known.modes.starts(known.refit.q, half)
        start = torch.cat([known.refit.q.sample(chains - half, generator), ends.to(known.refit.q.loc.dtype)]).to(dtype)
        root = known.refit.q.root.to(dtype)
        first = torch.full_like(root[:, 0, 0], root.shape[-1] ** -0.25)
        with log_joint.frozen_weights():
            state = State.at(log_joint.grad, start)
            state, step, draws = _adapt(log_joint, state, root, first, WARMUP[0], generator)
            root = _reestimated(root, draws[WARMUP[0] // 3 :])
            state, step, _ = _adapt(log_joint, state, root, first, WARMUP[1], generator)
        return cls(log_joint, state, root, step.clamp_min(SMALLEST), generator)

    def run(self, rows: Tensor, length: int) -> Chains:
        """Return the next `length` draws of every chain of some of the data, in the order of `rows`."""
        c, n, d = self.state.z.shape
        new = lambda *shape: torch.empty(c, length, n, *shape, dtype=self.state.z.dtype, device=self.state.z.device)
        energy = new()
        out = Chains(new(d), new(), energy, new(), torch.empty(c, length, n, dtype=torch.bool, device=self.state.z.device))
        for bucket, part in self._buckets(rows):
            self._run_bucket(part, bucket, out, energy)
        return out.rows(rows)

    def _run_bucket(self, part: LogJoint, bucket: Tensor, out: Chains, energy: Tensor) -> None:
        with part.frozen_weights():
            state, root, step = self.state.rows(bucket), self.root[bucket], self.step[bucket]
            least = float(step.min())
            for i in range(out.length):
                low, high = JITTER
                tau = LENGTH * (low + (high - low) * float(torch.rand((), generator=self.generator, device=root.device)))
                n_steps = min(math.ceil(tau / least), MAX_LEAPFROGS)
                move = transition(part.grad, state, root, step.clamp_max(tau / n_steps), n_steps, self.generator, part.leap)
                state = move.state
                out.draws[:, i, bucket], out.lp[:, i, bucket] = state.z, state.value
                energy[:, i, bucket] = move.energy
                out.accept[:, i, bucket], out.divergent[:, i, bucket] = move.accept, move.divergent
            for mine, moved in zip(self.state.parts(), state.parts(), strict=True):
                mine[:, bucket] = moved

    def metric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the metric roots and step sizes of some of the data."""
        return self.root[rows], self.step[rows]

    def shrink(self, rows: Tensor) -> None:
        """Halve the step sizes of some of the data."""
        self.step[rows] /= 2

    def _buckets(self, rows: Tensor) -> list[tuple[Tensor, LogJoint]]:
        """Group data by step size, with their log joints; one group for all if the arguments cannot be separated by datum."""
        steps, order = self.step[rows].sort()
        groups = [group.sort().values for group in rows[order].tensor_split(cuts(steps.tolist(), len(self.state.z)))]
        if len(groups[0]) < self.log_joint.n_obs and self.log_joint.separable():
            return [(group, self.log_joint.subset(group)) for group in groups]
        return [(torch.arange(self.log_joint.n_obs, device=rows.device), self.log_joint)]


def cuts(steps: list[float], chains: int) -> list[int]:
    """Return where to cut ascending step sizes into buckets, so that the total cost of all trajectories is least.

    A bucket of n data costs (OVERHEAD + n x chains) per leapfrog, and its smallest step size sets the number of leapfrogs.
    """
    n = len(steps)
    slow = sum(step * MAX_LEAPFROGS < LENGTH for step in steps)  # data with truncated trajectories get their own bucket
    places = sorted({0, slow, *(slow + (n - slow) * i // CUTS for i in range(CUTS))} - {n})
    best: dict[int, tuple[float, list[int]]] = {n: (0.0, [])}
    for start in reversed(places):
        leapfrogs = sum(min(math.ceil(LENGTH * u / steps[start]), MAX_LEAPFROGS) for u in JITTERS) / len(JITTERS)
        best[start] = min(
            (leapfrogs * (OVERHEAD + (end - start) * chains) + best[end][0], [end, *best[end][1]])
            for end in (*places, n)
            if end > start and (start >= slow or end <= slow)
        )
    return best[0][1][:-1]


def _adapt(
    log_joint: LogJoint, state: State, root: Tensor, step: Tensor, length: int, generator: torch.Generator
) -> tuple[State, Tensor, Tensor]:
    """Run trajectories with dual averaging; return the state, final step sizes, and the draws (length, C, N, d)."""
    adaptation, draws = DualAveraging(step, ACCEPTANCE), []
    for _ in range(length):
        n_steps = min(max(1, math.ceil(LENGTH / float(adaptation.step.median()))), WARM_LEAPFROGS)
        move = transition(log_joint.grad, state, root, adaptation.step, n_steps, generator, log_joint.leap)
        state = move.state
        adaptation.update(move.accept.mean(0))
        draws.append(state.z)
    return state, adaptation.final(), torch.stack(draws)


def _reestimated(root: Tensor, draws: Tensor) -> Tensor:
    """Return roots of the covariance within chains, shrunk towards that of q*."""
    length, chains, _, d = draws.shape
    dtype, root, draws = root.dtype, root.double(), draws.double()
    centred = draws - draws.mean(0)
    within = torch.einsum("scnd,scne->nde", centred, centred) / ((length - 1) * chains)
    weight = length * chains / (length * chains + PRIOR_DRAWS_WORTH * d * 4)
    return safe_cholesky(weight * within + (1 - weight) * root @ root.mT).to(dtype)
